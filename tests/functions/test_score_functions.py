"""Attention by distance and by the additive score."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.memory import reported
from helpers.oracles import assert_exact_enough, assert_solves, plain_numpy, same_bits
from helpers.problems import DTYPES, Shape, options

import fastattn
from fastattn import reference
from fastattn.core.problem import DISTANCE, ScoreFunction, make_problem
from fastattn.dispatch import named

HIDDEN = 24
SHAPE = Shape(2, 4, 50, 70, 16, kv_heads=2, value_dim=24)
OPTIONS = [(), ("softcap", "bias"), ("-inf", "sinks"), ("alibi", "causal"), ("window", "mask"),
           ("spans", "bias"), ("kv_lengths", "-inf", "alibi"),
           ("q_offset", "causal", "sinks", "mask", "softcap")]  # fmt: skip
BOTH = ("euclidean", "additive")


def parameters(width, key_width=None, hidden=HIDDEN, dtype="float32", size=1.0) -> dict:
    rng = np.random.default_rng(5)
    shapes = {"w_q": (width, hidden), "w_k": (key_width or width, hidden), "w": (hidden,)}
    scale = {"w_q": width**-0.5, "w_k": (key_width or width) ** -0.5, "w": 1.0}
    found = {name: size * scale[name] * rng.standard_normal(s) for name, s in shapes.items()}
    return {name: x.astype(dtype) for name, x in found.items()} | {
        "b": rng.standard_normal(hidden).astype(dtype)
    }


def problem_of(name, q, k, v, w_q=None, w_k=None, w=None, b=None, scale=1.0, **opts):
    """What the kernels are given: the problem, of an additive score after the projections."""
    if name == "euclidean":
        return make_problem(q, k, v, scale=-scale, score_function=DISTANCE, **opts)
    real = np.float64 if v.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        q, k = (
            (x.astype(real) @ y.astype(real) + c).astype(v.dtype)
            for x, y, c in ((q, w_q, b.astype(real)), (k, w_k, real(0)))
        )
    return make_problem(q, k, v, scale=1.0, score_function=ScoreFunction("additive", w), **opts)


def call(target, name, *arrays, **opts):
    """On this backend; skips the test where that cannot serve."""
    given = {n: x for n, x in opts.items() if n not in ("threads", "out")}
    reason = named(target.backend).unsupported(problem_of(name, *map(np.asarray, arrays), **given))
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    return getattr(fastattn, name)(*arrays, backend=target.backend, **opts)


def check(target, name, *arrays, **opts):
    opts = {"return_lse": True, **opts}
    results = call(target, name, *arrays, **opts)
    assert_solves(results, problem_of(name, *arrays, **opts))
    return results


def arguments(name, shape=SHAPE, dtype="float32", **more):
    given = parameters(shape.head_dim, dtype=dtype, **more) if name == "additive" else {}
    return shape.arrays(dtype), given


# -------------------------------------------------------------------------------- the definition


def test_integers_by_hand(target):
    """Points 3, 4 and 5 apart: weights exp(-5), exp(-3) ... over their sums."""
    data = np.array([[0, 0], [3, 0], [0, 4]])
    powers = np.exp(-np.array([[0, 3, 4], [3, 0, 5], [4, 5, 0]]))
    weights = powers / powers.sum(axis=1, keepdims=True)
    out, got = call(target, "euclidean", data, data, data, return_weights=True)
    assert out.dtype == got.dtype == np.float64
    np.testing.assert_allclose(got, weights, rtol=1e-14)
    np.testing.assert_allclose(out, weights @ data, rtol=1e-14, atol=1e-15)


def test_additive_by_hand():
    """Key by key, of other widths than the query's."""
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal(shape) for shape in ((3, 5), (4, 7), (4, 2)))
    given = parameters(5, 7, dtype="float64")
    scores = np.empty((3, 4))
    for i, j in np.ndindex(3, 4):
        hidden = np.tanh(q[i] @ given["w_q"] + k[j] @ given["w_k"] + given["b"])
        scores[i, j] = given["w"] @ hidden
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    out, got = fastattn.additive(q, k, v, return_weights=True, **given)
    np.testing.assert_allclose(got, weights, rtol=1e-13)
    np.testing.assert_allclose(out, weights @ v, rtol=1e-13, atol=1e-14)
    del given["b"]
    assert not np.allclose(fastattn.additive(q, k, v, **given), out)


