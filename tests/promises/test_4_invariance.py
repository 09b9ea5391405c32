"""Promise 4: the same bits for any threads, any slice of batch or heads, run after run."""

import numpy as np
import pytest
from helpers import problems
from helpers.layouts import LAYOUTS
from helpers.oracles import same_bits
from helpers.problems import SCORE_OPTIONS, Shape

SHAPES = {
    "many queries": Shape(3, 8, 70, 600, 96, kv_heads=4),
    "square": Shape(3, 4, 140, 140, 64),
    "decode": Shape(3, 8, 1, 3000, 16, kv_heads=2),
    "few queries": Shape(3, 4, 5, 1300, 24, kv_heads=4),
}
OPTIONS = {
    "plain": (),
    "causal": ("causal",),
    "window": ("window", "q_offset"),
    "lengths": ("kv_lengths", "causal", "q_offset"),
    "sinks": ("sinks",),
    "alibi": ("alibi",),
    "mask": ("mask",),
    "bias": ("-inf", "bias"),
    "softcap": ("softcap", "scale"),
    "everything": ("window", "kv_lengths", "spans", "mask", "-inf", *SCORE_OPTIONS),
}
BATCH_AXIS = {"kv_lengths": 0, "q_offset": 0, "spans": 0, "mask": 0, "bias": 0}
HEAD_AXIS = {"alibi": 0, "sinks": 0, "spans": 1, "mask": 1, "bias": 1}
ALL = {"return_lse": True, "return_weights": True}


@pytest.fixture(params=SHAPES, ids=lambda n: n.replace(" ", "-"))
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=OPTIONS)
def options(request, shape):
    return problems.options(OPTIONS[request.param], shape)


def sliced(options, axes, part):
    """The options of a slice of the batch or of the heads, that being their `axes`."""

    def cut(name, x):
        if name not in axes or np.ndim(x) == 0:
            return x
        if name == "spans":
            return tuple(side[(slice(None),) * axes[name] + (part,)] for side in x)
        return x[(slice(None),) * axes[name] + (part,)]

    return {name: cut(name, x) for name, x in options.items()}


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
    one = bitwise.attend(*arrays, threads=1, **ALL, **options)
    for threads in (2, 3, None):
        results = bitwise.attend(*arrays, threads=threads, **ALL, **options)
        assert_same_bits(results, one)


def test_runs(bitwise, shape, options):
    arrays = shape.arrays()
    first = bitwise.attend(*arrays, threads=2, **ALL, **options)
    for _ in range(3):
        results = bitwise.attend(*arrays, threads=2, **ALL, **options)
        assert_same_bits(results, first)


@pytest.mark.parametrize(
    "batch", [slice(0, 1), slice(1, 2), slice(1, 3), slice(2, None, -2)], ids=str
)
def test_slices_of_the_batch(bitwise, shape, options, batch):
    q, k, v = shape.arrays()
    whole = bitwise.attend(q, k, v, threads=2, **ALL, **options)
    part = sliced(options, BATCH_AXIS, batch)
    results = bitwise.attend(q[batch], k[batch], v[batch], threads=1, **ALL, **part)
    assert_same_bits(results, [x[batch] for x in whole])


def test_slices_of_heads_that_keep_groups_whole(bitwise, shape, options):
    q, k, v = shape.arrays()
    whole = bitwise.attend(q, k, v, threads=2, **ALL, **options)
    kv_heads = k.shape[1]
    group = shape.heads // kv_heads
    for first, last in ((0, 1), (1, 2), (kv_heads - 1, kv_heads), (1, kv_heads)):
        kv, heads = slice(first, last), slice(first * group, last * group)
        part = sliced(options, HEAD_AXIS, heads)
        results = bitwise.attend(q[:, heads], k[:, kv], v[:, kv], **ALL, **part)
        assert_same_bits(results, [x[:, heads] for x in whole])


@pytest.mark.parametrize("layout", ["sequence first", "every other"])
def test_layouts(bitwise, shape, options, layout):
    """Sizes, dtype and options alone decide, so how the arrays lie in memory does not."""
    arrays = shape.arrays()
    plain = bitwise.attend(*arrays, **ALL, **options)
    results = bitwise.attend(*map(LAYOUTS[layout], arrays), **ALL, **options)
    assert_same_bits(results, plain)


def test_what_else_is_returned_and_where(bitwise, shape, options):
    arrays = shape.arrays()
    out, *_ = bitwise.attend(*arrays, **ALL, **options)
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
