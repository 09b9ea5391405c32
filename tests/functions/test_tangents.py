"""Tangents of q, k and v on every backend that pushes them forward, by their formula."""

import numpy as np
import pytest
from helpers import problems
from helpers.oracles import (
    assert_exact_enough,
    definition,
    judging_dtype,
    make_problem,
    plain_measure,
    plain_numpy,
    same_bits,
)
from helpers.problems import DTYPES, INTERVAL_OPTIONS, SCORE_OPTIONS, Shape
from helpers.remembered import remembered

from fastattn import reference
from fastattn.dispatch import named, unsupported_forward_mode
from fastattn.jvp import solve_forward_mode

# Ragged micropanels, tiles, blocks of keys and of dims.
SHAPES = {
    "tiles": Shape(2, 4, 70, 530, 72, kv_heads=2, value_dim=40),
    "one query": Shape(3, 4, 1, 600, 16, kv_heads=2),
    "few keys": Shape(1, 2, 130, 3, 300, value_dim=1),
    "no values": Shape(1, 2, 20, 70, 8, value_dim=0),
}
OPTIONS = {
    "plain": (),
    "causal": ("causal", "window"),
    "softcap": ("softcap", "scales"),
    "hidden": ("kv_lengths", "spans", "mask", "-inf", "-inf distances"),
    "everything": (*SCORE_OPTIONS, *INTERVAL_OPTIONS, "mask"),
}


def push(target, p, tangents, moving="qkv"):
    """``(tangent of out, tangent of lse)``, or a skip where the backend has none."""
    backend = named(target.backend)
    reason = unsupported_forward_mode(backend, p)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    along = {name: t for name, t in zip("qkv", tangents, strict=True) if name in moving}
    return solve_forward_mode(p, along, backend.run_forward_mode)


@remembered
def by_formula(p, tangents, moving, weights_of, real):
    """Both tangents, from weights that an oracle finds, with every step in `real`."""
    weights = weights_of(p, real)[2]

    def rows(x):
        return reference.per_query_head(x.astype(real), p)

    q, dq = (np.broadcast_to(x.astype(real), p.rows(p.head_dim)) for x in (p.q, tangents[0]))
    (k, dk), (v, dv) = ((rows(x), rows(t)) for x, t in zip((p.k, p.v), tangents[1:], strict=True))
    dq, dk, dv = (x * (name in moving) for name, x in zip("qkv", (dq, dk, dv), strict=True))
    scale = np.asarray(p.scale).astype(real)[..., None, None]
    ds = (dq @ k.swapaxes(-1, -2) + q @ dk.swapaxes(-1, -2)) * scale
    if p.softcap is not None:
        s = plain_measure(p, q, k).astype(real) * scale
        ds = ds * (1 - np.tanh(s / real(p.softcap)) ** 2)
    ds = (weights * ds).astype(real)
    d_lse = ds.sum(axis=-1)
    used, ds = (reference.dropped(x, p).astype(real) for x in (weights, ds))
    return ds @ v + used @ dv - d_lse[..., None] * (used @ v), d_lse


def moves_of(arrays):
    return tuple(np.cos(3 * x).astype(x.dtype) for x in arrays)


