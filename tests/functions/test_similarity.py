"""Scores by dot product, cosine and distance, and attention pooling."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from helpers.oracles import assert_exact_enough, judging_dtype, same_bits
from helpers.problems import DTYPES, Shape, options
from helpers.remembered import remembered

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 50, 70, 16, kv_heads=2, value_dim=24)
DATA = np.array([[1, 2], [3, 4], [5, 6]])
OPTIONS = [(), ("bias",), ("-inf",), ("alibi",), ("sinks",), ("causal",), ("window",), ("spans",),
           ("kv_lengths",), ("mask",), ("q_offset", "causal"),
           ("mask", "window", "bias")]  # fmt: skip


def cosines(q, k, temperature=1.0):
    lengths = [np.sqrt((x * x).sum(axis=-1, keepdims=True)) for x in (q, k)]
    q, k = (x / np.where(n == 0, 1, n) for x, n in zip((q, k), lengths, strict=True))
    return q @ k.swapaxes(-1, -2) / q.dtype.type(temperature)


def distances(q, k, alpha=1.0):
    """As a matrix product about the origin, which is what a NumPy user can afford."""
    squares = [(x * x).sum(axis=-1) for x in (q, k)]
    twice = 2 * (q @ k.swapaxes(-1, -2))
    return -q.dtype.type(alpha) * (squares[0][..., None] + squares[1][..., None, :] - twice)


@remembered
def solve(p, score, real, normalize=True, hidden=None):
    """``(out, lse, weights)`` on the full grid, every step in `real`."""
    with np.errstate(all="ignore"):
        q = np.broadcast_to(p.q.astype(real), p.rows(p.head_dim))
        k, v = (reference.per_query_head(x.astype(real), p) for x in (p.k, p.v))
        s = score(q, k)
        if p.bias is not None:
            s = s + p.bias.astype(real)
        if p.alibi is not None:
            i, j = reference.positions(p)
            s = s - p.alibi.astype(real)[:, None, None] * np.abs(i - j).astype(real)
        seen = reference.visible(p)
        if hidden is not None:
            seen = seen & ~hidden
        weights, lse = reference.softmax(s, seen, p.sinks)
        if not normalize:
            weights = np.where(seen, np.exp(s), 0)
        return reference.weighted_sum(weights, seen, v), lse, weights


def check(results, p, score, offset=0.0, **how):
    """Promise 1; the yardstick is that of the same inputs less `offset`."""
    near = replace(p, q=p.q - p.dtype.type(offset), k=p.k - p.dtype.type(offset))
    exact = solve(p, score, judging_dtype(p), **how)
    plain = [x.astype(p.dtype) for x in solve(near, score, p.accumulator, **how)]
    names = ("out", "lse", "weights")
    dtypes = (p.dtype, p.accumulator, p.dtype)
    for got, truth, yardstick, dtype, name in zip(
        results, exact, plain, dtypes, names, strict=False
    ):
        assert_exact_enough(got, truth, yardstick, dtype, name)


# ------------------------------------------------------------------------------------------- dot


WORKED = {  # worked by hand: the scores are [[1, 2, 3], [3, 4, 7], [5, 6, 11]]
    fastattn.dot: (1.0, [[1.5105, 1.8199], [1.9068, 1.9657], [1.9866, 1.9951]]),
    fastattn.scaled_dot: (0.5**0.5, [[1.4320, 1.7199], [1.7966, 1.8997], [1.9441, 1.9725]]),
}


@pytest.mark.parametrize("function", WORKED, ids=lambda f: f.__name__)
def test_dot_products_of_integers(target, function):
    scale, wanted = WORKED[function]
    k, v = np.array([[1, 0], [0, 1], [1, 1]]), np.array([[2, 0], [0, 2], [2, 2]])
    powers = np.exp(scale * np.array([[1, 2, 3], [3, 4, 7], [5, 6, 11]]))
    weights = powers / powers.sum(axis=1, keepdims=True)
    out, got = function(DATA, k, v, return_weights=True, backend=target.backend)
    assert out.dtype == got.dtype == np.float64
    np.testing.assert_allclose(got, weights, rtol=1e-14)
    np.testing.assert_allclose(out, weights @ v, rtol=1e-14)
    np.testing.assert_array_equal(out.round(4), wanted)


def test_dot_is_scaled_dot_with_scale_1(target):
    q, k, v = SHAPE.arrays()
    wanted = target.attend(q, k, v, scale=1, causal=True)
    assert same_bits(fastattn.dot(q, k, v, causal=True, backend=target.backend), wanted)


# ---------------------------------------------------------------------------------------- cosine


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
def test_cosine(target, names):
    q, k, v = SHAPE.arrays()
    opts = options(names, SHAPE)
    results = fastattn.cosine(q, k, v, temperature=0.1, return_lse=True, return_weights=True,
                              backend=target.backend, **opts)  # fmt: skip
    check(results, make_problem(q, k, v, **opts), functools.partial(cosines, temperature=0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_of_dtypes(target, dtype):
    q, k, v = SHAPE.arrays(dtype)
    results = fastattn.cosine(q, k, v, return_lse=True, backend=target.backend)
    check(results, make_problem(q, k, v), cosines)


def test_cosine_of_zero_is_zero(target):
    q, k, v = SHAPE.arrays()
    q[:, :, 3], k[:, :, 5] = 0, 0
    _, weights = fastattn.cosine(q, k, v, return_weights=True, backend=target.backend)
    np.testing.assert_allclose(weights[:, :, 3], 1 / 70, rtol=1e-6)
    check(fastattn.cosine(q, k, v, return_lse=True), make_problem(q, k, v), cosines)


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30, 3e37])
def test_cosine_knows_no_length(size):
    """Where the square of the length is out of range, too; a subnormal has few digits."""
    q, k, v = SHAPE.arrays()
    wanted = fastattn.cosine(q, k, v)
    got = fastattn.cosine(q * np.float32(size), k * np.float32(size), v)
    np.testing.assert_allclose(got, wanted, atol=1e-2 if size == 1e-42 else 1e-6)


# -------------------------------------------------------------------------------------- gaussian


def test_gaussian_of_integers(target):
    """Sums that are not normalised, with and without the query itself."""
    out = fastattn.gaussian(DATA, DATA, DATA, alpha=0.5, normalize=False, backend=target.backend)
    wanted = [[1.055, 2.073], [3.110, 4.147], [5.055, 6.073]]
    np.testing.assert_array_equal(out.round(3), wanted)
    out = fastattn.gaussian(DATA, DATA, DATA, alpha=0.5, normalize=False, exclude_self=True,
                            backend=target.backend)  # fmt: skip
    near, far = np.exp(-4), np.exp(-16)
    grid = np.array([[0, near, far], [near, 0, near], [far, near, 0]])
    np.testing.assert_allclose(out, grid @ DATA, rtol=1e-13)


@pytest.mark.parametrize("how", [{}, {"normalize": False, "exclude_self": True}], ids=str)
@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
def test_gaussian(target, names, how):
    if "sinks" in names and "normalize" in how:
        how = {"exclude_self": True}  # the other is refused
    q, k, v = SHAPE.arrays()
    opts = options(names, SHAPE)
    if "kv_lengths" in names and "exclude_self" in how:
        opts["q_offset"] = 0
    results = fastattn.gaussian(q, k, v, backend=target.backend, alpha=0.05, return_lse=True,
                   return_weights=True, **how, **opts)  # fmt: skip
    p = make_problem(q, k, v, **opts)
    i, j = reference.positions(p)
    hidden = i == j if "exclude_self" in how else None
    check(results, p, functools.partial(distances, alpha=0.05), hidden=hidden,
          normalize=how.get("normalize", True))  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "offset"), [*((d, 0) for d in DTYPES), ("float32", 1e4), ("float64", 1e4)]
)
def test_gaussian_far_from_the_origin(target, dtype, offset):
    """As exact as plain NumPy is at the origin; half precision could not tell the inputs apart."""
    q, k, v = SHAPE.arrays(dtype)
    q, k = q + q.dtype.type(offset), k + k.dtype.type(offset)
    results = fastattn.gaussian(q, k, v, backend=target.backend, return_lse=True)
    check(results, make_problem(q, k, v), distances, offset)


def squared_differences(q, k, alpha):
    """As they stand, dimension by dimension."""
    terms = ((q[..., :, None, d] - k[..., None, :, d]) ** 2 for d in range(q.shape[-1]))
    return -q.dtype.type(alpha) * sum(terms)


def spread(case, dtype):
    """``(q, k, v, alpha)``: points that are far apart beside alpha**-0.5."""
    rng = np.random.default_rng(4)
    v = rng.standard_normal((500, 2))
    if case == "uniform":
        x, alpha = 1000 * rng.random((500, 1)), 50.0
    elif case == "year of seconds":
        x, alpha = 3.15e7 * rng.random((500, 1)), 0.5 / 3600**2
    elif case == "two clusters":
        x, alpha = rng.standard_normal((500, 20)) + 1e4 * (np.arange(500) % 2)[:, None], 0.05
    else:  # pairs of neighbours in many dimensions
        x, alpha = rng.standard_normal((250, 40)).repeat(2, axis=0), 3.0
        x += 0.05 * rng.standard_normal(x.shape)
    x, v = x.astype(dtype), v.astype(dtype)
    return x[:300], x, v, alpha


SPREADS = ["uniform", "year of seconds", "two clusters", "neighbours"]


@pytest.mark.parametrize("how", [{}, {"normalize": False}, {"exclude_self": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", SPREADS)
def test_gaussian_of_a_large_spread(target, case, dtype, how):
    """As exact as the squares of differences, where a product has no digits left for them."""
    q, k, v, alpha = spread(case, dtype)
    how, offset = how.copy(), {"q_offset": 0}
    results = fastattn.gaussian(q, k, v, alpha=alpha, return_lse=True, backend=target.backend,
                                **how, **offset)  # fmt: skip
    p = make_problem(q, k, v, **offset)
    i, j = reference.positions(p)
    hidden = i == j if how.pop("exclude_self", False) else None
    score = functools.partial(squared_differences, alpha=alpha)
    # An lse of 0 is that of a sum whose other terms are lost, which plain NumPy rounds once.
    check([x[None] for x in results[:1]], p, score, hidden=hidden, **how)
    lse = solve(p, score, np.longdouble, hidden=hidden)[1][0]
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(results[1], lse.astype(dtype), rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("names", [("causal",), ("bias", "mask"), ("alibi", "sinks")])
def test_options_of_a_large_spread(target, names):
    q, k, v = SHAPE.arrays()
    q, k, opts = 30 * q, 30 * k, options(names, SHAPE)
    k[..., :50, :] = q[:, ::2]
    results = fastattn.gaussian(q, k, v, alpha=0.05, return_lse=True, return_weights=True,
                                backend=target.backend, **opts)  # fmt: skip
    check(
        results, make_problem(q, k, v, **opts), functools.partial(squared_differences, alpha=0.05)
    )


@pytest.mark.parametrize("alpha", [1e38, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scores_beyond_the_range(target, dtype, alpha):
    """They act as its end: of equal scores the result is the mean."""
    q, k, v = Shape(1, 2, 40, 50, 8).arrays(dtype)
    k[:, :, 20:] = k.dtype.type(1e200 if dtype == "float64" else 1e30)
    out, lse, weights = fastattn.gaussian(
        q, k, v, alpha=alpha, mask=np.arange(50) > 20, return_lse=True, return_weights=True,
        backend=target.backend,
    )  # fmt: skip
    np.testing.assert_allclose(weights[..., 21:], 1 / 29, rtol=1e-6)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(lse, -np.finfo(dtype).max, rtol=1e-6)
    out, lse = fastattn.gaussian(k, k, v, alpha=alpha, backend=target.backend, return_lse=True)
    np.testing.assert_allclose(out[:, :, :20], v[:, :, :20], rtol=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("names", [("kv_lengths",), ("mask",), ("-inf",), ("spans",),
                                   ("mask", "causal", "bias")], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e30])
def test_what_nobody_sees_changes_no_bit(names, padding):
    """The centre is taken from keys that are seen."""
    q, k, v = SHAPE.arrays()
    opts = options(names, SHAPE)
    if "mask" in opts:
        opts["mask"][..., 40:] = False
    if "bias" in opts:
        opts["bias"][..., 40:] = -np.inf
    if "spans" in opts:
        opts["spans"] = tuple(np.minimum(x, 40) for x in opts["spans"])
    if "kv_lengths" in opts:
        opts["kv_lengths"] = [40, 33]
    wanted = fastattn.gaussian(q, k, v, return_lse=True, **opts)
    k[:, :, 40:], v[:, :, 40:] = padding, padding
    got = fastattn.gaussian(q, k, v, return_lse=True, **opts)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    assert np.isfinite(got[0]).all()


def test_excluded_self_is_not_seen():
    q, k, v = Shape(1, 1, 9, 9, 4).arrays()
    wanted = fastattn.gaussian(q, k, v, causal=True, exclude_self=True)
    k[:, :, -1], v[:, :, -1] = np.nan, np.nan  # of all queries only the last might see it
    assert same_bits(fastattn.gaussian(q, k, v, causal=True, exclude_self=True), wanted)
    assert not wanted[:, :, 0].any()


def test_key_at_infinity_weighs_nothing():
    q, k, v = SHAPE.arrays()
    wanted = fastattn.gaussian(q, k, v, mask=np.arange(70) != 5)
    for far in (np.inf, -np.inf):
        k[:, :, 5, 2] = far
        np.testing.assert_allclose(fastattn.gaussian(q, k, v), wanted, atol=2e-5)
    k[:, :, 5, 2] = np.nan
    assert np.isnan(fastattn.gaussian(q, k, v)).all()


@pytest.mark.parametrize("opts", [{}, {"kv_lengths": [60, 31]}, {"causal": True}], ids=str)
def test_slices_of_the_batch_agree(opts):
    q, k, v = SHAPE.arrays()
    whole = fastattn.gaussian(
        q,
        k + 100,
        v,
        backend="cython" if "cython" in fastattn.available_backends() else None,
        **opts,
    )
    lengths = opts.get("kv_lengths")
    for n in range(2):
        one = opts if lengths is None else {"kv_lengths": lengths[n]}
        assert same_bits(fastattn.gaussian(q[n], k[n] + 100, v[n], **one), whole[n])
        assert same_bits(fastattn.gaussian(q[n, 2:], k[n, 1:] + 100, v[n, 1:], **one), whole[n, 2:])


def test_broadcasting_and_out():
    q, k, v = SHAPE.arrays()
    q, k = q[:1, :1], k[:, :1]
    wanted = fastattn.gaussian(*(np.broadcast_to(x, (2, 2, *x.shape[2:])) for x in (q, k, v)))
    # The squares may be summed in another order, and scores of 60 are rounded to 4e-6.
    np.testing.assert_allclose(fastattn.gaussian(q, k, v), wanted, atol=2e-5)
    for function in (fastattn.gaussian, fastattn.cosine, fastattn.dot):
        out = np.empty((2, 2, 50, 24), np.float32)
        assert function(q, k, v, out=out) is out
        assert same_bits(out, function(q, k, v))


def test_memory_order_is_that_of_q():
    q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in SHAPE.arrays())
    for function in (fastattn.gaussian, fastattn.cosine):
        assert function(q, k, v).swapaxes(1, 2).flags.c_contiguous


# ------------------------------------------------------------------------------------------ pool


@pytest.mark.parametrize("poolings", [None, 1, 3])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_pool(target, lead, poolings):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((*lead, 20, 8))
    w = rng.standard_normal(8 if poolings is None else (8, poolings))
    mask = rng.random((*lead, 20)) < 0.7
    scores = x @ w.reshape(8, -1) + 0.5
    scores[~mask] = -np.inf
    powers = np.exp(scores).swapaxes(-1, -2)
    weights = powers / powers.sum(axis=-1, keepdims=True)
    wanted = [weights @ x, np.log(powers.sum(axis=-1)), weights]
    if poolings is None:
        wanted = [wanted[0][..., 0, :], wanted[1][..., 0], wanted[2][..., 0, :]]
    results = fastattn.pool(x, w, b=0.5, mask=mask, return_lse=True, return_weights=True,
                            backend=target.backend)  # fmt: skip
    for got, want in zip(results, wanted, strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_pool_of_padded_sequences():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 9, 4)).astype(np.float32)
    x[0, 6:] = np.nan
    out = fastattn.pool(x, np.ones(4, np.float32), kv_lengths=[6, 9])
    np.testing.assert_allclose(out[0], fastattn.pool(x[0, :6], np.ones(4)), rtol=1e-5)
    assert out.dtype == np.float32
    assert not fastattn.pool(x, np.ones(4), kv_lengths=0).any()


# Arrays of NumPy 1 have 32 axes at most.
needs_many_axes = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 2 has arrays of 64 axes"
)


@needs_many_axes
def test_pool_of_many_axes():
    """NumPy broadcasts no more than 32, and has arrays of 64."""
    x, w = np.random.default_rng(5).standard_normal((2, 7, 7))
    mask = np.arange(7) < 5
    for n in (33, 63):
        many = x.reshape(*(1,) * (n - 2), 7, 7)
        out = fastattn.pool(many, w, mask=mask.reshape(*(1,) * (n - 2), 7))
        assert same_bits(out.reshape(7, 7), fastattn.pool(x, w, mask=mask))
    with pytest.raises(ValueError, match=r"^x: expected 2 to 63 axes, "):
        fastattn.pool(np.ones((*[1] * 62, 5, 3)), np.ones(3))


# ---------------------------------------------------------------------------------------- errors

Q, K, V = Shape(2, 4, 5, 7, 8, kv_heads=2).arrays()


@pytest.mark.parametrize("name, opts, error, message", [
    ("dot", {"scale": 2.0}, TypeError, "scale: expected None, got float; dot has no scale"),
    ("cosine", {"scale": 2.0}, TypeError, "scale: expected None, got float; cosine has no"),
    ("cosine", {"temperature": 0}, ValueError, "temperature: expected a finite number > 0, got"),
    ("cosine", {"temperature": "1"}, TypeError, "temperature: expected a real number, got <U1"),
    ("cosine", {"mask": 1.0}, TypeError, "mask: "),
    ("gaussian", {"scale": 2.0}, TypeError, "scale: expected None, got float; gaussian has"),
    ("gaussian", {"softcap": 2.0}, TypeError, "softcap: expected None, got float; gaussian has"),
    ("gaussian", {"alpha": -1}, ValueError, "alpha: expected a finite number > 0, got -1.0"),
    ("gaussian", {"alpha": np.inf}, ValueError, "alpha: expected a finite number > 0, got inf"),
    ("gaussian", {"normalize": 1}, TypeError, "normalize: expected bool, got int"),
    ("gaussian", {"exclude_self": None}, TypeError, "exclude_self: expected bool, got NoneType"),
    ("gaussian", {"normalize": False, "sinks": np.ones(4)}, ValueError, "sinks: expected None"),
    ("gaussian", {"exclude_self": True, "kv_lengths": 5}, ValueError, "q_offset: expected a value"),
    ("gaussian", {"out": np.ones((2, 4, 5, 9))}, ValueError, "out: expected shape"),
    ("gaussian", {"backend": "nobody"}, ValueError, "backend: expected .*, got 'nobody'"),
])  # fmt: skip
def test_errors(name, opts, error, message):
    with pytest.raises(error, match="^" + message):
        getattr(fastattn, name)(Q, K, V, **opts)


@pytest.mark.parametrize("name", ["dot", "cosine", "gaussian"])
def test_shapes_are_those_of_scaled_dot(name):
    with pytest.raises(ValueError, match=r"^k: expected head_dim 8 as in q, got 6"):
        getattr(fastattn, name)(Q, K[..., :6], V)
    with pytest.raises(ValueError, match=r"^q: expected at least 2 axes"):
        getattr(fastattn, name)(1.0, K, V)
    with pytest.raises(TypeError, match=r"^k: expected .*, got complex64"):
        getattr(fastattn, name)(Q, K.astype(complex).astype("c8"), V)


@pytest.mark.parametrize("x, w, opts, message", [
    (np.ones(3), np.ones(3), {}, "x: expected 2 to 63 axes, "),
    (np.ones((5, 3)), np.ones(4), {}, "w: expected dim 3 as in x, got 4"),
    (np.ones((5, 3)), np.ones((3, 2, 1)), {}, "w: expected 1 or 2 axes, .*, got 3"),
    (np.ones((5, 3)), np.ones(3), {"b": np.ones(2)}, r"b: expected shape .*, got \(2,\)"),
    (np.ones((5, 3)), np.ones(3), {"b": np.nan}, "b: expected finite numbers, got nan"),
    (np.ones((5, 3)), np.ones(3), {"mask": np.ones((2, 5), bool)}, "mask: expected a shape"),
    (np.ones((5, 3)), np.ones(3), {"kv_lengths": 6}, "kv_lengths: expected .*, got 6"),
])  # fmt: skip
def test_errors_of_pool(x, w, opts, message):
    with pytest.raises(ValueError, match="^" + message):
        fastattn.pool(x, w, **opts)
