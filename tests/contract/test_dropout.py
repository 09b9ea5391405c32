"""Dropout (contract, section 1): which weights it takes, and what is left of the rest."""

import numpy as np
import pytest
from helpers.gradients import check_gradients
from helpers.oracles import brute_force, check, is_dropped, same_bits
from helpers.problems import DTYPES, Shape, options

import fastattn
from fastattn.core.dropout import Dropout, philox

RATE, SEED = 0.3, 0xFEDCBA9876543210
DROPOUT = (RATE, SEED)

# Around tiles, blocks and splits of the kernels: many queries, few of a long cache, groups.
SHAPES = {
    "small": Shape(2, 4, 5, 7, 8, kv_heads=2),
    "one query": Shape(1, 2, 1, 5000, 16),
    "a group": Shape(2, 8, 3, 200, 24, kv_heads=2),
    "some": Shape(1, 2, 40, 700, 64),
    "many": Shape(1, 2, 210, 600, 64, kv_heads=1),
}

OPTIONS = [
    ("softcap", "sinks"),
    ("causal", "mask"),
    ("window", "bias", "alibi"),
    ("kv_lengths",),
    ("spans", "-inf"),
    ("relative_bias", "scales"),
    ("-inf distances", "softcap", "scales"),
]


def kept(shape: Shape, offset=(0, 0, 0, 0)) -> np.ndarray:
    """Those that the definition keeps: (batch, heads, queries, keys)."""
    b, h, i, _ = np.ogrid[: shape.batch, : shape.heads, : shape.n_queries, :1]
    b, h, i = (x[..., 0] for x in (b, h, i))
    return Dropout(RATE, SEED, offset).kept(b, h, i, slice(0, shape.n_keys))


# ------------------------------------------------------------------------------- the generator


