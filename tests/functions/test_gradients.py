"""Gradients of `scaled_dot` (contract, section 3), each backend that has them on every option."""

import numpy as np
import pytest
from helpers.gradients import ARRAY_OPTIONS, check_gradients, random_like
from helpers.layouts import LAYOUTS
from helpers.oracles import same_bits
from helpers.problems import DTYPES, INTERVAL_OPTIONS, SCORE_OPTIONS, Shape, float_type, options
from helpers.strategies import EVERY_OPTION, few, shapes, subsets
from hypothesis import given
from hypothesis import strategies as st

import fastattn

SHAPE = Shape(2, 4, 70, 90, 16, kv_heads=2, value_dim=24)
NAMES = (*INTERVAL_OPTIONS, *SCORE_OPTIONS, "scales", "mask", "-inf", "-inf distances")
SINGLE_OPTIONS = [(), *((name,) for name in NAMES)]


# ---------------------------------------------------------- the reference against its own results


@few
@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16))
def test_finite_differences(shape, names, seed):
    """Of out and lse, along a random direction of every array at once and of each alone."""
    shape = shape._replace(batch=2, n_queries=min(shape.n_queries, 9))
    arrays = dict(zip("qkv", shape.arrays("float64", seed), strict=True))
    chosen = options(names, shape, seed)
    wrt = tuple(name for name in ARRAY_OPTIONS if name in chosen)
    arrays |= {name: np.float64(chosen.pop(name)) for name in wrt}

    def attend(**moved):
        return fastattn.scaled_dot(
            **{**arrays, **moved}, **chosen, return_lse=True, backend="reference"
        )

    q, k, v, *rest = arrays.values()
    named = dict(zip(wrt, rest, strict=True))
    (out, lse), pullback = fastattn.vjp(
        fastattn.scaled_dot, q, k, v, wrt=wrt, return_lse=True, backend="reference",
        **named, **chosen,
    )  # fmt: skip
    grad_out, grad_lse = random_like(out), np.where(np.isfinite(lse), random_like(lse, 8), 0)
    found = pullback(grad_out, grad_lse)

    def loss(**moved):
        out, lse = attend(**moved)
        return (grad_out * out).sum() + (grad_lse * np.where(np.isfinite(lse), lse, 0)).sum()

    step = 1e-5
    for (name, x), gradient in zip(arrays.items(), found, strict=True):
        direction = np.asarray(random_like(x, 9))
        direction[~np.isfinite(x)] = 0
        ahead, back = (np.where(np.isfinite(x), x + sign * step * direction, x) for sign in (1, -1))
        slope = (loss(**{name: ahead}) - loss(**{name: back})) / (2 * step)
        wanted = (gradient * direction).sum()
        # The third derivative leaves step**2 of it, rounding the sum's eps / step.
        size = np.abs(gradient * direction).sum() + np.abs(grad_out).sum() * 1e-2
        assert abs(slope - wanted) <= 1e-7 * size + 1e-8, name


# ------------------------------------------------------------------- every backend, every option


