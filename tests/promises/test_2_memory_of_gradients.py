"""Promise 2 for gradients: memory O(S)."""

import sys

import numpy as np
import pytest
from helpers.memory import reported
from helpers.problems import Shape, float_type

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# How much memory a pullback takes beyond the gradients.
PROGRAM = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

backend, *cases = sys.argv[1:]
rng = np.random.default_rng(0)
found = {}
for n_queries, n_keys in ((512, 32768), (32768, 512)):
    q = rng.standard_normal((n_queries, 16), np.float32)
    k, v = (rng.standard_normal((n_keys, 16), np.float32) for _ in range(2))
    options = {
        "plain": {},
        "causal": {"causal": True},
        "bias": {"bias": rng.standard_normal((1, n_keys)), "wrt": ("bias",)},
        "sinks": {"sinks": np.zeros(1), "alibi": np.ones(1), "wrt": ("sinks", "alibi")},
    }
    small = fastattn.vjp(fastattn.scaled_dot, *(x[:9] for x in (q, k, v)), backend=backend)
    small[1](small[0])  # whatever is made once
    for case in cases:
        out, pullback = fastattn.vjp(
            fastattn.scaled_dot, q, k, v, backend=backend, threads=2, **options[case]
        )
        grad = np.ones_like(out)
        found[f"{case}, {n_queries} queries"] = extra(lambda: pullback(grad))
report(**found)
"""


def skip_unserved(target, **options):
    reason = target.unsupported_backward(*Shape(1, 1, 4, 5, 8).arrays(), **options)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")


@linux
def test_no_array_of_queries_by_keys(target, run_python):
    """512 x 32768 scores would be 64 MiB; a few tiles are less than 24."""
    skip_unserved(target)
    cases = ["plain"]
    if target.first_of_its_backend:
        cases += ["causal", "sinks"]
        if (
            target.unsupported_backward(
                *Shape(1, 1, 4, 5, 8).arrays(), bias=np.zeros((1, 5)), wrt=("bias",)
            )
            is None
        ):
            cases.append("bias")
    assert not reported(run_python(PROGRAM, target.backend, *cases), 24)


# And one of operands that broadcast, or that are of several dtypes or in another memory order.
BROADCAST = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, filled, report

backend = sys.argv[1]
few = lambda batch=16, heads=1, dtype="float32": filled(batch, heads, 2, 32, dtype=dtype)
many = lambda n, heads=1, dtype="float32": filled(1, heads, n, 32, dtype=dtype)
cases = {
    "keys along the batch": lambda n: (few(), many(n), many(n)),
    "queries along the batch": lambda n: (many(n), few(), few()),
    "queries along the heads": lambda n: (many(n), few(1, 16), few(1, 16)),
    "mixed dtypes": lambda n: (few(1), many(n, 4, "float16"), many(n, 4, "bfloat16")),
    "sequence first": lambda n: (few(1, 4), *(filled(1, n, 4, 32).swapaxes(1, 2) for _ in "kv")),
}
def pullback(arrays):
    out, back = fastattn.vjp(fastattn.scaled_dot, *arrays, backend=backend, threads=2)
    grad = np.full_like(out, 0.01)
    return lambda: back(grad)
found = {}
for case, arrays in cases.items():
    pullback(arrays(3))()  # whatever is made once
    found[case] = extra(pullback(arrays(1 << 15)))
report(**found)
"""


@linux
@pytest.mark.one_instruction_set
def test_operands_and_their_gradients_are_not_repeated(target, run_python):
    """For each of 16 entries a gradient would be 64 MiB, and one in another memory order or dtype
    16; results of 16 entries take 64 MiB, their sums 8.
    """
    float_type("bfloat16")
    skip_unserved(target)
    assert not reported(run_python(BROADCAST, target.backend), 24)
