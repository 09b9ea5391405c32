"""Promise 2: memory O(S). Out of memory is a MemoryError, and nothing leaks (promise 8)."""

import sys

import numpy as np
import pytest
from helpers.memory import EXTRA, STATUS
from helpers.problems import float_type

from fastattn.core.problem import DISTANCE, DOT, make_problem
from fastattn.dispatch import named, unsupported_map

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Prints by how many MiB a call raises the peak of the process beyond what it had before.
PROGRAM = (
    STATUS
    + """
backend, n_queries, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
n_keys = 65536
rng = np.random.default_rng(0)
q = rng.standard_normal((n_queries, 32), np.float32)
k, v = (rng.standard_normal((n_keys, 32), np.float32) for _ in range(2))
options = {
    "plain": {},
    "causal": {"causal": True},
    "spans": {"spans": (np.arange(n_queries), n_keys - np.arange(n_queries))},
    "mask": {"mask": rng.random(n_keys) < 0.9},
    "bias": {"bias": rng.standard_normal((1, n_keys))},
    "dense mask": {"mask": np.broadcast_to(rng.random(n_keys) < 0.9, (n_queries, n_keys)).copy()},
    "dense bias": {"bias": np.zeros((n_queries, n_keys), np.int8)},
    "every score option": {
        "bias": np.zeros((n_queries, n_keys), np.float16), "softcap": 3, "alibi": [1],
        "sinks": [1], "mask": np.arange(n_keys) % 7 > 0, "return_lse": True,
    },
    "transposed": {},
}[case]
if case == "transposed":
    k = np.asfortranarray(k)
out = np.zeros_like(q)
small = [x[:9] for x in (q, k, v)]
for bias in (None, np.ones(9, np.float32)):  # whatever is made once
    fastattn.scaled_dot(*small, bias=bias, backend=backend, threads=2)
if backend == "cuda":  # compiles a kernel for these very options, in some 100 MiB
    fastattn.scaled_dot(q, k, v, out=out, backend=backend, **options)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak
before = status("VmRSS")
top = status("VmHWM")
fastattn.scaled_dot(q, k, v, out=out, backend=backend, threads=2, **options)
after = status("VmHWM")
# A peak of the past would hide this one: none may lie far above what is held now.
assert top - before < 40, (top, before)
print(max(0, after - max(before, top)) + (top - before if after > top else 0))
"""
)


@linux
@pytest.mark.parametrize("case", ["plain", "causal", "spans", "mask", "bias", "dense mask",
                                  "dense bias", "every score option", "transposed"])  # fmt: skip
def test_no_array_of_queries_by_keys(target, run_python, case):
    """512 x 65536 scores would be 128 MiB (32 as bools); a few tiles are less than 24."""
    assert float(run_python(PROGRAM, target.backend, "512", case)) < 24


# Prints how much memory a call takes whose keys, or whose queries, are 16 MiB of float16, and twice
# as much of float32.
MIXED = (
    EXTRA
    + """
backend, function, many, *dtypes = sys.argv[1:]
options = {"backend": backend, "threads": 2}
def arrays(n, rows):
    lengths = (rows, n, n) if many == "keys" else (n, rows, rows)
    return [filled(1, m, 64, dtype=name) for m, name in zip(lengths, dtypes)]
def call(q, k, v):
    if function == "attend":
        return cache.attend(q, **options)
    f = getattr(fastattn, function)
    if function in ("scaled_dot", "euclidean"):
        return f(q, k, v, **options)
    return f(q, k, *{"attention_map": [(1, 2)], "top_keys": [2]}.get(function, []), **options)
fastattn.scaled_dot(*arrays(3, 2), **options)  # whatever is made once
if function == "attend":
    q, k, v = arrays(1 << 17, 2)
    cache = fastattn.KVCache(1, 1, 64, capacity=1 << 17, dtype=dtypes[1])
    cache.append(k[None], v[None])
    q = q[None]
else:
    call(*arrays(3, 2))
    q, k, v = arrays(1 << 17, 2)
print(extra(lambda: call(q, k, v)))
"""
)
MIXTURES = {
    "keys": [("float32", "float16", "float32"), ("float32", "float32", "bfloat16"),
             ("float64", "float32", "float16")],
    "queries": [("float16", "float32", "float32"), ("bfloat16", "float16", "float16")],
}  # fmt: skip


