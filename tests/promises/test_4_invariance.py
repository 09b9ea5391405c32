"""Promise 4: the same bits for any threads, any slice of batch or heads, run after run."""

from functools import cache

import numpy as np
import pytest
from helpers import problems
from helpers.layouts import LAYOUTS
from helpers.oracles import same_bits
from helpers.problems import SCORE_OPTIONS, Shape

WEIGHTS = {"return_lse": True, "return_weights": True}
LSE = {"return_lse": True}
# Several tiles of queries, blocks of keys and chunks of dims, with ragged ends, or enough of them
# that AMX multiplies in parts; and keys that are split between threads, which weights turn off.
SHAPES = {
    "many-queries": (Shape(3, 4, 70, 530, 72, kv_heads=2), WEIGHTS),
    "square": (Shape(3, 2, 140, 140, 64), WEIGHTS),
    "decode": (Shape(3, 8, 1, 1300, 16, kv_heads=2), WEIGHTS),
    "few-queries": (Shape(3, 4, 5, 1300, 24, kv_heads=4), WEIGHTS),
    "split-decode": (Shape(3, 4, 1, 4500, 16, kv_heads=2), LSE),
    "split-few-queries": (Shape(3, 4, 5, 5000, 24, kv_heads=2), LSE),
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
# Who computes which tile, and of what, is code without an instruction set, so one stands for all
# of them; what a tile begins with and leaves behind is tried with no option and with every one.
EVERYWHERE = ("plain", "everything")
BATCH_AXIS = {"kv_lengths": 0, "q_offset": 0, "spans": 0, "mask": 0, "bias": 0}
HEAD_AXIS = {"alibi": 0, "sinks": 0, "relative_bias": 0, "spans": 1, "mask": 1, "bias": 1}

each_case = pytest.mark.parametrize(
    "shape, names",
    [
        pytest.param(
            shape,
            names,
            id=f"{shape}-{names}",
            marks=[] if names in EVERYWHERE else pytest.mark.one_instruction_set,
        )
        for shape in SHAPES
        for names in OPTIONS
    ],
)


@cache
def problem(shape, names, dtype="float32"):
    """``(q, k, v), options, returned``, which no test changes."""
    sizes, returned = SHAPES[shape]
    return sizes.arrays(dtype), problems.options(OPTIONS[names], sizes), returned


@cache
def solved(target, shape, names, dtype="float32"):
    """The results by one thread."""
    arrays, options, returned = problem(shape, names, dtype)
    return target.attend(*arrays, threads=1, **returned, **options)


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


@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("split")])
def test_keys_are_split(target, shape):
    """Else the cases of that name would try nothing new: parts of a sum round in another way."""
    if target.backend != "cython":
        pytest.skip(f"{target.backend} does not split them")
    arrays, _, _ = problem(shape, "plain")
    assert not same_bits(target.attend(*arrays, **WEIGHTS)[0], solved(target, shape, "plain")[0])


@each_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_and_runs(bitwise, shape, names, dtype):
    arrays, options, returned = problem(shape, names, dtype)
    for threads in (2, 2, 3, None):
        results = bitwise.attend(*arrays, threads=threads, **returned, **options)
        assert_same_bits(results, solved(bitwise, shape, names, dtype))


@each_case
def test_slices_of_the_batch(bitwise, shape, names):
    (q, k, v), options, returned = problem(shape, names)
    for batch in (slice(0, 1), slice(1, 3), slice(2, None, -2)):
        part = sliced(options, BATCH_AXIS, batch)
        results = bitwise.attend(q[batch], k[batch], v[batch], threads=2, **returned, **part)
        assert_same_bits(results, [x[batch] for x in solved(bitwise, shape, names)])


@each_case
def test_slices_of_heads_that_keep_groups_whole(bitwise, shape, names):
    (q, k, v), options, returned = problem(shape, names)
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    for first, last in {(0, 1), (1, 2), (kv_heads - 1, kv_heads), (1, kv_heads)}:
        kv, heads = slice(first, last), slice(first * group, last * group)
        part = sliced(options, HEAD_AXIS, heads)
        results = bitwise.attend(q[:, heads], k[:, kv], v[:, kv], **returned, **part)
        assert_same_bits(results, [x[:, heads] for x in solved(bitwise, shape, names)])


@each_case
def test_layouts(bitwise, shape, names):
    """Sizes, dtype and options alone decide, so how the arrays lie in memory does not."""
    arrays, options, returned = problem(shape, names)
    for layout in ("sequence first", "every other"):
        results = bitwise.attend(*map(LAYOUTS[layout], arrays), **returned, **options)
        assert_same_bits(results, solved(bitwise, shape, names))


@each_case
def test_what_else_is_returned_and_where(bitwise, shape, names):
    arrays, options, _ = problem(shape, names)
    out, *_ = solved(bitwise, shape, names)
    assert same_bits(bitwise.attend(*arrays, **options), out)
    elsewhere = LAYOUTS["backwards"](np.empty_like(out))
    assert same_bits(bitwise.attend(*arrays, out=elsewhere, **options), out)


@each_case
def test_nan_of_another_batch_entry(bitwise, shape, names):
    """Other entries of the batch may hold anything."""
    arrays, options, returned = problem(shape, names)
    arrays = [x.copy() for x in arrays]
    for x in arrays:
        x[1] = np.nan
    results = bitwise.attend(*arrays, threads=2, **returned, **options)
    assert_same_bits([x[::2] for x in results], [x[::2] for x in solved(bitwise, shape, names)])