@pytest.mark.parametrize("names", SINGLE_OPTIONS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_option(target, names, dtype):
    check_gradients(target, *SHAPE.arrays(dtype), **options(names, SHAPE, 5))


@pytest.mark.dtypes(*DTYPES)
@few
@given(shape=shapes(), names=subsets(EVERY_OPTION), seed=st.integers(0, 2**16),
       dtype=st.sampled_from(DTYPES), with_lse=st.booleans())  # fmt: skip
def test_every_option(target, shape, names, seed, dtype, with_lse):
    arrays = shape.arrays(dtype, seed)
    check_gradients(target, *arrays, with_lse=with_lse, **options(names, shape, seed))


@pytest.mark.parametrize("heads, n_queries, n_keys", [(2, 300, 1100), (1, 600, 40)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_tiles(target, heads, n_queries, n_keys, causal, dtype):
    arrays = Shape(1, heads, n_queries, n_keys, 64, kv_heads=1).arrays(dtype)
    check_gradients(target, *arrays, causal=causal)


def test_many_tiles_in_float64(target):
    check_gradients(target, *Shape(1, 1, 300, 600, 8).arrays("float64"), causal=True)


@pytest.mark.parametrize(
    "heads, kv_heads", [(1, 1), (4, 4), (4, 2), (4, 1), (6, 2), (12, 3)], ids=str
)
def test_a_groups_gradients_are_summed(target, heads, kv_heads):
    q, k, v = Shape(2, heads, 20, 30, 8, kv_heads=kv_heads).arrays()
    _, dk, dv = check_gradients(target, q, k, v)
    group = heads // kv_heads
    repeated = check_gradients(target, q, *(np.repeat(x, group, axis=1) for x in (k, v)))
    for own, each in zip((dk, dv), repeated[1:], strict=True):
        summed = each.reshape(2, kv_heads, group, *each.shape[2:]).sum(axis=2)
        np.testing.assert_allclose(own, summed, atol=1e-5)  # a few ulp of the sum's terms


BROADCASTS = {
    "keys of the batch": ((3, 4, 5, 8), (1, 4, 7, 8), (3, 4, 7, 6)),
    "everything of something": ((1, 1, 5, 8), (3, 4, 7, 8), (4, 7, 6)),
    "one head of q": ((3, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6)),
    "one head of k": ((3, 4, 5, 8), (3, 1, 7, 8), (3, 4, 7, 6)),
    "more axes": ((2, 1, 4, 5, 8), (3, 2, 7, 8), (2, 3, 1, 7, 6)),
    "two-dimensional": ((5, 8), (7, 8), (7, 6)),
    "two-dimensional q": ((5, 8), (2, 7, 8), (2, 7, 6)),
}


@pytest.mark.parametrize("shapes", BROADCASTS.values(), ids=BROADCASTS)
def test_broadcast_axes_are_summed(target, shapes):
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    found = check_gradients(target, *arrays)
    assert [x.shape for x in found] == list(shapes)


@pytest.mark.parametrize(
    "shape", [(), (90,), (70, 1), (4, 1, 1), (2, 1, 70, 90), (1, 4, 1, 90), (2, 4, 70, 90)], ids=str
)
def test_bias_of_any_shape(target, shape):
    """Its gradient is that of the same bias in full, summed."""
    bias = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    in_full = np.broadcast_to(bias, (2, 4, 70, 90))
    found = []
    for same in (bias, in_full):
        results, pullback = target.vjp(*SHAPE.arrays(), bias=same, wrt=("bias",))
        found.append(pullback(random_like(results))[3])
    own, full = found
    assert own.shape == shape and own.dtype == np.float32
    lead = (1,) * (4 - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(lead) if n == 1 and full.shape[axis] > 1)
    wanted, size = full.astype(float), np.abs(full)
    wanted, size = (x.sum(axis=axes).reshape(shape) for x in (wanted, size))
    assert (np.abs(own - wanted) <= 4 * np.finfo(np.float32).eps * size).all()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 4, 0, 7, 8, kv_heads=2),
        Shape(2, 4, 5, 0, 8, kv_heads=2),
        Shape(0, 4, 5, 7, 8, kv_heads=2),
        Shape(2, 0, 5, 7, 8, kv_heads=0),
        Shape(2, 4, 5, 7, 8, kv_heads=2, value_dim=0),
    ],
    ids=["no queries", "no keys", "no batch", "no heads", "no value"],
)
def test_nothing_to_differentiate(target, shape):
    q, k, v = shape.arrays()
    sinks, bias = np.zeros(shape.heads), np.zeros((shape.n_queries, shape.n_keys))
    check_gradients(target, q, k, v, sinks=sinks, bias=bias, causal=True)


