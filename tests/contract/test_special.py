"""NaN and Inf, seen and hidden (contract, section 1, "Result")."""

import numpy as np
import pytest
from helpers.hiding import HIDING, KEY, POISON
from helpers.oracles import check
from helpers.problems import Shape

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem

# More than one tile both ways, with ragged ends; key 40 is seen by some queries and not by others.
SHAPE = Shape(2, 4, 70, 90, 64, kv_heads=2)
LONG = Shape(1, 2, 5, 1200, 16, kv_heads=1)


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("where", ["k", "v", "both"])
@pytest.mark.parametrize("hiding", HIDING)
def test_unseen_key_touches_nothing(target, hiding, where, poison):
    """Whatever is in its k or v, and whatever other queries see."""
    options = HIDING[hiding]
    q, k, v = SHAPE.arrays()
    p = make_problem(q, k, v, **options)
    sees = np.broadcast_to(reference.visible(p)[..., KEY], p.rows())
    clean, clean_lse = target.attend(q, k, v, return_lse=True, **options)
    if where in ("k", "both"):
        k[:, :, KEY, 3] = poison
    if where in ("v", "both"):
        v[:, :, KEY, 5] = poison
    out, lse = check(target, q, k, v, **options)
    assert sees.any() and not sees.all()
    eps = 16 * np.finfo(np.float32).eps  # the order of the sums may differ, their terms may not
    np.testing.assert_allclose(out[~sees], clean[~sees], rtol=eps, atol=eps)
    np.testing.assert_allclose(lse[~sees], clean_lse[~sees], rtol=eps, atol=eps)
    assert not np.isfinite(out[sees][..., 5]).all()


def test_reference_leaves_unseen_keys_out():
    """The oracle of the test above, against itself without the poison."""
    q, k, v = SHAPE.arrays("float64")
    for options in HIDING.values():
        p = make_problem(q, k, v, **options)
        sees = reference.visible(p)[..., KEY]
        clean = reference.attend(p)[0]
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[:, :, KEY], bad_v[:, :, KEY] = np.nan, np.inf
        got = reference.attend(make_problem(q, bad_k, bad_v, **options))[0]
        np.testing.assert_allclose(got[~sees], clean[~sees], rtol=1e-12, atol=1e-13)
        assert np.isnan(got[sees]).all()


@pytest.mark.parametrize("n_queries", [1, 3, 40])
def test_padding_full_of_nan(target, n_queries):
    """Uninitialised memory behind ``kv_lengths``, in a cache and in a padded batch."""
    q, k, v = Shape(3, 4, n_queries, 700, 16, kv_heads=2).arrays()
    lengths = np.array([0, 37, 513])
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.nan
    out, _ = check(target, q, k, v, kv_lengths=lengths)
    assert np.isfinite(out).all()
    check(target, q, k, v, kv_lengths=lengths, causal=True, q_offset=lengths - n_queries)


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_unseen_bias_touches_nothing(target, poison):
    q, k, v = SHAPE.arrays()
    bias = np.zeros((70, 90), np.float32)
    bias[np.triu_indices(70, 1, 90)] = poison
    out, _ = check(target, q, k, v, bias=bias, causal=True, q_offset=0)
    assert np.isfinite(out).all()
    out, _ = check(target, q, k, v, bias=bias, mask=np.tri(70, 90, dtype=bool))
    assert np.isfinite(out).all()


def test_queries_that_see_nothing_of_nan(target):
    """``out = 0``, ``lse = -inf``, even where every k, v and q is NaN."""
    nan = [np.full_like(x, np.nan) for x in SHAPE.arrays()]
    out, lse = target.attend(*nan, kv_lengths=0, return_lse=True)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_weights_of_unseen_keys_are_zero(target):
    q, k, v = SHAPE.arrays()
    k[:, :, KEY:] = np.nan
    _, weights = target.attend(q, k, v, kv_lengths=KEY, return_weights=True)
    np.testing.assert_array_equal(weights[..., KEY:], 0)
    q[:, :, 3] = np.nan
    _, weights = target.attend(q, k, v, kv_lengths=KEY, return_weights=True)
    np.testing.assert_array_equal(weights[..., KEY:], 0)
    assert np.isnan(weights[:, :, 3, :KEY]).all()


# ------------------------------------------------------------------------------ what is seen


