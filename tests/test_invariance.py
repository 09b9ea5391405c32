"""Promise 4: the same bits for any threads, any slice of batch or heads, run after run."""

import numpy as np
import pytest
from cases import Shape, same_bits
from layouts import LAYOUTS

SHAPES = {
    "many queries": Shape(3, 8, 70, 600, 24, kv_heads=4),
    "square": Shape(3, 4, 140, 140, 32),
    "decode": Shape(3, 8, 1, 3000, 16, kv_heads=2),
    "few queries": Shape(3, 4, 5, 1300, 24, kv_heads=4),
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (100, 20)},
    "lengths": {"kv_lengths": np.array([3, 140, 131]), "causal": True, "q_offset": [2, 1, 0]},
    "sinks": {"sinks": np.arange(8) / 4},
    "alibi": {"alibi": np.arange(8) / 40},
}
PER_BATCH = ("kv_lengths", "q_offset")
PER_HEAD = ("sinks", "alibi")


@pytest.fixture(params=SHAPES, ids=lambda n: n.replace(" ", "-"))
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=OPTIONS)
def options(request, shape):
    chosen = dict(OPTIONS[request.param])
    return {n: x[: shape.heads] if n in PER_HEAD else x for n, x in chosen.items()}


@pytest.fixture
def bitwise(target):
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    return target


def assert_same_bits(results, wanted):
    for got, want in zip(results, wanted, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads(bitwise, shape, options, dtype):
    arrays = shape.arrays(dtype)
    one = bitwise.attend(*arrays, threads=1, return_lse=True, **options)
    for threads in (2, 3, None):
        results = bitwise.attend(*arrays, threads=threads, return_lse=True, **options)
        assert_same_bits(results, one)


def test_runs(bitwise, shape, options):
    arrays = shape.arrays()
    first = bitwise.attend(*arrays, threads=2, return_lse=True, **options)
    for _ in range(3):
        results = bitwise.attend(*arrays, threads=2, return_lse=True, **options)
        assert_same_bits(results, first)


@pytest.mark.parametrize(
    "batch", [slice(0, 1), slice(1, 2), slice(1, 3), slice(2, None, -2)], ids=str
)
def test_slices_of_the_batch(bitwise, shape, options, batch):
    q, k, v = shape.arrays()
    whole = bitwise.attend(q, k, v, threads=2, return_lse=True, **options)
    part = {n: np.asarray(x)[batch] if n in PER_BATCH else x for n, x in options.items()}
    results = bitwise.attend(q[batch], k[batch], v[batch], threads=1, return_lse=True, **part)
    assert_same_bits(results, [x[batch] for x in whole])


def test_slices_of_heads_that_keep_groups_whole(bitwise, shape, options):
    q, k, v = shape.arrays()
    whole = bitwise.attend(q, k, v, threads=2, return_lse=True, **options)
    kv_heads = k.shape[1]
    group = shape.heads // kv_heads
    for first, last in ((0, 1), (1, 2), (kv_heads - 1, kv_heads), (1, kv_heads)):
        kv, heads = slice(first, last), slice(first * group, last * group)
        part = {n: x[heads] if n in PER_HEAD else x for n, x in options.items()}
        results = bitwise.attend(q[:, heads], k[:, kv], v[:, kv], return_lse=True, **part)
        assert_same_bits(results, [x[:, heads] for x in whole])


@pytest.mark.parametrize("layout", ["sequence first", "every other"])
def test_layouts(bitwise, shape, options, layout):
    """Sizes, dtype and options alone decide, so how the arrays lie in memory does not."""
    arrays = shape.arrays()
    plain = bitwise.attend(*arrays, return_lse=True, **options)
    results = bitwise.attend(*map(LAYOUTS[layout], arrays), return_lse=True, **options)
    assert_same_bits(results, plain)


def test_what_else_is_returned_and_where(bitwise, shape, options):
    arrays = shape.arrays()
    out, _ = bitwise.attend(*arrays, return_lse=True, **options)
    assert same_bits(bitwise.attend(*arrays, **options), out)
    elsewhere = LAYOUTS["backwards"](np.empty_like(out))
    assert same_bits(bitwise.attend(*arrays, out=elsewhere, **options), out)


def test_nan_of_another_batch_entry(bitwise, shape, options):
    """Other entries of the batch may hold anything."""
    q, k, v = shape.arrays()
    clean = bitwise.attend(q, k, v, threads=2, **options)
    for x in (q, k, v):
        x[1] = np.nan
    assert same_bits(bitwise.attend(q, k, v, threads=2, **options)[::2], clean[::2])