# -------------------------------------------------------------------------------------- promise 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BOTH)
def test_options(target, name, dtype):
    for seed, names in enumerate(OPTIONS):
        arrays, given = arguments(name, dtype=dtype)
        check(target, name, *arrays, return_weights=True, **given, **options(names, SHAPE, seed))


SHAPES = [
    Shape(1, 2, 1, 1, 1),
    Shape(6, 4, 1, 700, 20, kv_heads=2),  # a few queries: keys in the lanes
    Shape(1, 1, 3, 5000, 7),  # keys in parts
    Shape(2, 2, 17, 33, 3, kv_heads=1),
    Shape(1, 1, 101, 1100, 33, value_dim=5),  # several tiles, passes and chunks of dimensions
    Shape(1, 1, 49, 130, 100),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
@pytest.mark.parametrize("name", BOTH)
def test_shapes(target, name, shape):
    for dtype in ("float32", "float64"):
        arrays, given = arguments(name, shape, dtype, hidden=shape.head_dim)
        check(target, name, *arrays, causal=shape.n_queries > 3, **given)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("name", BOTH)
def test_half_precision(target, name, dtype):
    arrays, given = arguments(name, dtype=dtype)
    check(target, name, *arrays, return_weights=True, mask=np.arange(70) % 5 > 0, **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections(dtype):
    """The whole of an additive score against every step of it in `dtype`."""
    arrays, given = arguments("additive", dtype=dtype)
    q, k, v = arrays
    results = fastattn.additive(q, k, v, return_lse=True, return_weights=True, **given)
    p = problem_of("additive", q, k, v, **given)
    real = np.longdouble if dtype == "float64" else np.float64
    wide = {name: x.astype(real) for name, x in given.items()}
    exact = reference.attend(
        replace(
            p,
            q=q.astype(real) @ wide["w_q"] + wide["b"],
            k=k.astype(real) @ wide["w_k"],
            score_function=ScoreFunction("additive", wide["w"]),
        ),
        real,
    )
    own = ((x @ given[w]).astype(q.dtype) for x, w in ((q, "w_q"), (k, "w_k")))
    own_q, own_k = own
    plain = plain_numpy(replace(p, q=(own_q + given["b"]).astype(q.dtype), k=own_k), p.dtype)[:3]
    for got, truth, yardstick in zip(results, exact, plain, strict=True):
        assert_exact_enough(got, truth, yardstick, got.dtype)


@pytest.mark.parametrize("size", [1e-3, 0.1, 3, 30, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sizes_of_additive_terms(target, dtype, size):
    """From tanh(x) ~ x to steps, with exponentials that overflow; sums of opposite terms too. Each
    dimension 16 times, so that their errors count.
    """
    q, k, v = Shape(1, 1, 50, 70, 16).arrays(dtype)
    k[:, :, :50] = -q * k.dtype.type(1.01)
    eyes = np.tile(np.eye(16, dtype=dtype), 16)
    w = np.random.default_rng(8).standard_normal(256).astype(dtype)
    size = q.dtype.type(size)
    check(target, "additive", q * size, k * size, v, w_q=eyes, w_k=eyes, w=w,
          b=np.zeros(256, dtype), return_weights=True)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_distance_far_from_the_origin(target, dtype):
    q, k, v = SHAPE.arrays(dtype)
    far = q.dtype.type(1e4)
    check(target, "euclidean", q + far, k + far, v, return_weights=True)


@pytest.mark.parametrize("n_queries", [3, 50])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("float32", (1e-44, 1e-30, 1e-19, 1e-16, 1e20, 1e37)), ("float64", (1e-320, 1e-160, 1e300))],
)
def test_distance_whose_square_is_out_of_range(target, dtype, sizes, n_queries):
    """Subnormal, 0 or infinite; some vectors are equal."""
    for size in sizes:
        q, k, v = SHAPE._replace(n_queries=n_queries).arrays(dtype)
        q, k = q * q.dtype.type(size), k * k.dtype.type(size)
        k[..., 5, :] = q[:, :2, 0]
        scale = min(0.5 / size, float(np.finfo(dtype).max))
        check(target, "euclidean", q, k, v, scale=scale)


@pytest.mark.parametrize("dtype, size", [("float32", 2.0**100), ("float64", 2.0**900)])
def test_distance_whose_square_overflows(target, dtype, size):
    arrays = SHAPE.arrays(dtype)
    wanted = call(target, "euclidean", *arrays, scale=0.5, return_lse=True)
    q, k, v = arrays
    k[:, :, 3] = 1000  # weighs nothing, and is as far as others are not
    size = q.dtype.type(size)
    got = call(target, "euclidean", q * size, k * size, v, scale=0.5 / size, return_lse=True,
               mask=np.arange(70) != 3)  # fmt: skip
    hidden = call(target, "euclidean", *SHAPE.arrays(dtype), scale=0.5, return_lse=True,
                  mask=np.arange(70) != 3)  # fmt: skip
    eps = np.finfo(dtype).eps
    for a, b, c in zip(got, hidden, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=8 * eps, atol=16 * eps)
        assert not np.array_equal(b, c)


# ------------------------------------------------------------------------------- the other promises


@pytest.mark.parametrize("n_queries", [2, 50])
@pytest.mark.parametrize("name", BOTH)
def test_what_nobody_sees_changes_no_bit(target, name, n_queries):
    shape = SHAPE._replace(n_queries=n_queries)
    arrays, given = arguments(name, shape)
    for opts in (
        {"kv_lengths": 40},
        {"mask": np.arange(70) < 40},
        {"window": (5, 5), "q_offset": 4},
    ):
        q, k, v = (x.copy() for x in arrays)
        first = 40 if "window" not in opts else 4 + n_queries + 5
        found = []
        for padding in (0, 1e3, 1e30, np.inf, np.nan):
            k[:, :, first:], v[:, :, first:] = padding, padding
            found.append(call(target, name, q, k, v, return_lse=True, **given, **opts))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                if target.bitwise:
                    assert same_bits(a, b)
                np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_what_is_odd_stays_in_its_row(target, name):
    """A query of large numbers, or of NaN, leaves its neighbours as they are; of the infinite one
    all distances are infinite, so that no weight is larger than another: 0 / 0.
    """
    (q, k, v), given = arguments(name)
    wanted = call(target, name, q, k, v, **given)
    others = np.arange(50) != 7
    for odd in (500, 1e30, np.inf, np.nan):
        q[:, :, 7] = odd
        out = call(target, name, q, k, v, **given)
        if target.bitwise and np.isfinite(odd):
            assert same_bits(out[:, :, others], wanted[:, :, others])
        np.testing.assert_allclose(out[:, :, others], wanted[:, :, others], atol=1e-5)
        nan = np.isnan(out).any(axis=(0, 1, 3))
        np.testing.assert_array_equal(nan, ~others & (not np.isfinite(odd)))


def test_infinite_and_nan_keys(target):
    """tanh of an infinity is 1, and who is infinitely far away weighs nothing."""
    (q, k, v), given = arguments("additive")
    given["w_k"] = np.abs(given["w_k"])
    k[:, :, 5] = np.inf
    with np.errstate(invalid="ignore"):
        results = call(target, "additive", q, k, v, return_lse=True, **given)
        assert_solves(results, problem_of("additive", q, k, v, return_lse=True, **given))
    q, k, v = SHAPE.arrays()
    wanted = call(target, "euclidean", q, k, v, mask=np.arange(70) != 5)
    k[:, :, 5, 2] = -np.inf
    np.testing.assert_allclose(call(target, "euclidean", q, k, v), wanted, atol=1e-6)
    k[:, :, 5, 2] = np.nan
    assert np.isnan(call(target, "euclidean", q, k, v)).all()


@pytest.mark.parametrize("name", BOTH)
def test_same_bits_for_any_threads_and_slices(target, name):
    if not target.bitwise:
        pytest.skip(f"{target.backend} leaves the order of sums to its BLAS")
    (q, k, v), given = arguments(name, SHAPE._replace(n_queries=150, n_keys=700))
    whole = call(target, name, q, k, v, threads=1, **given)
    for threads in (2, 3):
        assert same_bits(call(target, name, q, k, v, threads=threads, **given), whole)
    assert same_bits(call(target, name, q[1], k[1], v[1], **given), whole[1])
    assert same_bits(call(target, name, q[:, 2:], k[:, 1:], v[:, 1:], **given), whole[:, 2:])


PROGRAM = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

backend, *names = sys.argv[1:]
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((n, 32), np.float32) for n in (128, 16384, 16384))
w = {x: rng.standard_normal((32, 16), np.float32) for x in ("w_q", "w_k")} | {"w": np.ones(16)}

def call(name, n):
    options = w if name == "additive" else {}
    return getattr(fastattn, name)(q, k[:n], v[:n], backend=backend, threads=2, **options)

for name in names:
    call(name, 600)  # whatever is made once
report(**{name: extra(lambda: call(name, 16384)) for name in names})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.one_instruction_set
def test_memory(target, run_python):
    """Scores of 128 x 16384 are 8 MiB, 128 with an axis of 16; the projected keys 1."""
    for name in BOTH:
        given = parameters(2) if name == "additive" else {}
        call(target, name, *Shape(1, 1, 1, 1, 2).arrays(), **given)
    assert not reported(run_python(PROGRAM, target.backend, *BOTH), 6)


# ------------------------------------------------------------------------------ arrays and errors


@pytest.mark.parametrize("name", BOTH)
def test_out_memory_order_and_broadcasting(name):
    (q, k, v), given = arguments(name)
    function = getattr(fastattn, name)
    wanted = function(q, k, v, **given)
    out = np.empty_like(wanted)
    assert function(q, k, v, out=out, **given) is out
    assert same_bits(out, wanted)
    seen = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    ordered = function(*seen, **given)
    assert same_bits(ordered, wanted)
    assert ordered.swapaxes(1, 2).flags.c_contiguous
    one = function(q[0, 0], k[0, 0], v[0, 0], **given)
    np.testing.assert_allclose(one, wanted[0, 0], rtol=1e-4, atol=1e-6)
    together = function(q[:1], k, v, **given)
    np.testing.assert_allclose(together[1], function(q[0], k[1], v[1], **given), atol=1e-6)


def test_gradient_dtype_and_input_dtype_of_parameters():
    (q, k, v), given = arguments("additive")
    wide = {name: x.astype(np.float64) for name, x in given.items()}
    assert same_bits(fastattn.additive(q, k, v, **wide), fastattn.additive(q, k, v, **given))
    assert fastattn.additive([[1]], [[2]], [[3]], w_q=[[1]], w_k=[[1]], w=[1]).dtype == np.float64


Q, K, V = Shape(2, 4, 5, 7, 8, kv_heads=2).arrays()
GIVEN = parameters(8)


@pytest.mark.parametrize("name, opts, error, message", [
    ("euclidean", {"scale": 0}, ValueError, "scale: expected a finite number > 0, got 0.0"),
    ("euclidean", {"scale": "1"}, TypeError, "scale: expected a real number, got <U1"),
    ("euclidean", {"mask": 1.0}, TypeError, "mask: "),
    ("euclidean", {"k": K[..., :5]}, ValueError, "k: expected head_dim 8 as in q, got 5"),
    ("euclidean", {"out": np.ones((2, 4, 5, 9))}, ValueError, "out: expected shape"),
    ("euclidean", {"backend": "nobody"}, ValueError, "backend: expected .*, got 'nobody'"),
    ("additive", {"scale": 1.0}, TypeError, "scale: expected None, got float; additive has"),
    ("additive", {"w_q": np.ones((7, 24))}, ValueError,
     r"w_q: expected shape \(8, 24\), got \(7, 24\)"),
    ("additive", {"w_q": np.ones(8)}, ValueError, r"w_q: expected shape \(8, H\), got \(8,\)"),
    ("additive", {"w_k": np.ones((8, 23))}, ValueError,
     r"w_k: expected shape \(8, 24\), got \(8, 23\)"),
    ("additive", {"w": np.ones(23)}, ValueError, r"w: expected shape \(24,\), got \(23,\)"),
    ("additive", {"w": np.ones(24, complex)}, TypeError, "w: expected .*, got complex128"),
    ("additive", {"w": None}, TypeError, "w: expected an array, got NoneType"),
    ("additive", {"b": np.ones((1, 24))}, ValueError, r"b: expected shape \(24,\), got \(1, 24\)"),
    ("additive", {"q": 1.0}, ValueError, "q: expected at least 2 axes"),
    ("additive", {"k": np.ma.ones((2, 2, 7, 8))}, TypeError, "k: expected .*, got a masked array"),
    ("additive", {"v": V[..., :3, :]}, ValueError, "v: expected 7 keys as in k, got 3"),
    ("additive", {"bias": np.ones(6)}, ValueError, "bias: expected a shape"),
    ("additive", {"out": np.ones((2, 4, 5, 9))}, ValueError, "out: expected shape"),
])  # fmt: skip
def test_errors(name, opts, error, message):
    given = {"q": Q, "k": K, "v": V, **(GIVEN if name == "additive" else {}), **opts}
    with pytest.raises(error, match="^" + message):
        getattr(fastattn, name)(given.pop("q"), given.pop("k"), given.pop("v"), **given)
