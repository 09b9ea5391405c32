"""Promises 2 and 3 for gradients: memory O(S), and tiles that no query sees are not read."""

import sys

import numpy as np
import pytest
from helpers.memory import EXTRA, STATUS
from helpers.problems import Shape, float_type
from test_3_skipping import CASES
from test_3_skipping import PROGRAM as FORWARD

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Prints by how many MiB a call raises the peak of the process beyond its arrays and gradients.
PROGRAM = (
    STATUS
    + """
backend, n_queries, n_keys, case = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rng = np.random.default_rng(0)
q = rng.standard_normal((n_queries, 16), np.float32)
k, v = (rng.standard_normal((n_keys, 16), np.float32) for _ in range(2))
options = {
    "plain": {},
    "causal": {"causal": True},
    "bias": {"bias": rng.standard_normal((1, n_keys)), "wrt": ("bias",)},
    "sinks": {"sinks": np.zeros(1), "alibi": np.ones(1), "wrt": ("sinks", "alibi")},
}[case]
small = fastattn.vjp(fastattn.scaled_dot, *(x[:9] for x in (q, k, v)), backend=backend)
small[1](small[0])  # whatever is made once
out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, backend=backend, threads=2, **options)
grad = np.ones_like(out)
before, top = status("VmRSS"), status("VmHWM")
found = pullback(grad)
after = status("VmHWM")
print(max(after - max(before, top), 0) - sum(x.nbytes for x in found) / 2**20)
"""
)


@linux
@pytest.mark.parametrize("case", ["plain", "causal", "bias", "sinks"])
@pytest.mark.parametrize("n_queries, n_keys", [(512, 32768), (32768, 512)])
def test_no_array_of_queries_by_keys(target, run_python, case, n_queries, n_keys):
    """512 x 32768 scores would be 64 MiB; a few tiles are less than 24."""
    q, k, v = Shape(1, 1, 4, 5, 8).arrays()
    options = {
        "bias": {"bias": np.zeros((1, 5)), "wrt": ("bias",)},
        "sinks": {"sinks": np.zeros(1), "alibi": np.ones(1), "wrt": ("sinks", "alibi")},
    }.get(case, {})
    reason = target.unsupported_backward(q, k, v, **options)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    extra = run_python(PROGRAM, target.backend, str(n_queries), str(n_keys), case)
    assert float(extra) < 24


# Prints how much memory a pullback takes beyond the gradients.
BROADCAST = (
    EXTRA
    + """
backend, case = sys.argv[1:]
few = lambda batch=16, heads=1, dtype="float32": filled(batch, heads, 2, 32, dtype=dtype)
many = lambda n, heads=1, dtype="float32": filled(1, heads, n, 32, dtype=dtype)
def arrays(n):
    return {
        "keys along the batch": lambda: (few(), many(n), many(n)),
        "queries along the batch": lambda: (many(n), few(), few()),
        "queries along the heads": lambda: (many(n), few(1, 16), few(1, 16)),
        "mixed dtypes": lambda: (few(1), many(n, 4, "float16"), many(n, 4, "bfloat16")),
        "sequence first": lambda: (few(1, 4), *(filled(1, n, 4, 32).swapaxes(1, 2) for _ in "kv")),
    }[case]()
def pullback(n):
    out, back = fastattn.vjp(fastattn.scaled_dot, *arrays(n), backend=backend, threads=2)
    grad = np.full_like(out, 0.01)
    return lambda: back(grad)
pullback(3)()  # whatever is made once
print(extra(pullback(1 << 15)))
"""
)


@linux
@pytest.mark.parametrize("case", ["keys along the batch", "queries along the batch",
                                  "queries along the heads", "mixed dtypes",
                                  "sequence first"])  # fmt: skip
def test_operands_and_their_gradients_are_not_repeated(target, run_python, case):
    """For each of 16 entries a gradient would be 64 MiB, and one in another memory order or dtype
    16; results of 16 entries take 64 MiB, their sums 8.
    """
    float_type("bfloat16")
    q, k, v = Shape(1, 1, 4, 5, 8).arrays()
    reason = target.unsupported_backward(q, k, v)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    assert float(run_python(BROADCAST, target.backend, case)) < 24


SKIPPING = FORWARD.replace(
    "    shown = ",
    """    out, lse = fastattn.scaled_dot(q, k, v, backend=backend, return_lse=True, **options)
    found = fastattn.scaled_dot_backward(out, q, k, v, out, lse, backend=backend, **options)
    assert all(np.isfinite(x).all() for x in found)
    assert not any(x[:first].any() or x[last:].any() for x in found[1:])
    shown = """,
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
@pytest.mark.parametrize("case", CASES)
def test_unseen_tiles_are_not_read(target, run_python, case):
    """Keys and values a block away from any that is seen lie in memory that may not be read."""
    q, k, v = Shape(1, 1, 4, 5, 8).arrays()
    reason = target.unsupported_backward(q, k, v)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    assert "found = " in SKIPPING
    assert run_python(SKIPPING, target.backend, case).strip() == "fine"
