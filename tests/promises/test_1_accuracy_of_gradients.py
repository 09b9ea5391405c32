"""Gradients at every size of scores and number of queries (promise 1), and of parts of rows."""

import numpy as np
import pytest
from helpers.gradients import check_gradients, exact_gradients, random_like
from helpers.oracles import make_problem
from helpers.problems import DTYPES, Shape, options
from helpers.strategies import subsets
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn

# Standard deviations of the scores. At 15 few keys share the weight of a row, at 1 all do.
AMPLITUDES = (1, 4, 15)
DIMS = st.sampled_from([1, 2, 3, 8, 16, 24, 40, 64, 96, 128])

# A tenth of the profile's examples: each has so many rows, few of which may be undecided between
# keys, and so many numbers in a gradient that their rms error is not luck.
ROWS, NUMBERS = 600, 200
fuzz = settings(max_examples=settings.default.max_examples // 10)


@st.composite
def problems(draw):
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n_queries = draw(st.integers(1, 130) | st.integers(1, 9))
    n_keys = draw(st.integers(1, 80) | st.integers(1, 4))
    heads, head_dim, value_dim = kv_heads * group, draw(DIMS), draw(DIMS)
    fewest = kv_heads * n_keys * min(head_dim, value_dim)
    batch = max(-(-ROWS // (n_queries * heads)), -(-NUMBERS // fewest))
    return Shape(batch, heads, n_queries, n_keys, head_dim, kv_heads, value_dim)


def check_amplitude(target, shape, amplitude, dtype, seed=0, **opts):
    q, k, v = shape.arrays(dtype, seed)
    q = (q * q.dtype.type(amplitude)).astype(q.dtype)
    check_gradients(target, q, k, v, with_lse=False, **opts)


@fuzz
@given(shape=problems(), amplitude=st.sampled_from(AMPLITUDES), seed=st.integers(0, 2**16),
       dtype=st.sampled_from(DTYPES[:2]))  # fmt: skip
def test_every_amplitude(target, shape, amplitude, seed, dtype):
    check_amplitude(target, shape, amplitude, dtype, seed)


@pytest.mark.dtypes(*DTYPES)
@fuzz
@given(shape=problems(), amplitude=st.sampled_from(AMPLITUDES), seed=st.integers(0, 2**16),
       dtype=st.sampled_from(DTYPES), names=subsets(["softcap", "causal", "window", "mask", "sinks",
       "alibi", "bias"]))  # fmt: skip
def test_every_amplitude_and_option(target, shape, amplitude, seed, dtype, names):
    """Those of slopes and sinks are few numbers, whose rms error is luck."""
    wrt = ("bias",) if "bias" in names else ()
    check_amplitude(target, shape, amplitude, dtype, seed, wrt=wrt, **options(names, shape, seed))


# Of one query, of as many as have their dimensions in the lanes, a panel, a tile, and one more.
EDGES = (1, 2, 4, 5, 8, 9, 17, 49, 97, 130)


@pytest.mark.parametrize("n_queries", EDGES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_scores(target, dtype, n_queries):
    """Both passes make the same scores, or their difference would be that of the weights."""
    shape = Shape(-(-ROWS // n_queries), 1, n_queries, 50, 64, value_dim=8)
    check_amplitude(target, shape, 16, dtype)


@pytest.mark.parametrize("amplitude", [1, 15, 1000])
@pytest.mark.parametrize("n_keys", [1, 2, 3])
def test_few_keys(target, n_keys, amplitude):
    """A row of one key has all its weight there, whatever its score."""
    for softcap in (None, 2.0):
        shape = Shape(40, 2, 29, n_keys, 16, value_dim=5)
        check_amplitude(target, shape, amplitude, "float32", softcap=softcap)


def test_all_weight_on_one_key(target):
    """Then the gradients of the scores are 0 to the last bit, for any number of values."""
    if target.backend != "cython":
        pytest.skip("NumPy sums products and rows of products in other orders")
    for value_dim in (1, 7, 40, 64, 200):
        q, k, v = Shape(2, 2, 30, 1, 16, value_dim=value_dim).arrays()
        results, pullback = target.vjp(q, k, v)
        dq, dk, _ = pullback(random_like(results))
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("bias", [0.0, -2e5, 2e7])
def test_cancelling_bias_does_not_hide_the_rounding_of_lse(target, bias):
    """Weights sum to 1, however large all scores of a row are."""
    q, k, v = Shape(8, 2, 40, 30, 16).arrays("float64")
    results, pullback = target.vjp(q, k, v * 0 + 1, bias=bias)
    dv = pullback(np.ones_like(results))[2]
    np.testing.assert_allclose(dv.sum(axis=-2), 40, rtol=1e-14)


# ------------------------------------------------------------- sums of the gradients of a row

PARTS = [(0, 3), (3, 8)]
SUMMED = {
    "alibi": {"alibi": np.array([0.25, 0.7])},
    "bias of everything": {"bias": np.array([[0.3]])},
    "bias of a row": {"bias": np.random.default_rng(1).standard_normal((2, 5, 1))},
    "bias of an entry": {"bias": np.random.default_rng(1).standard_normal((2, 5, 8))},
}


@pytest.mark.parametrize("option", SUMMED)
@pytest.mark.parametrize("sinks", [None, np.array([0.4, -1.0])], ids=["", "sinks"])
def test_parts_of_a_softmax(target, option, sinks):
    """Each set of keys gives what is its own of the gradient through the whole."""
    chosen = SUMMED[option] | ({} if sinks is None else {"sinks": sinks})
    wrt = (next(iter(SUMMED[option])),)
    q, k, v = Shape(3, 2, 5, 8, 3).arrays("float64")
    if target.unsupported_backward(q, k, v, wrt=wrt, **chosen):
        pytest.skip(f"{target.backend} has no gradients")
    out, lse = target.attend(q, k, v, return_lse=True, q_offset=0, **chosen)
    grads = random_like(out), random_like(lse, 8)

    def backward(**more):
        return fastattn.scaled_dot_backward(
            grads[0], q, k, v, out, lse, grad_lse=grads[1], wrt=wrt, q_offset=0,
            backend=target.backend, **chosen, **more,
        )  # fmt: skip

    whole = backward()
    parts = [backward(spans=span) for span in PARTS]
    for got, want in zip(map(sum, zip(*parts, strict=True)), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function, how", [
    (fastattn.gaussian, {"alpha": 0.3, "exclude_self": True}),
    (fastattn.gaussian, {"alpha": 0.3}),
], ids=["exclude_self", "gaussian"])  # fmt: skip
@pytest.mark.parametrize("name", ["alibi", "bias"])
def test_slopes_and_biases_of_a_gaussian(target, function, how, name):
    x = {"alibi": np.array([0.25, 0.7]), "bias": np.random.default_rng(1).standard_normal((7, 1))}
    q, k, v = Shape(2, 2, 7, 7, 3).arrays("float64")
    if target.unsupported_backward(q, k, v, wrt=(name,), **{name: x[name]}):
        pytest.skip(f"{target.backend} has no gradients")
    found = []
    for backend in (target.backend, "reference"):
        out, pullback = fastattn.vjp(function, q, k, v, wrt=(name,), **{name: x[name]},
                                     backend=backend, **how)  # fmt: skip
        found.append(pullback(random_like(out)))
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q_offset", [0, 2**24 + 1000, 2**25, -(2**25)])
def test_slope_far_away(target, q_offset):
    """It has its digits where float32 has not every whole distance, if scores have theirs."""
    arrays, slopes = Shape(1, 2, 40, 200, 16).arrays(), np.array([3e-8, 1e-9])
    given = {"alibi": slopes, "q_offset": q_offset}
    results, pullback = target.vjp(*arrays, wrt=("alibi",), **given)
    grad = random_like(results)
    found = pullback(grad)[3]
    wanted = exact_gradients(make_problem(*arrays, gradients=True, wrt=("alibi",), **given), grad)[
        3
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
