"""Promise 1: root mean square error at most twice plain NumPy's, plus 2 ulp of the largest."""

import numpy as np
import pytest
from helpers.layouts import LAYOUTS
from helpers.oracles import check
from helpers.problems import DTYPES, INTERVAL_OPTIONS, Shape, options
from helpers.strategies import EVERY_OPTION, shapes, subsets
from hypothesis import given
from hypothesis import strategies as st

layouts = st.sampled_from([name for name in LAYOUTS if name != "list"])
BIAS_TYPES = [
    lambda x: x,
    lambda x: x.astype(np.float64),
    lambda x: x.astype(np.float16),
    lambda x: x.astype(">f4"),
    lambda x: x.astype(np.longdouble),
    lambda x: np.where(np.isfinite(x), 3 * x, 9).astype(np.int8),
    lambda x: np.where(np.isfinite(x), abs(x), 0).astype(">u2"),
]


@given(shape=shapes(), names=subsets((*INTERVAL_OPTIONS, "scale")), seed=st.integers(0, 2**16),
       dtype=st.sampled_from(DTYPES[:2]))  # fmt: skip
def test_interval_options(target, shape, names, dtype, seed):
    check(target, *shape.arrays(dtype, seed), **options(names, shape, seed))


@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16),
       dtype=st.sampled_from(DTYPES[:2]), return_max=st.booleans(), return_weights=st.booleans(),
       amplitude=st.sampled_from([1, 1, 15]))  # fmt: skip
def test_every_option(target, shape, names, seed, dtype, amplitude, **results):
    q, k, v = shape.arrays(dtype, seed)
    check(target, q * q.dtype.type(amplitude), k, v, **results, **options(names, shape, seed))


@given(shape=shapes(st.sampled_from([64, 96, 100])), names=subsets(EVERY_OPTION),
       seed=st.integers(0, 2**16))  # fmt: skip
def test_every_option_of_wide_heads(target, shape, names, seed):
    """Whose float32 AMX multiplies in parts."""
    shape = shape._replace(n_queries=shape.n_queries + 128)
    check(target, *shape.arrays("float32", seed), **options(names, shape, seed))


@given(st.data())
def test_everything_mixed(target, data):
    """Every option, broadcasting and layout, at sizes of several tiles and blocks too."""
    draw = data.draw
    seed, dtype = draw(st.integers(0, 2**16)), draw(st.sampled_from(DTYPES[:2]))
    shape = draw(shapes())._replace(value_dim=draw(st.integers(16, 40)))  # for the same reason
    if draw(st.booleans()):
        n_queries, n_keys = draw(st.integers(1, 230)), draw(st.integers(1, 1200))
        shape = shape._replace(n_queries=n_queries, n_keys=n_keys, batch=2)
    given = dict(zip("qkv", shape.arrays(dtype, seed), strict=True))
    given["q"] *= draw(st.sampled_from([1, 1, 4]))
    given |= options(draw(subsets(EVERY_OPTION)), shape, seed)
    if "bias" in given:
        given["bias"] = draw(st.sampled_from(BIAS_TYPES))(given["bias"])
    whole = draw(st.sampled_from("qkv"))  # has every axis of the batch
    for name in sorted(given.keys() & {"q", "k", "v", "mask", "bias"}):
        x = given[name]
        for axis in may_broadcast(name, shape):
            if draw(st.integers(0, 3)) == 0 and (name, axis) != (whole, 0):
                x = x.take([0], axis)
        x = LAYOUTS[draw(layouts)](x)
        given[name] = x[0] if x.shape[0] == 1 and name != whole else x
    given["return_weights"] = draw(st.booleans())
    check(target, **given)


def may_broadcast(name, shape):
    """The axes of an operand that may have length 1 whatever the others have."""
    if name in ("mask", "bias"):
        return range(4)
    return (0, 1) if name == "v" or (name == "q" and shape.heads == shape.kv_heads) else (0,)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16))
def test_half_precision(target, dtype, shape, names, seed):
    check(target, *shape.arrays(dtype, seed), **options(names, shape, seed))


@pytest.mark.parametrize("dtype, n_queries", [("float32", 3), ("float32", 24), ("float64", 8)])
@pytest.mark.parametrize("spread", [1.0, 0.0], ids=["random scores", "equal scores"])
def test_sums_do_not_drift(target, dtype, n_queries, spread):
    """65536 keys, values of mean 1: one running sum would lose 3 to 25 times NumPy's error."""
    q, k, v = Shape(1, 1, n_queries, 65536, 16).arrays(dtype)
    check(target, q * q.dtype.type(spread), k, v + v.dtype.type(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_queries", [1, 40, 130])
@pytest.mark.parametrize("head_dim", [576, 4096])
def test_large_head_dim(target, head_dim, n_queries, dtype):
    """One running sum over all dims would lose digits, as over keys."""
    q, k, v = Shape(2, 2, n_queries, 60, head_dim, value_dim=16).arrays(dtype)
    check(target, q, k, v, scale=2 / head_dim**0.5)


@pytest.mark.parametrize("n_queries, n_keys", [(9, 12), (16, 60), (32, 32)])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_small_matmuls_of_large_scores(target, n_queries, n_keys, head_dim):
    """For which NumPy's matmul keeps many partial sums of each dot product."""
    q, k, v = Shape(4, 4, n_queries, n_keys, head_dim).arrays("float32")
    check(target, 15 * q, k, v)


@pytest.mark.parametrize("dtype, n", [("float32", 2000), ("float64", 600)])
def test_squares(target, dtype, n):
    check(target, *Shape(1, 2, n, n, 64).arrays(dtype), causal=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0.01, 1, 10, 30, 100])
def test_spread_of_scores(target, dtype, spread):
    """`exp` over its whole range, down to where weights vanish."""
    check(target, *Shape(2, 4, 150, 600, 16).arrays(dtype), scale=spread / 16**0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential_at_every_size(target, dtype):
    """Two keys, one ``x`` below the other: ``lse`` and both columns follow exp(-x)."""
    x = np.linspace(0, 800 if dtype == "float64" else 110, 4001, dtype=dtype)
    q, k, v = x[:, None], np.array([[0], [-1]], dtype), np.eye(2, dtype=dtype)
    check(target, q, k, v, scale=1)
    weight = check(target, q, k, v, scale=1)[0][:, 1]
    with np.errstate(under="ignore"):
        exact = np.exp(-x.astype(np.longdouble)) / (1 + np.exp(-x.astype(np.longdouble)))
    normal = exact > np.finfo(dtype).tiny
    relative = np.abs(weight[normal] - exact[normal]) / exact[normal]
    # x is rounded in base 2 before exp2: half an ulp of 1.44 x, and a few ulp of the rest.
    assert (relative <= np.finfo(dtype).eps * (x[normal] + 4)).all()
