"""Numbers at the ends of their range; no call warns (contract, section 1, "Result")."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from helpers.oracles import assert_solves, check
from helpers.problems import Shape

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 70, 90, 64, kv_heads=2)


@pytest.mark.parametrize("bias_dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
class TestLeastNumber:
    """Only -inf excludes: ``np.finfo(dtype).min`` is a number."""

    def test_row_of_nothing_else(self, target, dtype, bias_dtype):
        """Is the softmax of equal scores, not NaN and not 0."""
        q, k, v = SHAPE.arrays(dtype)
        q *= 0
        bias = np.zeros((70, 90), bias_dtype)
        bias[5:50] = np.finfo(bias_dtype).min
        out, weights = check(target, q, k, v, return_lse=False, return_weights=True, bias=bias)
        np.testing.assert_allclose(weights.astype(np.float64), 1 / 90, rtol=4 * np.finfo(dtype).eps)
        mean = v.astype(np.float64).mean(axis=-2, keepdims=True).repeat(2, axis=1)
        np.testing.assert_allclose(
            out.astype(np.float64),
            np.broadcast_to(mean, out.shape),
            atol=4 * np.finfo(dtype).eps * np.abs(mean).max(),
        )

    def test_among_others(self, target, dtype, bias_dtype):
        """Has no weight beside scores of ordinary size."""
        q, k, v = SHAPE.arrays(dtype)
        bias = np.zeros((70, 90), bias_dtype)
        bias[:, 33:] = np.finfo(bias_dtype).min
        results = check(target, q, k, v, bias=bias)
        assert_solves(results, make_problem(q, k, v, return_lse=True, kv_lengths=33))

    def test_in_causal_rows(self, target, dtype, bias_dtype):
        """As the attention masks of model libraries are made: triangular, plus whole rows."""
        bias = np.triu(np.full((90, 90), np.finfo(bias_dtype).min), 1)
        bias[:7] = np.finfo(bias_dtype).min
        shape = SHAPE._replace(n_queries=90)
        out = check(target, *shape.arrays(dtype), return_lse=False, bias=bias)
        assert np.isfinite(out.astype(np.float64)).all()


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("bias_dtype", ["float32", "float64"])
def test_greatest_number_as_bias(target, bias_dtype):
    """One finite bias above all takes all the weight."""
    q, k, v = SHAPE.arrays()
    bias = np.zeros((70, 90), bias_dtype)
    bias[:, 33] = np.finfo(bias_dtype).max / 2
    out = target.attend(q, k, v, bias=bias)
    np.testing.assert_array_equal(out, np.broadcast_to(v[:, :, 33:34].repeat(2, axis=1), out.shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_queries, batch", [(1500, 2), (5, 200)])
def test_scores_of_ten_thousand(target, n_queries, batch, dtype):
    """Of both signs, in one row; near ties are rare, so it takes many rows to judge the error."""
    q, k, v = Shape(batch, 4, n_queries, 90, 16, kv_heads=2).arrays(dtype)
    p = make_problem(q, k, v)
    scale = p.scale * 1e4 / np.abs(reference.scores(p)).max()
    out, _ = check(target, q, k, v, scale=scale)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("size", [1e4, -1e4, 2.9e38, -2.9e38, 1e-38], ids=str)
@pytest.mark.parametrize("n_queries", [1, 50])
def test_equal_scores_of_any_size(target, size, n_queries):
    """The softmax of equal scores is the mean; in base 2, 2.9e38 would overflow float32."""
    _, _, v = Shape(1, 2, 1, 600, 1, value_dim=8).arrays()
    root = abs(size) ** 0.5
    q = np.full((1, 2, n_queries, 1), root, np.float32)
    k = np.full((1, 2, 600, 1), np.copysign(root, size), np.float32)
    check(target, q, k, v, scale=1)


@pytest.mark.parametrize("n_queries", [1, 50])
def test_scores_from_end_to_end(target, n_queries):
    """From -2.9e38 to 2.9e38 in one row: their difference is no float32."""
    _, _, v = Shape(1, 2, 1, 600, 1, value_dim=8).arrays()
    root = np.float32(2.9e38**0.5)
    q = np.full((1, 2, n_queries, 1), root)
    k = np.linspace(-root, root, 600, dtype=np.float32)[:, None]
    for keys in (k, k[::-1], -np.abs(k)):
        check(target, q, keys, v, scale=1)


@pytest.mark.one_instruction_set  # they become floats where arguments are checked
@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize(
    "number, same",
    [(Fraction(3, 4), 0.75), (2**70, 2.0**70), (10**400, np.finfo("f8").max)],
    ids=["3/4", "2**70", "10**400"],
)
def test_python_numbers_of_any_size(target, name, number, same):
    q, k, v = Shape(1, 2, 3, 5, 4).arrays("float64")
    expected = target.attend(q, k, v, **{name: same})
    np.testing.assert_array_equal(target.attend(q, k, v, **{name: number}), expected)


@pytest.mark.parametrize("size, dtype", [(3e19, "float32"), (1e154, "float64")])
@pytest.mark.parametrize("n_queries", [1, 5, 40])
def test_products_that_overflow_under_a_softcap(target, n_queries, size, dtype):
    """They have the sign of the sum, whatever its terms overflow to; a score of Inf is finite."""
    q, k, v = Shape(2, 2, n_queries, 90, 16).arrays(dtype)
    far = tuple(x * x.dtype.type(size) for x in (q, k))
    q[0, 0, 0, 3], k[1, 1, 5, 2] = np.inf, -np.inf
    for pair in (far, (q, k)):
        out, lse = target.attend(*pair, v, softcap=2.0, return_lse=True)
        wanted = fastattn.scaled_dot(*pair, v, softcap=2.0, return_lse=True, backend="reference")
        # A second run of a row takes scores relative to one that is up to 32 above the largest.
        for got, expected in zip((out, lse), wanted, strict=True):
            np.testing.assert_allclose(got, expected, atol=32 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n_queries", [1, 40])
def test_maximum_of_scores_that_overflow_below_a_sink(target, n_queries):
    q, k, v = Shape(1, 2, n_queries, 30, 8).arrays()
    most = np.finfo(np.float32).max
    q[...], k[...] = most, -most
    _, row_max = target.attend(q, k, v, sinks=[0.0, 1.0], return_max=True)
    np.testing.assert_array_equal(row_max, -most)


def test_scale_that_brings_the_score_into_range(target):
    """The sum over head_dim alone would overflow."""
    q, k, v = (x * np.float32(f) for x, f in zip(SHAPE.arrays(), (1e19, 1e19, 1), strict=True))
    out, lse = check(target, q, k, v, scale=1e-38 / SHAPE.head_dim**0.5)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("slope", [1e4, 1e30])
def test_steep_alibi(target, slope):
    """All the weight is on the query's own place."""
    shape = Shape(1, 1, 40, 40, 8)
    q, k, v = shape.arrays()
    np.testing.assert_array_equal(target.attend(q, k, v, alibi=[slope]), v)


