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
