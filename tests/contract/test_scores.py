"""The score of a query and a key: scale, softcap, bias, alibi, sinks (contract, section 1)."""

import itertools

import numpy as np
import pytest
from helpers.oracles import assert_exact_enough, brute_force, check
from helpers.problems import SCORE_OPTIONS, Shape, options

from fastattn import reference
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 9, 13, 8, kv_heads=2)
COMBINATIONS = [
    names
    for n in range(len(SCORE_OPTIONS) + 1)
    for names in itertools.combinations(SCORE_OPTIONS, n)
]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_reference_follows_the_formula(names):
    """reference.py against plain loops over the contract's text."""
    shape = Shape(2, 2, 3, 4, 2, kv_heads=1)
    q, k, v = shape.arrays("float64")
    opts = options(names, shape)
    exact = reference.attend(make_problem(q, k, v, **opts))
    for got, wanted in zip(exact, brute_force(q, k, v, **opts), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_score_options(target, names, dtype):
    """Every mixture of score options, in the contract's order of steps."""
    opts = options(names, SHAPE, seed=COMBINATIONS.index(names))
    check(target, *SHAPE.arrays(dtype), **opts)


def test_scale_defaults_to_one_over_root_of_head_dim(target):
    q, k, v = SHAPE.arrays()
    default, explicit = target.attend(q, k, v), target.attend(q, k, v, scale=8**-0.5)
    np.testing.assert_array_equal(default, explicit)


@pytest.mark.parametrize("scale", [0, -1.5, 3, np.float32(0.5), np.array(2.0)], ids=repr)
def test_scale_is_any_real_number(target, scale):
    check(target, *SHAPE.arrays(), scale=scale)


def test_softcap_bounds_the_score(target):
    """``c * tanh(s / c)`` never passes c, so no weight is more than exp(2 c) times another."""
    q, k, v = SHAPE.arrays()
    _, weights = target.attend(q * 100, k, v, softcap=0.5, return_weights=True)
    ratio = weights.max(axis=-1) / weights.min(axis=-1)
    assert ratio.max() <= np.exp(1) * (1 + 1e-5)  # rounding of float32
    check(target, q * 100, k, v, softcap=0.5)


def test_bias_comes_after_softcap(target):
    """A bias is not capped: step 3 follows step 2."""
    q, k, v = SHAPE.arrays()
    bias = np.zeros(SHAPE.n_keys, np.float32)
    bias[3] = 40
    out, _ = check(target, q, k, v, softcap=1.0, bias=bias)
    v3 = np.repeat(v[:, :, 3:4], 2, axis=1)
    assert_exact_enough(out, np.broadcast_to(v3, out.shape).astype(float), out, out.dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (13,),
        (9, 1),
        (9, 13),
        (4, 1, 13),
        (4, 9, 13),
        (2, 1, 1, 1),
        (2, 1, 9, 13),
        (1, 4, 1, 13),
    ],
    ids=str,
)
def test_bias_broadcasts(target, shape):
    bias = np.random.default_rng(3).standard_normal(shape)
    check(target, *SHAPE.arrays(), bias=bias)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", ">f4", "float64", "longdouble", "int8", "uint64"]
)
@pytest.mark.parametrize("inputs", ["float32", "float64"])
def test_bias_of_any_real_dtype(target, dtype, inputs):
    """``bias`` may have any real dtype and does not change that of the result."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    bias = np.random.default_rng(3).integers(0, 5, (9, 13)).astype(dtype)
    check(target, *SHAPE.arrays(inputs), bias=bias)


@pytest.mark.parametrize("q_offset", [None, 0, 4, -3, 100, [1, -2]], ids=str)
def test_alibi_measures_from_q_offset(target, q_offset):
    """``s -= alibi[h] * abs(i + q_offset - j)``."""
    check(target, *SHAPE.arrays(), alibi=[0.5, 0.25, 0.125, 0.0625], q_offset=q_offset)


@pytest.mark.parametrize("q_offset", [2**24 + 1000, 2**25, -(2**25)])
def test_alibi_far_away(target, q_offset):
    """Where float32 has not every whole number."""
    check(target, *Shape(1, 2, 40, 200, 16).arrays(), alibi=[0.03, 0.25], q_offset=q_offset)


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_alibi_and_sinks_of_any_real_dtype(target, dtype):
    slopes = np.array([0, 1, 2, 3], dtype)
    check(target, *SHAPE.arrays(), alibi=slopes)
    check(target, *SHAPE.arrays(), sinks=slopes)


def test_sink_is_a_logit_without_a_value(target):
    """The weights of the keys sum to ``1 - exp(sinks - lse)``."""
    q, k, v = SHAPE.arrays()
    sinks = np.array([-1.0, 0.0, 2.0, 5.0])
    out, lse = check(target, q, k, np.ones_like(v), sinks=sinks)
    rest = 1 - np.exp(sinks[:, None] - lse)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(out[..., 0], rest, atol=4 * eps * np.abs(lse).max())


def test_sink_of_minus_infinity_is_none(target):
    q, k, v = SHAPE.arrays()
    _out, lse = check(target, q, k, v, sinks=np.full(4, -np.inf))
    np.testing.assert_array_equal(np.isfinite(lse), True)


def test_sinks_alone(target):
    """A query that sees no key: ``lse = sinks[h]``, out 0."""
    q, k, v = SHAPE.arrays()
    sinks = np.array([-1e4, -1.0, 2.0, 1e4])
    out, lse = target.attend(q, k, v, sinks=sinks, kv_lengths=[0, 13], return_lse=True)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_allclose(lse[0], np.broadcast_to(sinks[:, None], (4, 9)), rtol=1e-6)


def test_weights(target):
    """``weights[i, j] = exp(s_ij - lse_i)``, in the promoted dtype, after ``lse``."""
    check(target, *SHAPE.arrays(), return_weights=True)
    check(target, *SHAPE.arrays(), return_lse=False, return_weights=True)
    _, weights = target.attend(*SHAPE.arrays(), return_weights=True)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=13 * np.finfo(np.float32).eps)


def test_order_of_return(target):
    """``out``, then ``lse`` where asked, then ``weights``."""
    q, k, v = SHAPE.arrays()
    assert isinstance(target.attend(q, k, v), np.ndarray)
    out, lse = target.attend(q, k, v, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 4, 9, 8), (2, 4, 9))
    out, weights = target.attend(q, k, v, return_weights=True)
    assert (out.shape, weights.shape) == ((2, 4, 9, 8), (2, 4, 9, 13))
    out, lse, weights = target.attend(q, k, v, return_lse=True, return_weights=True)
    assert (lse.shape, weights.shape) == ((2, 4, 9), (2, 4, 9, 13))


# ------------------------------------------------------------- a scale for each head, relative bias


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1), (5, 5), (1, 1)])
@pytest.mark.parametrize("names", [(), ("softcap",), ("bias", "sinks"), ("alibi",)], ids="+".join)
def test_scale_of_each_head(target, names, heads, kv_heads):
    shape = SHAPE._replace(heads=heads, kv_heads=kv_heads, n_queries=70, n_keys=150)
    opts = options(names, shape)
    opts["scale"] = np.linspace(-1, 2, heads)
    check(target, *shape.arrays(), **opts)


def test_scale_of_each_head_of_the_result(target):
    """A head axis of q that broadcasts has the scales of what it becomes."""
    q, k, v = SHAPE.arrays()
    check(target, q[:, :1], k, v, scale=[0.5, 2.0])


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("dtype", ["float16", "float64", "longdouble", "int8"])
def test_scale_of_any_real_dtype(target, dtype):
    check(target, *SHAPE.arrays(), scale=np.arange(4).astype(dtype))


@pytest.mark.parametrize("reach", [0, 1, 7, 40, 300])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (3, 1), (17, 1)])
@pytest.mark.parametrize("n_queries, n_keys", [(1, 200), (5, 70), (130, 90)])
def test_relative_bias(target, n_queries, n_keys, heads, kv_heads, reach):
    """``s += relative_bias[h, clip(j - (i + q_offset), -R, R) + R]``."""
    shape = Shape(2, heads, n_queries, n_keys, 8, kv_heads=kv_heads)
    bias = 2 * np.random.default_rng(reach).standard_normal((heads, 2 * reach + 1))
    check(target, *shape.arrays(), relative_bias=bias)


@pytest.mark.parametrize("q_offset", [0, 4, -3, 100, [1, -2], 2**40, -(2**61)], ids=str)
def test_relative_bias_measures_from_q_offset(target, q_offset):
    bias = np.random.default_rng(1).standard_normal((4, 9))
    check(target, *SHAPE.arrays(), relative_bias=bias, q_offset=q_offset)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", ">f4", "float64", "longdouble", "int8", "uint64"]
)
@pytest.mark.parametrize("inputs", ["float32", "float64", "float16"])
def test_relative_bias_of_any_real_dtype(target, dtype, inputs):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    bias = np.random.default_rng(3).integers(0, 5, (4, 2, 9)).astype(dtype)[:, 0]
    check(target, *SHAPE.arrays(inputs), relative_bias=bias)


@pytest.mark.parametrize("names", [(), ("bias",), ("-inf",), ("mask",), ("causal",)], ids="+".join)
def test_relative_bias_of_minus_infinity_hides(target, names):
    """Whatever is there: NaN and Inf in a key that all distances hide stay there."""
    shape = Shape(2, 4, 70, 90, 8, kv_heads=2)
    q, k, v = shape.arrays()
    bias = np.random.default_rng(0).standard_normal((4, 41))
    bias[:, ::3] = -np.inf
    bias[0, :9] = -np.inf
    check(target, q, k, v, relative_bias=bias, **options(names, shape))
    k[0, 0, 40], v[0, 1, 40], k[1, 0, 50] = np.nan, np.inf, np.inf
    check(target, q, k, v, relative_bias=bias, **options(names, shape))
    bias[:, 20:] = -np.inf
    bias[:, :15] = -np.inf
    check(target, q, k, v, relative_bias=bias, **options(names, shape))


def test_relative_bias_of_nothing_but_minus_infinity(target):
    q, k, v = SHAPE.arrays()
    bias = np.full((4, 5), -np.inf)
    out, lse, row_max = target.attend(q, k, v, relative_bias=bias, return_lse=True, return_max=True)
    assert (out == 0).all() and (lse == -np.inf).all() and (row_max == -np.inf).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_relative_bias_that_is_no_number(target, value):
    """Its rows are NaN, others are untouched."""
    bias = np.zeros((4, 9))
    bias[2, 8] = value
    check(target, *SHAPE.arrays(), relative_bias=bias, causal=True, q_offset=8)
    check(target, *Shape(2, 4, 70, 90, 8, kv_heads=2).arrays(), relative_bias=bias)


def test_relative_bias_is_the_bias_that_it_stands_for(target):
    q, k, v = SHAPE.arrays("float64")
    table = np.random.default_rng(1).standard_normal((4, 7))
    distance = np.arange(13) - (np.arange(9)[:, None] + 4)
    wanted = target.attend(q, k, v, bias=table[:, np.clip(distance, -3, 3) + 3])
    np.testing.assert_allclose(target.attend(q, k, v, relative_bias=table), wanted, rtol=1e-12)


# ----------------------------------------------------------------------------- the largest score


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_row_max(target, names):
    """The largest score after everything is added, without sinks."""
    opts = options(names, SHAPE, seed=COMBINATIONS.index(names))
    check(target, *SHAPE.arrays(), return_max=True, **opts)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("n_queries, n_keys", [(1, 10_000), (7, 600), (300, 700)])
def test_row_max_of_many_keys(target, n_queries, n_keys, dtype):
    arrays = Shape(1, 4, n_queries, n_keys, 16, kv_heads=2).arrays(dtype)
    check(target, *arrays, return_max=True)
    check(target, *arrays, return_max=True, sinks=np.array([-np.inf, 0, 50, np.inf]), causal=True)
    check(target, *arrays, return_max=True, scale=[0.1, -0.2, 3, 0])


def test_row_max_of_a_row_that_sees_nothing(target):
    q, k, v = SHAPE.arrays()
    _, row_max = target.attend(q, k, v, kv_lengths=[0, 5], sinks=[1.0] * 4, return_max=True)
    assert (row_max[0] == -np.inf).all() and np.isfinite(row_max[1]).all()


@pytest.mark.parametrize("sink", [None, 0.0, np.inf, np.nan])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_row_max_of_what_is_no_number(target, bad, sink):
    shape = Shape(2, 4, 70, 90, 8, kv_heads=2)
    q, k, v = shape.arrays()
    k[0, 1, 20, 3] = bad
    q[1, 2, 30, 5] = bad
    sinks = None if sink is None else np.full(4, sink)
    for more in ({}, {"causal": True, "q_offset": 0}):
        p = make_problem(q, k, v, sinks=sinks, **more)
        got = target.attend(q, k, v, return_max=True, sinks=sinks, **more)[1]
        wanted = reference.row_max(p)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)  # rounding of float32


def test_row_max_beyond_the_range(target):
    q, k, v = (x * np.float32(f) for x, f in zip(SHAPE.arrays(), (1e20, 1e20, 1), strict=True))
    _, row_max = target.attend(q, k, v, return_max=True)
    most = np.finfo(np.float32).max
    np.testing.assert_array_equal(row_max, np.where(row_max > 0, most, -most))


def test_order_of_return_with_the_largest_score(target):
    """``out``, ``lse``, the maximum, ``weights``, each where asked."""
    q, k, v = (x[0, 0] for x in SHAPE.arrays())
    flags = {"return_lse": True, "return_max": True, "return_weights": True}
    out, lse, row_max, weights = target.attend(q, k, v, **flags)
    assert (out.shape, lse.shape, row_max.shape, weights.shape) == ((9, 8), (9,), (9,), (9, 13))
    assert row_max.dtype == lse.dtype
    top = weights.max(axis=-1)
    np.testing.assert_allclose(np.exp(row_max - lse), top, rtol=1e-5)  # rounding of float32
    for name, x in (("return_max", row_max), ("return_weights", weights)):
        _, only = target.attend(q, k, v, **{name: True})
        np.testing.assert_allclose(only, x, rtol=1e-6)