def check_tangents(target, arrays, moving="qkv", tangents=None, **options):
    """Tangents are as exact as promise 1 wants results to be."""
    p = make_problem(*arrays, return_lse=True, **options)
    if tangents is None:
        tangents = moves_of(arrays)
    found = push(target, p, tangents, moving)
    real = judging_dtype(p)
    exact = by_formula(p, tangents, moving, definition, real)
    plain = by_formula(p, tangents, moving, plain_numpy, p.dtype.type)
    dtypes = p.dtype, p.accumulator
    for got, truth, yardstick, dtype, name in zip(
        found, exact, plain, dtypes, ("out", "lse"), strict=True
    ):
        assert_exact_enough(got, truth, yardstick, dtype, f"tangent of {name}")
    return found


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option(target, shape, names, dtype):
    sizes = SHAPES[shape]
    options = problems.options(OPTIONS[names], sizes)
    check_tangents(target, sizes.arrays(dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moving", ["q", "k", "v", "kv", ""])
def test_every_operand(target, moving, dtype):
    sizes = SHAPES["tiles"]
    options = problems.options(("causal", "sinks"), sizes)
    check_tangents(target, sizes.arrays(dtype), moving, dropout=(0.3, 5), **options)


@pytest.mark.parametrize("given", ["float64", "float16", ">f4", "int8", "bool", "strided"])
def test_tangents_of_any_real_dtype(target, given):
    arrays = SHAPES["tiles"].arrays()
    tangents = [np.round(3 * x) for x in arrays]
    wanted = push(target, make_problem(*arrays, return_lse=True), tangents)
    if given == "bool":
        wanted = push(target, make_problem(*arrays, return_lse=True), [x * 0 + 1 for x in arrays])
        tangents = [x == x for x in tangents]
    elif given == "strided":
        tangents = [np.repeat(x, 2, axis=-1)[..., ::2] for x in tangents]
    else:
        tangents = [x.astype(given) for x in tangents]
    for got, want in zip(
        push(target, make_problem(*arrays, return_lse=True), tangents), wanted, strict=True
    ):
        assert same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_same_bits_for_any_threads_and_slices(target, dtype):
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    if target.backend == "numba":
        pytest.skip("its tangents are NumPy's")
    arrays = SHAPES["tiles"].arrays(dtype)
    tangents = moves_of(arrays)
    alone = push(target, make_problem(*arrays, threads=1, return_lse=True), tangents)
    more = push(target, make_problem(*arrays, threads=3, return_lse=True), tangents)
    assert all(map(same_bits, alone, more))
    parts = [[x[1:] for x in xs] for xs in (arrays, tangents)]
    entry = push(target, make_problem(*parts[0], return_lse=True), parts[1])
    assert all(same_bits(got, want[1:]) for got, want in zip(entry, alone, strict=True))
    cuts = slice(2, 4), slice(1, 2), slice(1, 2)
    parts = [[x[:, cut] for x, cut in zip(xs, cuts, strict=True)] for xs in (arrays, tangents)]
    heads = push(target, make_problem(*parts[0], return_lse=True), parts[1])
    assert all(same_bits(got, want[:, 2:]) for got, want in zip(heads, alone, strict=True))


@pytest.mark.parametrize("where", ["k", "v", "dk", "dv"])
def test_what_is_not_seen_touches_nothing(target, where):
    """NaN in a key, its value or their tangents reaches the queries that see it, and no other."""
    arrays = SHAPES["tiles"].arrays()
    tangents = moves_of(arrays)
    p = make_problem(*arrays, causal=True, return_lse=True)
    wanted = push(target, p, tangents)
    (arrays if len(where) == 1 else tangents)["qkv".index(where[-1])][:, :, 500] = np.nan
    found = push(target, make_problem(*arrays, causal=True, return_lse=True), tangents)
    for got, want, of_lse in zip(found, wanted, (False, True), strict=True):
        sees = slice(40, None)  # key 500 is that of query 40
        assert same_bits(got[:, :, :40], want[:, :, :40])
        assert np.isnan(got[:, :, sees]).all() == (not of_lse or "k" in where)


def test_no_key(target):
    """Both tangents are 0 where no key is seen, whatever moves."""
    arrays = SHAPES["tiles"].arrays()
    tangents = moves_of(arrays)
    for options in ({"kv_lengths": 0}, {"kv_lengths": [0, 3]}, {"mask": np.zeros((), bool)}):
        p = make_problem(*arrays, return_lse=True, **options)
        for got in push(target, p, tangents):
            assert not got[0].any()


def test_sums_beyond_the_range(target):
    """Of weights and large tangents, where the tangents themselves are within it."""
    arrays = SHAPES["tiles"].arrays()
    tangents = moves_of(arrays)
    size = np.float32(2.0**116)
    p = make_problem(*arrays, return_lse=True)
    wanted = push(target, p, tangents)
    found = push(target, p, [x * size for x in tangents])
    for got, want in zip(found, wanted, strict=True):
        # Rounded as before, but for weights that sink below the range.
        np.testing.assert_allclose(got / size, want, rtol=1e-5, atol=1e-6)
    check_tangents(target, (*arrays[:2], arrays[2] * size), "q", tangents)


def test_broadcast_operands(target):
    """Tangents have their array's shape, and broadcast as it does."""
    q, k, v = SHAPES["tiles"].arrays("float64")
    q, k, v = q[:1], k[:, :1], v[0, 0]
    tangents = [np.cos(3 * x) for x in (q, k, v)]
    found = push(target, make_problem(q, k, v, return_lse=True), tangents)

    def whole(x, heads):
        return np.broadcast_to(x, (2, heads, *x.shape[-2:])).copy()

    full = [
        [whole(x, n) for x, n in zip(xs, (4, 2, 2), strict=True)] for xs in ((q, k, v), tangents)
    ]
    wanted = push(target, make_problem(*full[0], return_lse=True), full[1])
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
