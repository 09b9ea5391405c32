"""What only the numba backend has to promise: its disk cache, its vectors, its absence."""

import os
import signal
import warnings

import numpy as np
import pytest
from helpers.kept import add, multiply
from helpers.oracles import assert_solves, same_bits
from helpers.problems import Shape

import fastattn
from fastattn.core.problem import make_problem

pytest.importorskip("numba", reason="tests of what Numba compiles")

CALL = """
import numpy as np
import fastattn
q = np.ones((1, 3, 5, 8), np.float32)
fastattn.scaled_dot(q, q, q, backend="numba")
from fastattn.backends.numba import launch
stats = launch.launcher(None, None).stats
print(len(stats.cache_hits), len(stats.cache_misses))
"""


def test_second_process_is_warm(run_python):
    """This one is the first."""
    exec(CALL.partition("from")[0])
    assert run_python(CALL).split() == ["1", "0"]


def test_nowhere_to_keep_kernels(run_python):
    """They are compiled in each process then; to import and to choose is no error."""
    program = """
from numba.core import caching
(caching.CacheImpl if hasattr(caching, "CacheImpl") else caching._CacheImpl)._locator_classes = []
import fastattn
from fastattn.backends.numba import launch
print(launch.launcher(None, None)._cache.__class__.__name__)
"""
    assert run_python(program).strip() == "NullCache"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """``kept()``: functions of no time to compile, kept as the kernels are: hits and misses of each
    in a new process, whose memory holds none of them, and the categories of its warnings.
    """
    import numba

    from fastattn.backends.numba import disk

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def use():
        monkeypatch.setattr(disk, "_warned", False)
        counts = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for function, wanted in ((add, 5), (multiply, 6)):
                compiled = numba.njit(function)
                disk.keep_on_disk(compiled)
                assert compiled(2, 3) == wanted
                counts.append((len(compiled.stats.cache_hits), len(compiled.stats.cache_misses)))
        return counts, [w.category for w in caught]

    return use


COLD, WARM = [(0, 1), (0, 1)], [(1, 0), (1, 0)]


def test_the_kernel_is_kept_like_that(run_python):
    program = """
from fastattn.backends.numba import disk, launch
print(type(launch.launcher(None, None)._cache) is disk._Cache)
"""
    assert run_python(program).strip() == "True"


@pytest.mark.parametrize("ending, cut", [("nbi", True), ("nbc", True), ("nbc", False)])
def test_damaged_cache(kept, tmp_path, ending, cut):
    """A file that was cut off, or in which a bit has changed: said once, and mended."""
    assert kept() == (COLD, [])
    assert kept() == (WARM, [])
    for path in tmp_path.rglob(f"*.{ending}"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if cut else data)
    assert kept() == (COLD, [RuntimeWarning])
    assert kept() == (WARM, [])


@pytest.mark.skipif(os.name == "nt", reason="no limits on the size of files there")
def test_full_disk(kept):
    """A limit on the size of files stands in for it; said once for all kernels."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        found = kept()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert found == (COLD, [RuntimeWarning])


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


SHAPES = [
    Shape(2, 4, 1, 130, 16, kv_heads=2),
    Shape(2, 4, 70, 700, 24, kv_heads=2),
]


@pytest.mark.parametrize("size", [1, 3e38], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("shape", SHAPES, ids=["one query", "many"])
def test_the_rest_keeps_its_bits(shape, where, poison, size):
    """Rows and columns that a NaN or an Inf does not reach, beside sums that overflow too."""
    q, k, v = shape.arrays()
    given = {"q": q, "k": k, "v": np.clip(v, -1, 1) * np.float32(size)}
    given |= {"causal": True, "return_lse": True, "return_weights": True, "backend": "numba"}
    clean = fastattn.scaled_dot(**given)
    given[where][0, 0, shape.n_keys // 2 if where != "q" else 0, 3] = poison
    dirty = fastattn.scaled_dot(**given)
    reached = np.zeros(clean[0].shape, bool)
    if where == "q":
        reached[0, 0, 0] = True
    else:
        sees = np.arange(shape.n_queries) + shape.n_keys - shape.n_queries >= shape.n_keys // 2
        reached[0, :2, sees, 3 if where == "v" else slice(None)] = True
    for one, other in zip(clean, dirty, strict=True):
        if where == "v" and one.shape != reached.shape:
            same = np.ones(one.shape, bool)
        else:
            same = ~reached if one.shape == reached.shape else ~reached.any(axis=-1)
        assert same_bits(one[same], other[same])
    assert np.isfinite(clean[0]).all()
    if where == "v" or np.isnan(poison):  # a score of -inf is none
        assert not np.isfinite(dirty[0][reached]).any()


@pytest.mark.parametrize("n_queries", [1, 3, 40])
@pytest.mark.parametrize("head_dim", [64, 256, 4096])
def test_large_scores(n_queries, head_dim):
    """One running sum over the dimensions has several times the error of NumPy's partial sums."""
    shape = Shape(40 * 256 // head_dim, 1, n_queries, 200, head_dim, value_dim=16)
    q, k, v = shape.arrays()
    results = fastattn.scaled_dot(4 * q, 4 * k, v, return_lse=True, backend="numba")
    assert_solves(results, make_problem(4 * q, 4 * k, v, return_lse=True))


def test_sum_that_overflows_on_its_way():
    """To 0: beside a score of -2e38 it has all the weight."""
    q = np.full((1, 4), 1.4e19, np.float32)
    k = q * np.array([[-1, -1, 1, 1], [-1, 0, 0, 0]], np.float32)
    v = np.array([[1, 2], [3, 4]], np.float32)
    out, lse, weights = fastattn.scaled_dot(
        q, k, v, scale=1, return_lse=True, return_weights=True, backend="numba"
    )
    assert out.tolist() == [[1, 2]] and lse.tolist() == [0] and weights.tolist() == [[1, 0]]


@pytest.mark.parametrize("first", [1, 600])
def test_infinite_score_beside_a_nan(first):
    """Whichever comes first, in one block or in two."""
    q, k, v = Shape(1, 1, 3, 700, 4).arrays()
    q, k[..., 10, :], k[..., first, :] = abs(q), np.nan, np.inf
    results = fastattn.scaled_dot(q, k, v, return_lse=True, return_weights=True, backend="numba")
    assert all(np.isnan(x).all() for x in results)


@pytest.mark.parametrize("size", [1e-36, 1e-22, 1e22, 1e36])
def test_distances_of_any_size(size):
    """Whose squares no float32 holds."""
    q, k, v = Shape(1, 2, 20, 30, 4).arrays()
    near = fastattn.euclidean(q, k, v, backend="numba")
    far = fastattn.euclidean(
        *(x * np.float32(size) for x in (q, k)), v, scale=1 / size, backend="numba"
    )
    np.testing.assert_allclose(far, near, rtol=2e-5, atol=1e-5)  # the scores are some units
