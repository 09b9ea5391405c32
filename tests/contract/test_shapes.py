"""Shapes: leading axes, broadcasting, grouped heads, every size (contract, section 1)."""

import numpy as np
import pytest
from helpers.oracles import check
from helpers.problems import EDGES, LONG_EDGES, Shape

import fastattn

ORDINARY = ("float32", "float64")


@pytest.mark.parametrize("dtype", ORDINARY)
@pytest.mark.parametrize("n", EDGES)
def test_sizes_around_tile_edges(target, n, dtype):
    for n_queries, n_keys in ((n, n), (n, 21), (21, n)):
        check(target, *Shape(3, 2, n_queries, n_keys, 8).arrays(dtype))
        check(target, *Shape(3, 2, n_queries, n_keys, 8).arrays(dtype), causal=True)


@pytest.mark.parametrize("dtype", ORDINARY)
@pytest.mark.parametrize("n", LONG_EDGES)
def test_long_sizes_around_block_edges(target, n, dtype):
    for n_queries, n_keys in ((9, n), (n, 9)):
        check(target, *Shape(1, 1, n_queries, n_keys, 8).arrays(dtype), causal=True)


@pytest.mark.parametrize("n", LONG_EDGES)
def test_long_squares(target, n):
    check(target, *Shape(1, 1, n, n, 64).arrays())


@pytest.mark.parametrize("dtype", ORDINARY)
@pytest.mark.parametrize("dim", EDGES)
def test_head_and_value_dims(target, dim, dtype):
    """Any D >= 1; ``Dv != D`` is ordinary; few queries and many."""
    for n_queries in (1, 33, 129):
        for head_dim, value_dim in ((dim, dim), (dim, 5), (5, dim)):
            shape = Shape(6, 2, n_queries, 19, head_dim, value_dim=value_dim)
            check(target, *shape.arrays(dtype))


def test_large_dims(target):
    check(target, *Shape(1, 1, 130, 30, 1000, value_dim=300).arrays())


@pytest.mark.parametrize("n_queries", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_decode(target, n_queries, group):
    """Few queries against many keys."""
    check(target, *Shape(2, 2 * group, n_queries, 1300, 24, kv_heads=2).arrays())


@pytest.mark.parametrize(
    "heads, kv_heads", [(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (12, 3), (5, 5)]
)
def test_query_head_reads_its_groups_key_head(target, heads, kv_heads):
    """Query head h reads key head ``h // (Hq // Hkv)``."""
    q, k, v = Shape(2, heads, 20, 30, 8, kv_heads=kv_heads).arrays()
    out, _ = check(target, q, k, v)
    repeated = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    np.testing.assert_allclose(out, target.attend(q, *repeated), atol=1e-5)  # a few ulp of 1


BROADCAST = {
    "two axes": ((5, 4), (7, 4), (7, 3)),
    "three axes": ((2, 5, 4), (2, 7, 4), (2, 7, 3)),
    "five axes": ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), (2, 3, 2, 7, 3)),
    "keys shared by the batch": ((6, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3)),
    "queries shared by the batch": ((1, 2, 5, 4), (6, 2, 7, 4), (6, 2, 7, 3)),
    "values shared by the batch": ((6, 2, 5, 4), (6, 2, 7, 4), (1, 2, 7, 3)),
    "fewer axes in k and v": ((6, 4, 5, 4), (2, 7, 4), (7, 3)),
    "fewer axes in q": ((5, 4), (3, 2, 7, 4), (3, 2, 7, 3)),
    "both ways": ((3, 1, 2, 5, 4), (2, 2, 7, 4), (1, 2, 2, 7, 3)),
    "one query head": ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    "one value head": ((2, 6, 5, 4), (2, 3, 7, 4), (2, 1, 7, 3)),
    "one key head": ((2, 6, 5, 4), (2, 1, 7, 4), (2, 3, 7, 3)),
}


