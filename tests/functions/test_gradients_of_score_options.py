"""Gradients of a relative bias and of scales (contract, section 3)."""

import numpy as np
import pytest
from helpers.gradients import check_gradients, random_like
from helpers.oracles import same_bits
from helpers.problems import Shape, options

import fastattn

SHAPE = Shape(2, 4, 70, 90, 16, kv_heads=2, value_dim=24)


@pytest.mark.parametrize("reach", [0, 7, 90])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_relative_bias(target, dtype, heads, kv_heads, reach):
    """Sums along diagonals, and of all that is farther at its ends."""
    shape = Shape(2, heads, 60, 300, 8, kv_heads=kv_heads)
    bias = np.random.default_rng(reach).standard_normal((heads, 2 * reach + 1))
    check_gradients(target, *shape.arrays(dtype), relative_bias=bias)


@pytest.mark.parametrize("names", [("causal",), ("mask", "alibi"), ("bias",), ("spans", "softcap")])
@pytest.mark.parametrize("hides", [False, True])
def test_relative_bias_with_others(target, names, hides):
    opts = options((*names, "-inf distances" if hides else "relative_bias"), SHAPE, 3)
    check_gradients(target, *SHAPE.arrays(), **opts)


@pytest.mark.parametrize("q_offset", [0, -5, 100, [3, -40], 2**40])
def test_relative_bias_counts_from_q_offset(target, q_offset):
    bias = np.random.default_rng(1).standard_normal((4, 21))
    check_gradients(target, *SHAPE.arrays(), relative_bias=bias, q_offset=q_offset)


def test_what_is_hidden_reaches_no_gradient(target):
    q, k, v = SHAPE.arrays()
    k[:, :, 80:], v[:, :, 80:] = np.nan, np.inf
    scale = np.linspace(0.1, 0.4, 4)
    found = check_gradients(
        target, q, k, v, relative_bias=np.ones((4, 5)), scale=scale, kv_lengths=80, q_offset=0
    )
    assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("names", [(), ("softcap",), ("bias", "sinks"), ("-inf",)], ids="+".join)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_scales_of_heads(target, dtype, names):
    opts = options(names, SHAPE, 3)
    check_gradients(target, *SHAPE.arrays(dtype), scale=np.array([0.3, -0.2, 0, 1]), **opts)


@pytest.mark.parametrize("scale", [0.3, 0, np.float32(0.5), np.array(-0.2)])
def test_scale_of_all(target, scale):
    """Its gradient has its shape, ()."""
    arrays = SHAPE.arrays("float64")
    out, pullback = target.vjp(*arrays, scale=scale, wrt=("scale",))
    *_, found = pullback(out)
    _, reference = fastattn.vjp(
        fastattn.scaled_dot, *arrays, scale=scale, wrt=("scale",), backend="reference"
    )
    assert found.shape == ()
    np.testing.assert_allclose(found, reference(out)[3], rtol=1e-11)  # of thousands of terms


def test_scales_where_heads_broadcast(target):
    q, k, v = SHAPE.arrays()
    check_gradients(target, q[:1, :1], k, v, scale=[0.2, 0.5])


@pytest.mark.parametrize("name", ["scale", "sinks"])
def test_sums_over_a_large_batch(target, name):
    """Summed in float32, thousands of terms of one sign would lose a digit."""
    shape = Shape(4000, 1, 1, 12, 8)
    q, k, _ = shape.arrays()
    given = options([name], shape)

    def gradient(dtype):
        arrays = (x.astype(dtype) for x in (q, k, k))  # so that all entries pull the same way
        _, pullback = target.vjp(*arrays, wrt=(name,), **given)
        return pullback(q.astype(dtype))[3]

    np.testing.assert_allclose(gradient("float32"), gradient("float64"), rtol=4 * 2.0**-24)


def test_needs_a_scale(target):
    with pytest.raises(ValueError, match=r"^wrt: expected .* without scale="):
        fastattn.vjp(fastattn.scaled_dot, *SHAPE.arrays(), wrt=("scale",), backend=target.backend)


@pytest.mark.parametrize("function", [fastattn.dot, fastattn.cosine])
def test_scores_without_a_scale_have_no_gradient_of_it(function):
    with pytest.raises(ValueError, match=r"^wrt: expected .* got 'scale'"):
        fastattn.vjp(function, *SHAPE.arrays(), wrt=("scale",))


def test_scale_of_distances():
    """By a small step."""
    q, k, v = Shape(1, 2, 9, 13, 4).arrays("float64")
    out, pullback = fastattn.vjp(fastattn.euclidean, q, k, v, scale=0.7, wrt=("scale",))
    grad = random_like(out)
    found = pullback(grad)[3]
    ahead, back = (fastattn.euclidean(q, k, v, scale=0.7 + step) for step in (1e-6, -1e-6))
    np.testing.assert_allclose(found, (grad * (ahead - back)).sum() / 2e-6, rtol=1e-7)


def test_scaled_dot_backward_takes_them(target):
    q, k, v = SHAPE.arrays()
    opts = {"scale": np.full(4, 0.2), "relative_bias": np.ones((4, 7))}
    wrt = ("relative_bias", "scale")
    (out, lse), pullback = target.vjp(q, k, v, return_lse=True, wrt=wrt, **opts)
    low = fastattn.scaled_dot_backward(
        out, q, k, v, out, lse, wrt=wrt, backend=target.backend, **opts
    )
    assert all(map(same_bits, low, pullback(out)))


def test_threads_change_no_bit(target):
    """The sums of many blocks, heads and batch entries."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} makes no such promise")
    q, k, v = Shape(2, 4, 300, 1300, 16, kv_heads=2).arrays()
    opts = {"scale": np.full(4, 0.2), "relative_bias": np.ones((4, 61))}
    found = []
    for threads in (1, 2, 3):
        out, pullback = target.vjp(
            q, k, v, wrt=("relative_bias", "scale"), threads=threads, causal=True, **opts
        )
        found.append(pullback(out))
    for other in found[1:]:
        assert all(map(same_bits, found[0], other))


TINY = [Shape(1, 1, 1, 12, 1), Shape(1, 1, 2, 5, 2, value_dim=8), Shape(1, 2, 3, 30, 8)]


@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", ["scale", "relative_bias", "alibi", "sinks"])
@pytest.mark.parametrize("other", [None, "softcap", "sinks"])
def test_single_numbers_of_tiny_problems(target, name, other):
    """Of which plain NumPy's error is 0 by luck, and which are small where terms cancel."""
    for seed in range(12):
        for shape in TINY:
            q, k, v = shape.arrays("float32", seed)
            opts = options([name, other, "scale"], shape, seed)
            q *= np.float32(1 + seed % 4)
            check_gradients(target, q, k, v, wrt=(name,), judged=(name,), **opts)


@pytest.mark.parametrize("name", ["scale", "relative_bias", "alibi", "sinks"])
def test_slices_of_heads_change_no_bit(target, name):
    """Whether a problem is small is asked of each head."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} makes no such promise")
    shape = Shape(2, 6, 9, 12, 8, kv_heads=3)
    q, k, v = shape.arrays()
    opts = options([name], shape)
    value = np.full(6, 0.3) if name == "scale" else opts[name]
    found = []
    for heads in (slice(6), slice(2, 4)):
        kv = slice(heads.start and heads.start // 2, heads.stop // 2)
        out, pullback = target.vjp(
            q[:, heads], k[:, kv], v[:, kv], wrt=(name,), **{name: value[heads]}
        )
        found.append(pullback(out)[3])
    assert same_bits(found[0][2:4], found[1])
