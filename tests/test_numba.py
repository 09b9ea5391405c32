"""What only the numba backend has to promise: its disk cache, its vectors, its absence."""

import numpy as np
import pytest

import fastattn

pytest.importorskip("numba", reason="tests of what Numba compiles")

CALL = """
import numpy as np
import fastattn
q = np.ones((1, 3, 5, 8), np.float32)
fastattn.scaled_dot(q, q, q, backend="numba")
from fastattn._numba import launch
stats = launch.launcher(None, None).stats
print(len(stats.cache_hits), len(stats.cache_misses))
"""


def test_second_process_is_warm(run_python, tmp_path):
    found = [run_python(CALL, timeout=300, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [line.split() for line in found] == [["0", "1"], ["1", "0"]]


def test_nowhere_to_keep_kernels(run_python):
    """They are compiled in each process then; to import and to choose is no error."""
    program = """
from numba.core import caching
(caching.CacheImpl if hasattr(caching, "CacheImpl") else caching._CacheImpl)._locator_classes = []
import fastattn
from fastattn._numba import launch
print(launch.launcher(None, None)._cache.__class__.__name__)
"""
    assert run_python(program).strip() == "NullCache"


def test_without_compiling(run_python):
    """Numba can be told not to compile: then this backend cannot serve, and says so."""
    program = """
import fastattn, numpy
q = numpy.ones((3, 4), "f4")
print(fastattn.explain(q, q, q, backend="numpy").passed_over["numba"])
"""
    assert run_python(program, NUMBA_DISABLE_JIT="1").strip() == "NUMBA_DISABLE_JIT is set"


def test_import_compiles_nothing(run_python):
    program = "import sys, fastattn; print('numba' in sys.modules, 'llvmlite' in sys.modules)"
    assert run_python(program).split() == ["False", "False"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name, most", [("exp", 2), ("tanh", 4)])
def test_vectormath(name, most, dtype):
    """As many ulp as the docstrings say, over the whole range, and the values at its ends."""
    from numba import njit

    from fastattn import vectormath

    function = getattr(vectormath, name)

    @njit
    def each(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    end = 88.7 if dtype == "float32" else 709.7
    near = np.logspace(-8, 0, 5001)
    x = np.concatenate([np.linspace(-end - 20, end, 50_001), near, -near]).astype(dtype)
    got = np.empty_like(x)
    each(x, got)
    exact = getattr(np, name)(x.astype(np.longdouble))
    error = np.abs(got - exact) / np.spacing(np.abs(exact).astype(dtype))
    assert error.max() <= most
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e4, -1e4], dtype)
    got = np.empty_like(x)
    each(x, got)
    with np.errstate(over="ignore", under="ignore"):
        wanted = getattr(np, name)(x)
    np.testing.assert_array_equal(got, wanted)
    assert np.signbit(got[1]) == np.signbit(wanted[1])


def test_plan_tells_of_numba():
    q = np.zeros((2, 300, 64), np.float32)
    plan = fastattn.explain(q, q, q, backend="numba", threads=2).plan
    assert "Numba" in plan["kernel"] and plan["threads"] == "2"
    assert plan["instruction set"].split(",")[0] in ("avx512", "avx2", "neon", "baseline")