@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_broadcasting(target, shapes):
    """Leading axes and the head axis broadcast by NumPy's rules."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    check(target, q, k, v)


@pytest.mark.parametrize("shapes", BROADCAST.values(), ids=BROADCAST)
def test_broadcasting_of_options(target, shapes):
    """kv_lengths and q_offset follow the leading axes, sinks the heads, spans the queries."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    rows = target.attend(q, k, v, return_lse=True)[1].shape
    batch, heads = rows[:-2], (1, *rows)[-2] if len(rows) > 1 else 1
    check(
        target, q, k, v, causal=True, sinks=np.arange(heads), spans=(0, np.arange(2, 7)),
        kv_lengths=rng.integers(0, 8, batch), q_offset=rng.integers(0, 5, batch),
    )  # fmt: skip


def test_many_leading_axes(target):
    """Any number of them."""
    q, k, v = (x.reshape(2, *(1,) * 20, 3, *x.shape[1:]) for x in Shape(6, 2, 5, 7, 4).arrays())
    check(target, q, k[:1], v, causal=True)


def test_two_axes_are_one_head(target):
    """Two-dimensional input is one head, and so is its result."""
    q, k, v = (x[0, 0] for x in Shape(1, 1, 5, 7, 4, value_dim=3).arrays())
    out, lse = check(target, q, k, v)
    assert (out.shape, lse.shape) == ((5, 3), (5,))
    out, weights = target.attend(q, k, v, return_weights=True, causal=True)
    assert (out.shape, weights.shape) == ((5, 3), (5, 7))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 2, 0, 5, 4),
        Shape(2, 2, 5, 0, 4),
        Shape(2, 2, 0, 0, 4),
        Shape(0, 2, 5, 7, 4),
        Shape(2, 0, 5, 7, 4),
        Shape(2, 2, 5, 7, 4, value_dim=0),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 2}, {"spans": (0, 3)}], ids=str
)
def test_sizes_of_zero(target, shape, options):
    """Any S >= 0; without keys every query sees none."""
    out, lse = check(target, *shape.arrays(), **options)
    if shape.n_keys == 0:
        np.testing.assert_array_equal(out, 0)
        np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("n_queries, n_keys", [(0, 5), (5, 0), (0, 0)])
def test_sizes_of_zero_with_dense_options(target, n_queries, n_keys):
    shape = Shape(2, 2, n_queries, n_keys, 4)
    grid = (2, 2, n_queries, n_keys)
    check(target, *shape.arrays(), mask=np.ones(grid, bool), bias=np.zeros(grid), alibi=[1, 2])
    check(target, *shape.arrays(), return_weights=True)


@pytest.mark.parametrize("heads, n_queries, batch", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_sizes_of_zero_with_options_of_heads(target, heads, n_queries, batch):
    q, k, v = Shape(batch, heads, n_queries, 7, 4).arrays()
    of_heads = {"scale": np.ones(heads), "alibi": np.ones(heads), "sinks": np.ones(heads)}
    options = {**of_heads, "relative_bias": np.ones((heads, 5)), "dropout": (0.5, 1)}
    check(target, q, k, v, **options)
    wrt = ("relative_bias", *of_heads)
    if target.backend != "numba":
        out, pullback = fastattn.vjp(
            fastattn.scaled_dot, q, k, v, wrt=wrt, backend=target.backend, **options
        )
        shapes = [x.shape for x in (q, k, v, *(options[name] for name in wrt))]
        assert [x.shape for x in pullback(out)] == shapes
    assert fastattn.gaussian(q, k, v, alpha=1.0, backend=target.backend).shape == q.shape


def test_no_keys_but_sinks(target):
    sinks = np.array([-1.0, 3.0])
    _, lse = check(target, *Shape(2, 2, 5, 0, 4).arrays(), sinks=sinks)
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks[:, None], (2, 2, 5)))
