"""Packed sequences: as each sequence by itself."""

import numpy as np
import pytest
from helpers.problems import DTYPES, float_type

import fastattn

LENGTHS_Q, LENGTHS_K = [3, 0, 50, 1, 14, 2], [4, 2, 50, 0, 60, 2]
CU_Q, CU_K = (np.concatenate([[0], np.cumsum(x)]) for x in (LENGTHS_Q, LENGTHS_K))
OFFSETS = [0, 1, 2, 3, -1, 5]
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": 3},
    "one offset": {"causal": True, "q_offset": 0},
    "offsets": {"causal": True, "q_offset": OFFSETS},
    "alibi": {"alibi": [0.0, 0.5, 0.25, 1.0]},
    "alibi offsets": {"alibi": [0.0, 0.5, 0.25, 1.0], "causal": True, "q_offset": OFFSETS},
    "relative_bias": {"relative_bias": np.linspace(-1, 2, 28).reshape(4, 7) ** 2},
    "score": {"scale": 0.3, "softcap": 2.0, "sinks": [0.0, 1.0, -1.0, 0.5]},
}


def packed(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (sum(LENGTHS_Q), 4, 8), (sum(LENGTHS_K), 2, 8), (sum(LENGTHS_K), 2, 5)
    return tuple(rng.standard_normal(shape).astype(float_type(dtype)) for shape in shapes)


def each(q, k, v, **options):
    """``(queries, keys, (q, k, v), options)`` of each sequence, heads first."""
    for n in range(len(LENGTHS_Q)):
        queries, keys = slice(CU_Q[n], CU_Q[n + 1]), slice(CU_K[n], CU_K[n + 1])
        arrays = (x[side].swapaxes(0, 1) for x, side in ((q, queries), (k, keys), (v, keys)))
        own = dict(options)
        if np.ndim(own.get("q_offset", 0)):
            own["q_offset"] = own["q_offset"][n]
        yield queries, keys, tuple(arrays), own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_by_itself(target, name, dtype):
    q, k, v = packed(dtype)
    options = OPTIONS[name] | {"backend": target.backend}
    out, lse = fastattn.varlen(q, k, v, CU_Q, CU_K, return_lse=True, **options)
    assert out.dtype == q.dtype
    # Blocks of keys begin elsewhere, so sums are rounded in another order.
    atol = 8 * {8: 2.0**-52, 4: 2.0**-23, 2: 2.0**-7}[q.dtype.itemsize]
    for queries, _, arrays, own in each(q, k, v, **options):
        alone, lse_alone = fastattn.scaled_dot(*arrays, return_lse=True, **own)
        got = out[queries].swapaxes(0, 1).astype(np.float64)
        np.testing.assert_allclose(got, alone.astype(np.float64), atol=atol, rtol=atol)
        np.testing.assert_allclose(lse[:, queries], lse_alone, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name):
    q, k, v = packed()
    options = OPTIONS[name]
    wrt = tuple(x for x in ("alibi", "relative_bias", "sinks") if x in options)
    out, pullback = fastattn.vjp(fastattn.varlen, q, k, v, CU_Q, CU_K, wrt=wrt, **options)
    grad = np.random.default_rng(1).standard_normal(out.shape)
    dq, dk, dv, of_cu_q, of_cu_k, *rest = pullback(grad)
    assert of_cu_q is of_cu_k is None
    summed = [0] * len(wrt)
    for queries, keys, arrays, own in each(q, k, v, **options):
        _, back = fastattn.vjp(fastattn.scaled_dot, *arrays, wrt=wrt, **own)
        found = back(grad[queries].swapaxes(0, 1))
        for x, side, alone in ((dq, queries, found[0]), (dk, keys, found[1]), (dv, keys, found[2])):
            np.testing.assert_allclose(x[side].swapaxes(0, 1), alone, atol=1e-13)
        summed = [total + x for total, x in zip(summed, found[3:], strict=True)]
    for x, expected in zip(rest, summed, strict=True):
        np.testing.assert_allclose(x, expected, atol=1e-12)


# Of each kernel, of more than one tile and block, split keys, and sequences that see nothing.
MANY_Q, MANY_K = [0, 3, 20, 140, 1, 600, 70], [9, 3, 33, 0, 5000, 1100, 70]
ALONE = {
    "plain": {},
    "causal": {"causal": True, "alibi": [0.5, 0.25, 0.125, 1.0]},
    "window": {"window": (50, 0), "sinks": [0.0, 1.0, -1.0, 0.5]},
    "relative_bias": {"relative_bias": np.linspace(-1, 1, 4 * 101).reshape(4, 101)},
}


def many(dtype):
    rng = np.random.default_rng(2)
    shapes = (sum(MANY_Q), 4, 40), (sum(MANY_K), 2, 40), (sum(MANY_K), 2, 24)
    return tuple(rng.standard_normal(shape).astype(float_type(dtype)) for shape in shapes)


def many_alone(q, k, v):
    ends = zip(np.cumsum(MANY_Q), np.cumsum(MANY_K), MANY_Q, MANY_K, strict=True)
    for end_q, end_k, n_q, n_k in ends:
        queries, keys = slice(end_q - n_q, end_q), slice(end_k - n_k, end_k)
        yield queries, keys, tuple(x.swapaxes(0, 1) for x in (q[queries], k[keys], v[keys]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALONE)
def test_bits_of_a_sequence_alone(target, name, dtype):
    if target.backend != "cython":
        pytest.skip("blocks of other backends begin where the pack does")
    q, k, v = many(dtype)
    options = ALONE[name] | {"backend": target.backend, "return_lse": True, "return_max": True}
    (out, lse, top), pullback = fastattn.vjp(
        fastattn.varlen, q, k, v, lengths=MANY_Q, lengths_k=MANY_K, threads=3, **options
    )
    grad = np.random.default_rng(3).standard_normal(out.shape).astype(out.dtype)
    dq, dk, dv = pullback(grad)
    for queries, keys, arrays in many_alone(q, k, v):
        results, back = fastattn.vjp(fastattn.scaled_dot, *arrays, threads=1, **options)
        alone, lse_alone, top_alone = results
        assert np.array_equal(lse[:, queries], lse_alone)
        assert np.array_equal(top[:, queries], top_alone)
        own = (out[queries], dq[queries], dk[keys], dv[keys])
        for x, expected in zip(own, (alone, *back(grad[queries].swapaxes(0, 1))), strict=True):
            assert np.array_equal(x.swapaxes(0, 1), expected)


def test_lengths_and_out():
    q, k, v = packed()
    expected = fastattn.varlen(q, k, v, CU_Q, CU_K)
    for options in ({}, {"alibi": np.zeros(4)}):
        out = np.empty((len(q), 4, 5))
        same = fastattn.varlen(q, k, v, lengths=LENGTHS_Q, lengths_k=LENGTHS_K, out=out, **options)
        assert same is out
        np.testing.assert_allclose(out, expected, atol=1e-15)
    assert np.array_equal(fastattn.varlen(q, q, q, CU_Q), fastattn.varlen(q, q, q, CU_Q, CU_Q))


def test_out_that_overlaps_an_input():
    q, k, _ = packed()
    k = k[: len(q)]
    for options in ({}, {"alibi": np.ones(4), "q_offset": OFFSETS}):
        expected = fastattn.varlen(q, k, k, CU_Q, **options)
        into = q.copy()
        assert np.array_equal(fastattn.varlen(into, k, k, CU_Q, out=into, **options), expected)


def test_no_sequence():
    x = np.empty((0, 2, 8))
    assert fastattn.varlen(x, x, x, [0]).shape == (0, 2, 8)
    assert fastattn.varlen(x, x, x, lengths=[], alibi=[1, 2]).shape == (0, 2, 8)


@pytest.mark.parametrize("change, error, message", [
    ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q: expected where the sequences begin"),
    ({"cu_seqlens_q": [0.0, 70.0]}, TypeError, "cu_seqlens_q: expected integers"),
    ({"cu_seqlens_q": [1, 70]}, ValueError, "cu_seqlens_q: expected 0 first, got 1"),
    ({"cu_seqlens_q": [0, 40, 30, 70]}, ValueError, "cu_seqlens_q: expected entries that never"),
    ({"cu_seqlens_q": [0, 69]}, ValueError, "cu_seqlens_q: expected 70 tokens in all, got 69"),
    ({"cu_seqlens_q": [[0, 70]]}, ValueError, "cu_seqlens_q: expected shape"),
    ({"cu_seqlens_k": [0, 5, 118]}, ValueError, "cu_seqlens_k: expected 7 entries"),
    ({"cu_seqlens_k": None}, ValueError, "k: expected 70 tokens as in q"),
    ({"lengths": LENGTHS_Q}, TypeError, "lengths: expected None beside cu_seqlens_q"),
    ({"q": np.ones((70, 8))}, ValueError, "q: expected 3 axes"),
    ({"q_offset": [1, 2]}, ValueError, "q_offset: expected an int or shape"),
    ({"out": np.empty((4, 70, 5))}, ValueError, "out: expected shape"),
    ({"mask": True}, TypeError, "mask: varlen() has no such option"),
    ({"spans": (0, 1)}, TypeError, "spans: varlen() has no such option"),
    ({"kv_lengths": 1}, TypeError, "kv_lengths: varlen() has no such option"),
    ({"bias": 1}, TypeError, "bias: varlen() has no such option"),
    ({"block_table": 1}, TypeError, "block_table: varlen() has no such option"),
    ({"return_weights": True}, TypeError, "return_weights: varlen() has no such option"),
    ({"dropped": 1}, TypeError, "dropped: varlen() has no such option"),
])  # fmt: skip
def test_errors(change, error, message):
    q, k, v = packed()
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K} | change
    with pytest.raises(error) as caught:
        fastattn.varlen(**arguments)
    assert str(caught.value).startswith(message)