@linux
@pytest.mark.parametrize(
    "many, dtypes", [(many, dtypes) for many in MIXTURES for dtypes in MIXTURES[many]]
)
def test_operands_of_any_dtypes_are_read_where_they_lie(target, run_python, many, dtypes):
    """A copy in the dtype of the result would be 32 MiB at least; a few tiles are less than 8."""
    assert all(map(float_type, dtypes))
    assert float(run_python(MIXED, target.backend, "scaled_dot", many, *dtypes)) < 8


@linux
@pytest.mark.parametrize(
    "function", ["euclidean", "attend", "key_importance", "attention_map", "top_keys"]
)
def test_operands_of_any_dtypes_of_other_functions(target, run_python, function):
    q, k, v = (np.ones((1, 2, 8), x) for x in ("float32", "float16", "float16"))
    if function in ("key_importance", "attention_map", "top_keys"):
        reason = unsupported_map(named(target.backend), make_problem(q, k, v))
    else:
        measure = DISTANCE if function == "euclidean" else DOT
        reason = target.unsupported(q, k, v, score_function=measure)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    dtypes = ("float32", "float16", "float16")
    assert float(run_python(MIXED, target.backend, function, "keys", *dtypes)) < 8


HUGE = (1 << 20, 1 << 10, 1 << 12)  # with 64 float32 more: 2**50 bytes, on any system too many


def test_out_of_memory_is_a_memory_error(target):
    q = np.broadcast_to(np.float32(1), (*HUGE, 64))
    k = np.ones((1, 1, 3, 64), np.float32)
    with pytest.raises(MemoryError):
        target.attend(q, k, k)


def test_out_of_memory_for_the_weights(target):
    q = np.broadcast_to(np.float32(1), (1 << 25, 1))
    k = np.broadcast_to(np.float32(1), (1 << 25, 1))
    with pytest.raises(MemoryError):
        target.attend(q, k, k, return_weights=True)


def test_out_of_memory_for_the_scratch(target):
    """A head_dim of 2**45, through a stride of 0."""
    q = np.broadcast_to(np.float32(1), (3, 1 << 45))
    with pytest.raises(MemoryError):
        target.attend(q, q, np.ones((3, 4), np.float32))


LEAKS = """
import sys
import numpy as np
import fastattn

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 200, 64), np.float32) for _ in range(3))
wrong = np.empty(3, np.float32)
wide = np.broadcast_to(np.float32(1), (3, 1 << 45))
options = {
    "mask": rng.random((40, 200)) < 0.9, "bias": rng.standard_normal((40, 200)), "softcap": 2,
    "return_weights": True, "return_lse": True, "kv_lengths": 150,
}

def calls(n):
    for _ in range(n):
        fastattn.scaled_dot(q, k, v, causal=True, return_lse=True, backend=sys.argv[1], threads=2)
        try:
            fastattn.scaled_dot(q, k, v, out=wrong, backend=sys.argv[1])
        except ValueError:
            pass
        fastattn.scaled_dot(q[:, :40], k, v, backend=sys.argv[1], threads=2, **options)
        try:
            fastattn.scaled_dot(wide, wide, wide[:, :5], backend=sys.argv[1])
        except MemoryError:
            pass

calls(20)
before = held()
calls(200)
print(held() - before)
"""


@linux
def test_calls_leak_nothing(target, run_python):
    """200 results of 0.2 MiB would be 40 MiB, 200 weights of 0.12 MiB 25 MiB."""
    assert float(run_python(LEAKS, target.backend)) < 8