# ------------------------------------------------------------------------------ arrays and dtypes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layouts(target, layout, dtype):
    """Of every array, those that arrive from above too; nothing is changed."""
    arrays = SHAPE.arrays(dtype)
    laid = [LAYOUTS[layout](x) for x in arrays]
    results, pullback = target.vjp(*arrays, causal=True, return_lse=True)
    grads = [random_like(x) for x in results]
    wanted = pullback(*grads)
    odd = LAYOUTS[layout](grads[0])
    found = fastattn.scaled_dot_backward(
        odd, *laid, LAYOUTS[layout](results[0]), results[1], grad_lse=grads[1], causal=True,
        backend=target.backend,
    )  # fmt: skip
    for got, want, x, odd_x in zip(found, wanted, arrays, laid, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # BLAS sums in another order
        np.testing.assert_array_equal(odd_x, x)
    np.testing.assert_array_equal(odd, grads[0])


def test_memory_order_is_that_of_the_array(target):
    arrays = [LAYOUTS["sequence first"](x) for x in SHAPE.arrays()]
    for x, found in zip(arrays, check_gradients(target, *arrays), strict=True):
        assert found.strides == x.strides


@pytest.mark.parametrize("names", [("float32", "float64", "float32"),
                                   ("float16", "bfloat16", "float16"),
                                   ("int32", "float32", "float32"),
                                   ("bool", "int8", "uint64")], ids="-".join)  # fmt: skip
def test_promotion(target, names):
    """Gradients have the dtype of the result."""
    arrays = zip(SHAPE.arrays(), names, strict=True)
    q, k, v = (np.abs(x).astype(np.dtype(n) if n in np.sctypeDict else float_type(n))
               for x, n in arrays)  # fmt: skip
    out = target.attend(q, k, v)
    assert {x.dtype for x in check_gradients(target, q, k, v)} == {out.dtype}


@pytest.mark.parametrize("dtype, option, wanted", [
    ("float16", "float32", "float32"), ("float32", "float16", "float32"),
    ("float32", "float64", "float64"), ("float32", "int64", "float64"),
    ("float32", "longdouble", "float64"), ("bfloat16", "float16", "float32"),
])  # fmt: skip
def test_dtype_of_an_options_gradient(target, dtype, option, wanted):
    """The wider of the option's and the result's."""
    sinks = np.arange(4).astype(option)
    *_, dsinks = check_gradients(target, *SHAPE.arrays(dtype), sinks=sinks)
    assert dsinks.dtype == np.dtype(wanted)


@pytest.mark.dtypes("float16")
def test_no_rounding_between_tiles_in_half_precision(target):
    """Sums are kept in float32: 2000 equal terms would stop growing in float16."""
    q, k, v = (np.zeros((1, 2000, 8), np.float16) for _ in range(3))
    v += 1
    _, pullback = target.vjp(q, k, v)
    *_, dv = pullback(np.ones_like(q))
    np.testing.assert_array_equal(dv, 1)


# ------------------------------------------------------------------------- what gradients promise


def test_runs_agree(target):
    """Bit for bit."""
    arrays, chosen = SHAPE.arrays(), options((*ARRAY_OPTIONS, "causal"), SHAPE)
    results, pullback = target.vjp(*arrays, wrt=ARRAY_OPTIONS, **chosen)
    first = pullback(random_like(results))
    for _ in range(3):
        again = pullback(random_like(results))
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_threads_change_nothing(target, dtype):
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    for shape in (Shape(1, 1, 500, 700, 64), Shape(2, 4, 130, 200, 24, kv_heads=2)):
        found = []
        for threads in (1, 2, 3):
            results, pullback = target.vjp(*shape.arrays(dtype), causal=True, threads=threads)
            found.append(pullback(random_like(results)))
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_change_nothing(target, dtype):
    """Gradients of an entry of the batch and of whole groups of heads are those of it alone."""
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    arrays = Shape(2, 4, 70, 150, 64, kv_heads=2).arrays(dtype)
    arrays[1][1, 1, 20], arrays[2][1, 0, 100] = np.nan, np.inf
    results, pullback = target.vjp(*arrays, causal=True)
    grad = random_like(results)
    found = pullback(grad)
    for heads, kv_heads in ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2))):
        for entry in (slice(0, 1), slice(1, 2)):
            own = [(entry, heads), (entry, kv_heads), (entry, kv_heads)]
            _, alone = target.vjp(*(x[at] for x, at in zip(arrays, own, strict=True)), causal=True)
            for got, x, at in zip(alone(grad[entry, heads]), found, own, strict=True):
                assert same_bits(got, x[at])


@pytest.mark.parametrize("bias", [0.0, 600.0])
def test_merged_parts(target, bias):
    """The out and lse of all keys give each part its share of the whole gradient."""
    q, k, v = SHAPE.arrays()
    results, pullback = target.vjp(q, k, v, bias=bias, return_lse=True)
    # A few ulp of the terms, and weights that are off by the rounding of lse.
    close = {"atol": 1e-5 + 4 * np.finfo(np.float32).eps * bias}
    grads = [random_like(x) for x in results]
    dq, dk, dv = pullback(*grads)
    parts = [
        fastattn.scaled_dot_backward(
            grads[0], q, k[..., keys, :], v[..., keys, :], *results, grad_lse=grads[1], bias=bias,
            backend=target.backend,
        )
        for keys in (slice(0, 33), slice(33, 90))
    ]  # fmt: skip
    np.testing.assert_allclose(parts[0][0] + parts[1][0], dq, **close)
    for own, one, other in zip((dk, dv), parts[0][1:], parts[1][1:], strict=True):
        np.testing.assert_allclose(np.concatenate([one, other], axis=-2), own, **close)


def test_gradient_is_asked_for_again(target):
    """A pullback is a function: linear, and unchanged by being called."""
    results, pullback = target.vjp(*SHAPE.arrays("float64"))
    grad = random_like(results)
    for once, twice in zip(pullback(grad), pullback(2 * grad), strict=True):
        np.testing.assert_allclose(2 * once, twice, rtol=1e-13, atol=1e-13)