@pytest.mark.parametrize("rounds, counter, key, words", [
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_known_answers(rounds, counter, key, words):
    """Those of Random123, ``tests/kat_vectors``."""
    counter, key, words = (
        [np.uint64(int(x, 16)) for x in s.split()] for s in (counter, key, words)
    )
    assert philox(counter, key, rounds) == tuple(words)


@pytest.mark.parametrize(
    "offset", [(0, 0, 0, 0), (3, 1, 5, 13), (2**63 - 1, 2**40, 2**33, 2**62 + 5)]
)
def test_the_layout_is_as_documented(offset):
    rates = 1e-5, 0.1, RATE, 0.99999
    b, h, i, j = offset
    for rate in rates:
        found = Dropout(rate, SEED, offset).kept(np.uint64(1), 2, np.arange(3), slice(5, 30))
        for (row, key), keeps in np.ndenumerate(found):
            assert keeps != is_dropped(rate, SEED, b + 1, h + 2, i + row, j + 5 + key)


def test_brute_force_agrees():
    q, k, v = Shape(2, 4, 3, 19, 4, kv_heads=2).arrays("float64")
    out = fastattn.scaled_dot(q, k, v, causal=True, dropout=DROPOUT, backend="reference")
    expected, *_ = brute_force(q, k, v, causal=True, dropout=DROPOUT)
    np.testing.assert_allclose(out, expected, atol=1e-14)


def test_statistics():
    """Of 2**22 weights: the rate, and that of pairs of them, within five standard deviations."""
    shape = Shape(1, 4, 1024, 1024)
    drops = ~kept(shape)
    n = drops.size

    def near(x, p):
        return abs(x.mean() - p) < 5 * np.sqrt(p * (1 - p) / n)

    assert near(drops, RATE)
    other = ~Dropout(RATE, SEED + 1, (0, 0, 0, 0)).kept(
        0, np.arange(4)[:, None], np.arange(1024), slice(0, 1024)
    )
    pairs = [np.roll(drops, shift, axis) for axis in (2, 3) for shift in (1, 2, 8)]
    pairs += [np.roll(drops, 1, axis=1), other[None]]
    assert all(near(drops & pair, RATE**2) for pair in pairs)
    for axis in (2, 3):  # no row or column is special
        z = (drops.mean(axis=axis) - RATE) / np.sqrt(RATE * (1 - RATE) / 1024)
        assert 0.9 < z.std() < 1.1 and np.abs(z).max() < 6


def test_the_mean_is_that_without_dropout():
    q, k, v = Shape(1, 1, 8, 32, 8).arrays("float64")
    outs = [fastattn.scaled_dot(q, k, v, dropout=(0.2, seed)) for seed in range(300)]
    error = np.mean(outs, axis=0) - fastattn.scaled_dot(q, k, v)
    assert np.abs(error / (np.std(outs, axis=0) / np.sqrt(300))).max() < 5


# ----------------------------------------------------------------------------- every backend


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_solves(target, shape, dtype):
    check(target, *shape.arrays(dtype), dropout=DROPOUT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_which_weights(target, shape, dtype):
    """With the unit vectors as values the result is the weights: 0 just where one is dropped."""
    q, k, _ = shape.arrays(dtype)
    n = min(shape.n_keys, 150)
    unit = np.eye(shape.n_keys, n, n - shape.n_keys, dtype=q.dtype)  # of the last keys
    v = np.broadcast_to(unit, (*k.shape[:2], *unit.shape))
    out = target.attend(q, k, v, dropout=DROPOUT, scale=0.1)
    np.testing.assert_array_equal(out != 0, kept(shape)[..., -n:])


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_with_other_options(target, names):
    shape = Shape(2, 4, 70, 300, 16, kv_heads=2)
    check(target, *shape.arrays(), dropout=DROPOUT, return_max=True, **options(names, shape))


def test_one_head_and_more_axes(target):
    q, k, v = Shape(6, 2, 9, 20, 8).arrays()
    out = target.attend(q, k, v, dropout=DROPOUT)
    split = [x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v)]
    same = target.attend(*split, dropout=DROPOUT).reshape(out.shape)
    np.testing.assert_allclose(same, out, atol=1e-6)  # blocks of the batch may differ
    one = target.attend(q[0, 0], k[0, 0], v[0, 0], dropout=DROPOUT)
    np.testing.assert_allclose(one, out[0, 0], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lse_and_weights_are_those_without(target, shape):
    arrays = shape.arrays()
    _, lse, weights = target.attend(*arrays, dropout=DROPOUT, return_lse=True, return_weights=True)
    _, *plain = target.attend(*arrays, return_lse=True, return_weights=True)
    np.testing.assert_allclose(lse, plain[0], atol=1e-6, rtol=1e-6)  # engines may differ
    np.testing.assert_allclose(weights, plain[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rate_of_0_is_none(target, shape):
    arrays = shape.arrays()
    assert same_bits(target.attend(*arrays, dropout=(0, 5)), target.attend(*arrays))


SLICES = {
    "batch": (slice(1, 2), slice(None), slice(None), slice(None)),
    "heads": (slice(None), slice(2, 4), slice(None), slice(None)),
    "queries": (slice(None), slice(None), slice(33, 80), slice(None)),
    "keys": (slice(None), slice(None), slice(None), slice(75, 200)),
    "all": (slice(1, 2), slice(2, 4), slice(5, 9), slice(6, 131)),
}


@pytest.mark.parametrize("where", SLICES.values(), ids=SLICES)
def test_a_slice_drops_what_the_whole_drops(target, where):
    shape = Shape(2, 6, 100, 260, 8, kv_heads=3, value_dim=260)
    q, k, _ = shape.arrays()
    v = np.broadcast_to(np.eye(260, dtype=np.float32), (2, 3, 260, 260))
    b, h, i, j = where
    groups = slice(h.start and h.start // 2, h.stop and h.stop // 2)
    offset = tuple(side.start or 0 for side in where)
    out = target.attend(q[b, h, i], k[b, groups, j], v[b, groups, j, j], dropout=DROPOUT,
                        dropout_offset=offset, scale=0.1)  # fmt: skip
    np.testing.assert_array_equal(out != 0, kept(shape)[where])
    whole = target.attend(q, k, v, dropout=DROPOUT, scale=0.1)
    if target.bitwise and j == i == slice(None):
        assert same_bits(out, whole[where])


def test_offsets_beyond_32_bits(target):
    shape = Shape(1, 2, 20, 40, 8, value_dim=40)
    q, k, _ = shape.arrays()
    v = np.broadcast_to(np.eye(40, dtype=np.float32), (1, 2, 40, 40))
    for offset in ((0, 0, 2**32 - 7, 2**35 - 20), (2**40, 2**50, 2**63 - 1, 2**63 - 1)):
        out = target.attend(q, k, v, dropout=DROPOUT, dropout_offset=offset)
        np.testing.assert_array_equal(out != 0, kept(shape, offset))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_number_of_threads(target, shape):
    arrays = shape.arrays()
    outs = [target.attend(*arrays, dropout=DROPOUT, threads=n) for n in (1, 2, 5)]
    assert all(same_bits(out, outs[0]) for out in outs[1:]) or not target.bitwise


@pytest.mark.parametrize("n_queries", [1, 20, 200])
def test_a_dropped_key_is_still_seen(target, n_queries):
    """A NaN in its value is multiplied by 0; one that is hidden is not."""
    q, k, v = Shape(1, 1, n_queries, 64, 8).arrays()
    v[..., 40, 3] = np.nan
    mask = np.ones((n_queries, 64), bool)
    mask[: n_queries // 2, 40] = False
    out = target.attend(q, k, v, mask=mask, dropout=DROPOUT)
    expected = np.zeros((n_queries, 8), bool)
    expected[n_queries // 2 :, 3] = True
    np.testing.assert_array_equal(np.isnan(out[0, 0]), expected)


def test_rates_near_the_ends(target):
    q, k, v = Shape(1, 1, 30, 64, 8).arrays("float64")
    plain = target.attend(q, k, v)
    np.testing.assert_allclose(target.attend(q, k, v, dropout=(1e-13, 1)), plain, atol=1e-12)
    out = target.attend(q, k, v, dropout=(np.nextafter(1, 0), 1))
    assert not out.any()


# --------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(target, shape, dtype):
    check_gradients(target, *shape.arrays(dtype), dropout=DROPOUT)


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_gradients_with_other_options(target, names):
    shape = Shape(2, 4, 70, 300, 16, kv_heads=2)
    check_gradients(target, *shape.arrays(), dropout=DROPOUT, **options(names, shape))


def test_finite_differences():
    q, k, v = Shape(1, 2, 4, 11, 3).arrays("float64")
    given = {"dropout": DROPOUT, "dropout_offset": (1, 2, 3, 4), "backend": "reference"}
    out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, **given)
    rng = np.random.default_rng(2)
    grad_out = rng.standard_normal(out.shape)
    moves = [rng.standard_normal(x.shape) for x in (q, k, v)]
    slope = sum((g * m).sum() for g, m in zip(pullback(grad_out), moves, strict=True))
    moved = (
        [x + step * m for x, m in zip((q, k, v), moves, strict=True)] for step in (1e-6, -1e-6)
    )
    ends = [fastattn.scaled_dot(*arrays, **given) for arrays in moved]
    assert np.isclose(((ends[0] - ends[1]) * grad_out).sum() / 2e-6, slope, rtol=1e-7)


def test_gradients_of_a_slice(target):
    """Those of slices of the queries sum up to those of the whole."""
    q, k, v = Shape(1, 2, 100, 90, 8).arrays("float64")
    out, pullback = target.vjp(q, k, v, dropout=DROPOUT, q_offset=0)
    whole = pullback(out)
    parts = [
        target.vjp(q[:, :, rows], k, v, dropout=DROPOUT, dropout_offset=(0, 0, rows.start, 0))[1](
            out[:, :, rows]
        )
        for rows in (slice(0, 37), slice(37, 100))
    ]
    np.testing.assert_allclose(np.concatenate([x[0] for x in parts], axis=2), whole[0], atol=1e-12)
    for n in (1, 2):
        np.testing.assert_allclose(parts[0][n] + parts[1][n], whole[n], atol=1e-12)


def test_scaled_dot_backward(target):
    q, k, v = Shape(2, 2, 9, 20, 8).arrays()
    (out, lse), pullback = target.vjp(q, k, v, dropout=DROPOUT, return_lse=True)
    found = fastattn.scaled_dot_backward(
        out, q, k, v, out, lse, dropout=DROPOUT, backend=target.backend
    )
    assert all(same_bits(a, b) for a, b in zip(found, pullback(out), strict=True))


# ------------------------------------------------------------------------------ other functions


@pytest.mark.parametrize(
    "function", [fastattn.cosine, fastattn.gaussian, fastattn.euclidean, fastattn.dot]
)
def test_other_scores(function, monkeypatch):
    """Also where the call is cut into chunks."""
    for name in ("CHUNK_BYTES", "QUERIES", "KEYS"):
        monkeypatch.setattr(f"fastattn.chunks.{name}", 24)
    shape = Shape(3, 4, 40, 60, 5, kv_heads=2)
    q, k, v = shape.arrays("float64")
    out, weights = function(q, k, v, return_weights=True, dropout=DROPOUT)
    used = np.where(kept(shape), weights / (1 - RATE), 0)
    np.testing.assert_allclose(out, used @ np.repeat(v, 2, axis=1), atol=1e-12)
    _, pullback = fastattn.vjp(function, q, k, v, dropout=DROPOUT)
    grad_v = used.swapaxes(-1, -2) @ out
    np.testing.assert_allclose(pullback(out)[2], grad_v[:, ::2] + grad_v[:, 1::2], atol=1e-11)


def test_a_cache():
    q, k, v = Shape(2, 4, 3, 50, 8, kv_heads=2).arrays()
    cache = fastattn.KVCache(2, 2, 8)
    cache.append(k, v)
    found = cache.attend(q, dropout=DROPOUT, causal=False)
    np.testing.assert_allclose(found, fastattn.scaled_dot(q, k, v, dropout=DROPOUT), atol=1e-6)


def test_a_sparse_mask():
    sparse = pytest.importorskip("scipy.sparse")
    q, k, v = Shape(2, 4, 30, 40, 8, kv_heads=2).arrays("float64")
    mask = np.random.default_rng(1).random((30, 40)) < 0.3
    results = []
    for given in (mask, sparse.csr_array(mask)):
        out, pullback = fastattn.vjp(
            fastattn.scaled_dot, q, k, v, mask=given, dropout=DROPOUT, dropout_offset=(1, 2, 3, 4)
        )
        results.append((out, *pullback(out)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_packed_sequences():
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((60, heads, 8)) for heads in (4, 2, 2))
    starts, starts_k = [0, 13, 20, 60], [0, 30, 33, 60]
    out = fastattn.varlen(q, k, v, starts, starts_k, causal=True, dropout=DROPOUT)
    for n in range(3):
        i, j = slice(*starts[n : n + 2]), slice(*starts_k[n : n + 2])
        own = fastattn.scaled_dot(
            *(x.swapaxes(0, 1) for x in (q[i], k[j], v[j])),
            causal=True, dropout=DROPOUT, dropout_offset=(0, 0, i.start, j.start),
        )  # fmt: skip
        np.testing.assert_allclose(out[i].swapaxes(0, 1), own, atol=1e-12)


def test_forward_mode():
    arrays = Shape(1, 2, 6, 11, 4).arrays("float64")
    moves = [np.random.default_rng(4).standard_normal(x.shape) for x in arrays]
    _, tangent = fastattn.jvp(fastattn.scaled_dot, arrays, moves, dropout=DROPOUT)
    ends = [
        fastattn.scaled_dot(
            *(x + step * m for x, m in zip(arrays, moves, strict=True)), dropout=DROPOUT
        )
        for step in (1e-6, -1e-6)
    ]
    np.testing.assert_allclose(tangent, (ends[0] - ends[1]) / 2e-6, atol=1e-8)


def test_weight_maps_refuse_it():
    q, k, _ = Shape().arrays()
    for call in (fastattn.key_importance, lambda *a, **o: fastattn.top_keys(*a, 2, **o)):
        with pytest.raises(TypeError, match=r"^dropout: "):
            call(q, k, dropout=DROPOUT)
