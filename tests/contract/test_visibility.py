"""Which keys a query sees (contract, section 1)."""

import itertools

import numpy as np
import pytest
from helpers.oracles import brute_force, check
from helpers.problems import INTERVAL_OPTIONS, Shape, options

from fastattn import reference
from fastattn.core.problem import make_problem

NAMES = (*INTERVAL_OPTIONS, "mask", "-inf")
COMBINATIONS = [names for n in range(len(NAMES) + 1) for names in itertools.combinations(NAMES, n)]
# With enough dims, and queries for each key head, that AMX multiplies float32 in parts.
SHAPE = Shape(3, 12, 11, 17, 64, kv_heads=1)
CAUSAL_SHAPE = Shape(2, 4, 40, 70, 64, kv_heads=1)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_reference_sees_what_the_contract_says(names):
    """reference.py against plain loops over the contract's text."""
    shape = Shape(2, 2, 3, 5, 1, kv_heads=1)
    q, k, v = shape.arrays("float64")
    for seed in range(8):
        opts = options(names, shape, seed)
        exact = reference.attend(make_problem(q, k, v, **opts))
        for got, wanted in zip(exact, brute_force(q, k, v, **opts), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_combinations(target, names):
    """A query sees the keys for which all that is given holds."""
    check(target, *SHAPE.arrays(), **options(names, SHAPE, seed=COMBINATIONS.index(names)))


@pytest.mark.parametrize("seed", range(20))
def test_interval_options_on_many_tiles(target, seed):
    shape = Shape(2, 2, 130, 600, 8, kv_heads=1)
    rng = np.random.default_rng(seed)
    names = [name for name in INTERVAL_OPTIONS if rng.random() < 0.5]
    check(target, *shape.arrays(), **options(names, shape, seed))


@pytest.mark.parametrize("q_offset", [None, 0, 1, 30, -1, -39, -40, -41, 69, 70, 10**6, -(10**6)])
def test_causal(target, q_offset):
    """``j <= i + q_offset``; the default is bottom-right, and any offset may be given."""
    check(target, *CAUSAL_SHAPE.arrays(), causal=True, q_offset=q_offset)


def test_causal_defaults_to_bottom_right(target):
    q, k, v = CAUSAL_SHAPE.arrays()
    default, explicit = (target.attend(q, k, v, causal=True, **o) for o in ({}, {"q_offset": 30}))
    np.testing.assert_array_equal(default, explicit)
    last = target.attend(q[:, :, -1:], k, v)
    np.testing.assert_allclose(default[:, :, -1:], last, atol=1e-5)  # sees all keys


@pytest.mark.parametrize("shape", [Shape(6, 4, 70, 40), Shape(6, 4, 1, 50), Shape(6, 4, 50, 1)])
@pytest.mark.parametrize("q_offset", [None, 0])
def test_causal_of_unequal_lengths(target, shape, q_offset):
    check(target, *shape.arrays(), causal=True, q_offset=q_offset)


@pytest.mark.parametrize(
    "window",
    [0, 1, 5, 1000, (0, 0), (3, 0), (0, 3), (None, 2), (2, None), (None, None), [4, 1],
     np.int64(3), (10**30, 0), (2**63 - 1, 2**63 - 1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("q_offset", [None, 0, -50])
def test_window(target, window, q_offset):
    """``i + q_offset - left <= j <= i + q_offset + right``; None is unbounded, w is (w, w)."""
    check(target, *CAUSAL_SHAPE.arrays(), window=window, q_offset=q_offset)


def test_window_as_int_is_both_sides(target):
    q, k, v = CAUSAL_SHAPE.arrays()
    one, two = (target.attend(q, k, v, window=w) for w in (5, (5, 5)))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("lengths", [[0, 70], [1, 69], [33, 16], 20, [[7], [8]], np.uint8([3, 4])])
def test_kv_lengths(target, lengths):
    """``j < kv_lengths``, broadcast to the leading axes."""
    q, k, v = CAUSAL_SHAPE.arrays()
    if np.ndim(lengths) == 2:
        q, k, v = (np.stack([x, x + 1], axis=1) for x in (q, k, v))
    check(target, q, k, v, kv_lengths=lengths)


@pytest.mark.parametrize("cache", [True, False])
def test_kv_lengths_with_causal(target, cache):
    """The two choices that the contract names: a cache and a padded batch."""
    lengths = np.array([45, 70])
    offset = lengths - 40 if cache else 0
    check(target, *CAUSAL_SHAPE.arrays(), kv_lengths=lengths, causal=True, q_offset=offset)


@pytest.mark.parametrize(
    "spans",
    [(0, 70), (10, 20), (20, 10), (-5, 1000), (-(2**62), 2**62), (0, 0),
     (np.arange(40), np.arange(40) + 3), (0, np.arange(80).reshape(2, 40, 1)[:, None, :, 0])],
    ids=range(8),
)  # fmt: skip
def test_spans(target, spans):
    """``start[i] <= j < stop[i]``, clipped to 0..n_keys, broadcast to (..., heads, queries)."""
    check(target, *CAUSAL_SHAPE.arrays(), spans=spans)


def test_spans_per_head_with_grouped_heads(target):
    shape = Shape(2, 6, 30, 50, 8, kv_heads=2)
    start = np.arange(6)[:, None] * 7
    check(target, *shape.arrays(), spans=(start, start + np.arange(30)))


@pytest.mark.parametrize("shape", [(), (70,), (40, 1), (40, 70), (4, 1, 70), (2, 1, 1, 70)])
def test_mask_broadcasts(target, shape):
    mask = np.asarray(np.random.default_rng(5).random(shape) < 0.6)
    check(target, *CAUSAL_SHAPE.arrays(), mask=mask)


NOTHING_SEEN = {
    "mask": {"mask": np.zeros((11, 17), bool)},
    "causal": {"causal": True, "q_offset": -11},
    "window": {"window": (0, 0), "q_offset": 17},
    "kv_lengths": {"kv_lengths": 0},
    "spans": {"spans": (5, 5)},
    "reversed spans": {"spans": (9, 3)},
    "bias": {"bias": np.full(17, -np.inf)},
    "disjoint": {"spans": (9, 17), "kv_lengths": 8},
}


@pytest.mark.parametrize("options", NOTHING_SEEN.values(), ids=NOTHING_SEEN)
def test_query_that_sees_no_key(target, options):
    """``out = 0``, ``lse = -inf``."""
    q, k, v = SHAPE.arrays()
    out, lse = target.attend(q, k, v, return_lse=True, **options)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("options", NOTHING_SEEN.values(), ids=NOTHING_SEEN)
def test_query_that_sees_no_key_has_no_weights(target, options):
    *_, weights = target.attend(*SHAPE.arrays(), return_weights=True, **options)
    np.testing.assert_array_equal(weights, 0)


BLOCKS = {
    "first": [(0, 512)], "middle": [(512, 1024)], "last": [(1024, 1600)],
    "all but the last key": [(0, 1599)], "all but the first": [(1, 1600)],
    "every other strip": [(n, n + 64) for n in range(0, 1600, 128)],
}  # fmt: skip


@pytest.mark.parametrize("rows", ["all", "some"])
@pytest.mark.parametrize("by", ["mask", "bias", "bias beside alibi and sinks"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("n_queries", [1, 3, 100])
def test_unseen_blocks(target, n_queries, blocks, by, rows):
    """Whole blocks of keys hidden: first, middle, last, from all queries or from every third."""
    q, k, v = Shape(2, 2, n_queries, 1600, 8, kv_heads=1).arrays()
    seen = np.ones((n_queries, 1600), bool)
    for first, last in blocks:
        seen[:: 3 if rows == "some" else 1, first:last] = False
        if rows == "all":
            k[:, :, first:last] = np.nan
            v[:, :, first:last] = np.inf
    if by == "mask":
        out, _ = check(target, q, k, v, mask=seen)
    else:
        options = {} if by == "bias" else {"alibi": [0.1, 0.01], "sinks": [1.0, -2.0]}
        out, _ = check(target, q, k, v, bias=np.where(seen, 0, -np.inf), **options)
    assert np.isfinite(out).all()


def test_some_queries_see_no_key(target):
    """Empty rows among others, in the same tile."""
    spans = np.zeros(40, int), np.where(np.arange(40) % 3 == 0, 0, 9)
    out, lse = check(target, *CAUSAL_SHAPE.arrays(), spans=spans)
    np.testing.assert_array_equal(out[:, :, ::3], 0)
    np.testing.assert_array_equal(lse[:, :, ::3], -np.inf)


def test_one_key_seen(target):
    """The softmax of one score is 1: the result is that key's value."""
    q, k, v = CAUSAL_SHAPE.arrays()
    j = np.arange(40) + 7
    out, _ = check(target, q, k, v, spans=(j, j + 1))
    wanted = np.broadcast_to(v[:, :, j], out.shape)
    np.testing.assert_allclose(out, wanted, rtol=2 * np.finfo(np.float32).eps)