# ------------------------------------------------------------------------------ no call warns

WARNING = {
    "nothing seen": {"kv_lengths": 0},
    "sinks of -inf": {"kv_lengths": 0, "sinks": np.full(4, -np.inf)},
    "bias of -inf": {"bias": np.full((70, 90), -np.inf)},
    "bias out of range": {"bias": np.full((70, 90), 1e300)},
    "softcap": {"softcap": 1e-30},
    "alibi": {"alibi": np.full(4, 1e300)},
    "sinks out of range": {"sinks": np.full(4, 1e300)},
    "scale": {"scale": 1e300},
    "subnormal options": {
        "relative_bias": np.full((4, 3), 1e-310),
        "alibi": np.full(4, 1e-310),
        "sinks": np.full(4, 1e-310),
    },
    "weights": {"return_weights": True},
    "nothing else": {},
}


@pytest.mark.parametrize("extreme", [1.0, 3e38, 1e-40, np.nan, np.inf], ids=str)
@pytest.mark.parametrize("options", WARNING.values(), ids=WARNING)
def test_no_call_warns(target, options, extreme):
    """Nor raises, whatever `numpy.seterr` says: it is no argument of the function."""
    q, k, v = SHAPE.arrays()
    with np.errstate(over="ignore"):
        q, k, v = q * np.float32(extreme), k * np.float32(extreme), v * np.float32(extreme)
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        target.attend(q, k, v, return_lse=True, **options)
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        target.attend(q, k, v, return_lse=True, **options)
        assert np.geterr()["over"] == "warn"