@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=["many queries", "few queries"])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
class TestSeen:
    """It acts as the formula says, and other rows are untouched."""

    def test_nan_in_q(self, target, shape, options):
        """Makes its row NaN."""
        q, k, v = shape.arrays()
        q[0, 1, 3, 7] = np.nan
        out, lse = check(target, q, k, v, **options)
        hit = np.zeros(lse.shape, bool)
        hit[0, 1, 3] = True
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(hit[..., None], out.shape))
        np.testing.assert_array_equal(np.isnan(lse), hit)

    def test_nan_in_k(self, target, shape, options):
        """Makes NaN of the rows that see it."""
        q, k, v = shape.arrays()
        j = shape.n_keys - 2  # that the last query and the last but one see
        k[0, 0, j, 7] = np.nan
        out, lse = check(target, q, k, v, **options)
        sees = reference.visible(make_problem(q, k, v, **options))[..., j]
        sees[1:] = False
        sees[:, shape.heads // shape.kv_heads :] = False
        np.testing.assert_array_equal(np.isnan(lse), sees)
        np.testing.assert_array_equal(np.isnan(out).all(axis=-1), sees)

    @pytest.mark.parametrize("poison", POISON, ids=str)
    def test_in_v(self, target, shape, options, poison):
        """Goes to its own column of the rows that see it."""
        q, k, v = shape.arrays()
        j = shape.n_keys - 2
        v[0, 0, j, 7] = poison
        out, lse = check(target, q, k, v, **options)
        sees = reference.visible(make_problem(q, k, v, **options))[..., j]
        sees[1:] = False
        sees[:, shape.heads // shape.kv_heads :] = False
        np.testing.assert_array_equal(out[sees][:, 7], poison)
        out[sees, 7] = 0
        assert np.isfinite(out).all() and np.isfinite(lse).all()

    def test_opposite_infinities_in_v(self, target, shape, options):
        """Inf minus Inf is NaN, in that column alone."""
        q, k, v = shape.arrays()
        v[:, :, 0, 2], v[:, :, 1, 2] = np.inf, -np.inf
        out, _ = check(target, q, k, v, **options)
        assert np.isnan(out[:, :, -1, 2]).all()
        assert np.isfinite(np.delete(out, 2, axis=-1)).all()

    @pytest.mark.parametrize("poison", [np.inf, -np.inf], ids=str)
    def test_inf_in_k(self, target, shape, options, poison):
        """A score of -inf has the weight 0, one of +inf makes the row NaN and its lse +inf."""
        q, k, v = shape.arrays()
        j = shape.n_keys - 2
        k[0, 0, j, 7] = poison
        _, lse = check(target, q, k, v, **options)
        assert np.isposinf(lse).any()
        assert np.isfinite(lse[0, 0]).any()

    @pytest.mark.parametrize("poison", [np.inf, -np.inf], ids=str)
    def test_inf_in_q(self, target, shape, options, poison):
        q, k, v = shape.arrays()
        q[0, 1, 3, 7] = poison
        out, _ = check(target, q, k, v, **options)
        assert np.isnan(out[0, 1, 3]).all()
        assert np.isnan(out).sum() == shape.head_dim

    @pytest.mark.parametrize("scale", [np.inf, -np.inf], ids=str)
    def test_infinite_scale(self, target, shape, options, scale):
        """Multiplies the sum of products, whose terms may differ in sign."""
        scales = np.where(np.arange(shape.heads) % 2 == 0, scale, 1)
        out, lse = check(target, *shape.arrays(), scale=scales, **options)
        assert np.isnan(lse).sum() == 0
        assert np.isnan(out).any()

    @pytest.mark.parametrize("scale", [np.inf, -np.inf], ids=str)
    def test_infinite_scale_under_a_softcap(self, target, shape, options, scale):
        options = {"scale": scale, "softcap": 1.5, "return_lse": True, **options}
        out, lse = target.attend(*shape.arrays(), **options)
        wanted = fastattn.scaled_dot(*shape.arrays(), backend="reference", **options)
        # A second run of a row takes scores relative to one that is up to 32 above the largest.
        for got, expected in zip((out, lse), wanted, strict=True):
            np.testing.assert_allclose(got, expected, atol=32 * np.finfo(np.float32).eps)

    @pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
    def test_in_bias(self, target, shape, options, poison):
        """Makes its row NaN, and no other."""
        bias = np.zeros((shape.n_queries, shape.n_keys), np.float32)
        bias[3, 4] = poison
        out, _ = check(target, *shape.arrays(), bias=bias, **options)
        assert np.isnan(out[:, :, 3]).all()
        assert np.isfinite(np.delete(out, 3, axis=2)).all()


@pytest.mark.parametrize("n_queries", [1, 40])
def test_every_seen_score_minus_infinity(target, n_queries):
    """``exp(-inf - -inf)`` is NaN: a score of -inf is not an hidden key."""
    shape = Shape(1, 1, n_queries, 30, 4)
    q, k, v = (np.abs(x) + 1 for x in shape.arrays())
    out, lse = check(target, q, np.full_like(k, -np.inf), v)
    assert np.isnan(out).all()
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("sink", [np.nan, np.inf], ids=str)
def test_sinks_that_are_not_finite(target, sink):
    """A sink of +inf takes all the weight, one of NaN makes the head NaN."""
    sinks = np.array([0, sink, 0, 0])
    out, lse = check(target, *SHAPE.arrays(), sinks=sinks)
    assert np.isfinite(np.delete(out, 1, axis=1)).all()
    np.testing.assert_array_equal(lse[:, 1], sink)
    np.testing.assert_array_equal(out[:, 1], 0 if sink > 0 else np.nan)


def test_weights_beside_an_infinite_score(target):
    """An infinite score weighs NaN, as Inf - Inf does, and the others nothing."""
    q, k, v = SHAPE.arrays()
    k[..., 2, 0] = np.inf
    check(target, q, k, v, return_weights=True)
