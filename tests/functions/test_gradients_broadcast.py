"""Gradients of operands that broadcast are sums, and those of mixed dtypes are of the widest."""

import itertools

import numpy as np
import pytest
from helpers.gradients import check_gradients, random_like
from helpers.oracles import same_bits
from helpers.problems import DTYPES, Shape, float_type

# q, k and v: along the batch, along one of its axes, along heads, without the axes at all.
SHAPES = {
    "keys and values": ((3, 2, 4, 5, 8), (1, 1, 2, 7, 8), (1, 1, 2, 7, 6)),
    "queries": ((1, 1, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 6)),
    "each along another axis": ((4, 5, 8), (3, 2, 2, 7, 8), (2, 1, 7, 6)),
    "heads of queries": ((3, 2, 1, 5, 8), (3, 2, 4, 7, 8), (7, 6)),
    "queries, blocks of keys": ((1, 2, 100, 4), (3, 2, 530, 4), (1, 2, 530, 3)),
    "values, blocks of keys": ((2, 2, 100, 4), (1, 1, 530, 4), (2, 1, 530, 3)),
    "few numbers": ((1, 1, 1), (50, 1, 1, 1), (1, 1, 1, 1)),
}


def arrays(shapes, dtype="float32"):
    rng = np.random.default_rng(3)
    return [rng.standard_normal(s, np.float64).astype(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (2, 0)}], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_gradients_are_summed_over_axes_that_broadcast(target, shapes, options, dtype):
    check_gradients(target, *arrays(shapes, dtype), **options)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sums_do_not_depend_on_the_threads(target, shapes):
    """With a bias that entries share as well, which orders them in another way."""
    if not target.bitwise:
        pytest.skip("promise 4 is for cython and numba")
    q, k, v = arrays(shapes)
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    for bias in (None, np.ones((n_queries, n_keys), np.float32)):
        wrt = () if bias is None else ("bias",)
        found = []
        for threads in (1, 2, 3, 8):
            out, pullback = target.vjp(q, k, v, bias=bias, wrt=wrt, threads=threads)
            found.append(pullback(random_like(out)))
        for other in found[1:]:
            assert all(map(same_bits, found[0], other))


def test_an_empty_batch_gives_zeros(target):
    q, k, v = arrays(((0, 2, 5, 8), (1, 2, 7, 8), (2, 7, 6)))
    out, pullback = target.vjp(q, k, v)
    found = pullback(out)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("shape", [Shape(2, 4, 3, 70, 24, 2), Shape(1, 2, 130, 140, 64)], ids=str)
def test_mixed_dtypes_give_the_bits_of_converted_copies(target, shape):
    """A narrower operand is widened as it is read, and its gradient has the promoted dtype."""
    for names in itertools.product(DTYPES, repeat=3):
        if len(set(names)) == 1:
            continue
        mixed = [x.astype(float_type(n)) for x, n in zip(shape.arrays(), names, strict=True)]
        wide = np.dtype(np.float64 if "float64" in names else np.float32)
        found, wanted = (
            pullback(random_like(out))
            for out, pullback in (
                target.vjp(*x, causal=True) for x in (mixed, [x.astype(wide) for x in mixed])
            )
        )
        assert all(x.dtype == wide for x in found)
        assert all(map(same_bits, found, wanted)), names
