"""Promise 2: memory O(S). Out of memory is a MemoryError, and nothing leaks (promise 8)."""

import json
import sys

import numpy as np
import pytest
from helpers.memory import reported
from helpers.problems import float_type

from fastattn.core.problem import DISTANCE, make_problem
from fastattn.dispatch import named, unsupported_map

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_what_is_freed_does_not_hide_what_is_held(run_python):
    """The measure itself: an array that a call holds meanwhile, after a larger one was freed."""
    program = """
import numpy as np
from helpers.memory import extra, filled, report
x = filled(64, 1024, 256)
del x
report(nothing=extra(lambda: np.ones(1)), array=extra(lambda: np.ones(8 << 20).sum()))
"""
    found = json.loads(run_python(program))
    assert found["nothing"] < 1 and 63 < found["array"] < 66


# How much memory calls of 512 queries and 65536 keys take.
PROGRAM = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

backend, *cases = sys.argv[1:]
n_queries, n_keys = 512, 65536
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
    "transposed": {"k": np.asfortranarray(k)},
}
out = np.zeros_like(q)  # 64 KiB
small = [x[:9] for x in (q, k, v)]
for bias in (None, np.ones(9, np.float32)):  # whatever is made once
    fastattn.scaled_dot(*small, bias=bias, backend=backend, threads=2)
found = {}
for case in cases:
    given = {"q": q, "k": k, "v": v, **options[case], "backend": backend}
    if backend == "cuda":  # compiles a kernel for these very options, in some 100 MiB
        fastattn.scaled_dot(**given, out=out)
    found[case] = extra(lambda: fastattn.scaled_dot(**given, out=out, threads=2))
report(**found)
"""
EVERYWHERE = ["plain", "every score option"]
CASES = [*EVERYWHERE, "causal", "spans", "mask", "bias", "dense mask", "dense bias", "transposed"]


@linux
def test_no_array_of_queries_by_keys(target, run_python):
    """512 x 65536 scores would be 128 MiB (32 as bools); a few tiles are less than 24."""
    cases = CASES if target.first_of_its_backend else EVERYWHERE
    assert not reported(run_python(PROGRAM, target.backend, *cases), 24)


# How much memory calls take whose keys, or whose queries, are 16 MiB of float16, and twice as much
# of float32.
MIXED = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, filled, report

backend, *cases = sys.argv[1:]
options = {"backend": backend, "threads": 2}

def measured(function, many, *dtypes):
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
    return extra(lambda: call(q, k, v))

report(**{case: measured(*case.split()) for case in cases})
"""
MIXTURES = [
    "scaled_dot keys float32 float16 float32",
    "scaled_dot keys float32 float32 bfloat16",
    "scaled_dot keys float64 float32 float16",
    "scaled_dot queries float16 float32 float32",
    "scaled_dot queries bfloat16 float16 float16",
    "attend keys float32 float16 float16",
]


@linux
@pytest.mark.one_instruction_set
def test_operands_of_any_dtypes_are_read_where_they_lie(target, run_python):
    """A copy in the dtype of the result would be 32 MiB at least; a few tiles are less than 8."""
    float_type("bfloat16")
    q, k, v = (np.ones((1, 2, 8), x) for x in ("float32", "float16", "float16"))
    cases = list(MIXTURES)
    if target.unsupported(q, k, v, score_function=DISTANCE) is None:
        cases.append("euclidean keys float32 float16 float16")
    if unsupported_map(named(target.backend), make_problem(q, k, v)) is None:
        maps = ("key_importance", "attention_map", "top_keys")
        cases += [f"{name} keys float32 float16 float16" for name in maps]
    assert not reported(run_python(MIXED, target.backend, *cases), 8)


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
from helpers.memory import held, report

backend = sys.argv[1]
rng = np.random.default_rng(0)
q = rng.standard_normal((4, 800, 64), np.float32)
k, v = (rng.standard_normal((4, 24, 64), np.float32) for _ in range(2))
wrong = np.empty(3, np.float32)
wide = np.broadcast_to(np.float32(1), (3, 1 << 45))
options = {
    "mask": rng.random((800, 24)) < 0.9, "bias": rng.standard_normal((800, 24)), "softcap": 2,
    "return_weights": True, "return_lse": True, "kv_lengths": 20,
}

def calls(n):
    for _ in range(n):
        fastattn.scaled_dot(q, k, v, causal=True, return_lse=True, backend=backend, threads=2)
        try:
            fastattn.scaled_dot(q, k, v, out=wrong, backend=backend)
        except ValueError:
            pass
        fastattn.scaled_dot(q, k, v, backend=backend, threads=2, **options)
        try:
            fastattn.scaled_dot(wide, wide, wide[:, :5], backend=backend)
        except MemoryError:
            pass

calls(20)
before = held()
calls(100)
report(leaked=held() - before)
"""


@linux
@pytest.mark.one_instruction_set
def test_calls_leak_nothing(target, run_python):
    """100 results of 0.8 MiB would be 80 MiB, 100 weights or scratches of 0.3 MiB 30 MiB."""
    assert not reported(run_python(LEAKS, target.backend), 8)
