"""Gradients through the other scores and through layers, against finite differences."""

import numpy as np
import pytest
from helpers.gradients import exact_gradients, plain_gradients, random_like
from helpers.oracles import assert_exact_enough, judging_dtype
from helpers.problems import Shape, options
from test_similarity import SPREADS, spread

import fastattn
from fastattn import MultiHeadAttention
from fastattn.core.problem import SQUARED_DISTANCE, make_problem

SHAPE = Shape(2, 4, 6, 9, 5, kv_heads=2, value_dim=3)
RNG = np.random.default_rng(2)


def skip_unserved(target, **opts):
    reason = target.unsupported_backward(*SHAPE.arrays("float64"), **opts)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")


@pytest.fixture
def target(target):
    skip_unserved(target)
    return target


def check(target, function, arrays, named=None, with_lse=True, **opts):
    """Along a random direction of each array, the gradients are the slopes of a random loss."""
    named = named or {}
    if "bias" in named:
        skip_unserved(target, bias=named["bias"], wrt=("bias",))
    (out, lse), pullback = fastattn.vjp(
        function, *arrays, wrt=tuple(named), return_lse=True, backend=target.backend, **named,
        **opts,
    )  # fmt: skip
    grad_out = random_like(out)
    grad_lse = np.where(np.isfinite(lse), random_like(lse, 8), 0) if with_lse else None
    found = pullback(grad_out, grad_lse)
    assert len(found) == len(arrays) + len(named)

    def loss(moved):
        values, names = moved[: len(arrays)], dict(zip(named, moved[len(arrays) :], strict=True))
        out, lse = function(*values, return_lse=True, backend=target.backend, **names, **opts)
        more = 0 if grad_lse is None else (grad_lse * np.where(np.isfinite(lse), lse, 0)).sum()
        return (grad_out * out).sum() + more

    assert_slopes(loss, [*arrays, *named.values()], found)


def assert_slopes(loss, arrays, found):
    step = 1e-5
    for n, (x, gradient) in enumerate(zip(arrays, found, strict=True)):
        assert gradient.shape == np.shape(x)
        assert gradient.dtype == np.float64
        direction = random_like(np.asarray(x, float), 9)
        up, down = (
            loss([y + sign * step * direction if m == n else y for m, y in enumerate(arrays)])
            for sign in (1, -1)
        )
        # Central differences: an error of step**2 and of the losses' last digits over the step.
        slope = (up - down) / (2 * step)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


FUNCTIONS = [
    (fastattn.dot, {}),
    (fastattn.cosine, {"temperature": 0.3}),
    (fastattn.gaussian, {"alpha": 0.3}),
    (fastattn.gaussian, {"alpha": 0.3, "normalize": False, "exclude_self": True, "q_offset": 0}),
]  # fmt: skip


@pytest.mark.parametrize("names", [(), ("causal",), ("kv_lengths",), ("mask", "bias")])
@pytest.mark.parametrize("function, how", FUNCTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_scores(target, function, how, names):
    chosen = options(names, SHAPE)
    named = {"bias": chosen.pop("bias").astype(float)} if "bias" in chosen else {}
    check(target, function, SHAPE.arrays("float64"), named, **how, **chosen)


@pytest.mark.parametrize("function, how", FUNCTIONS, ids=lambda x: getattr(x, "__name__", ""))
def test_two_dimensional_and_broadcast(target, function, how):
    q, k, v = SHAPE.arrays("float64")
    check(target, function, (q[0, 0], k[0, 0], v[0, 0]), **how)
    check(target, function, (q[:1, :1], k[:, :1], v), **how)


@pytest.mark.parametrize("how", [{}, {"exclude_self": True}], ids=str)
def test_gaussian_with_sinks(target, how):
    q, k, v = SHAPE.arrays("float64")
    named = {"sinks": RNG.standard_normal(4) - 2, "bias": RNG.standard_normal((6, 9))}
    check(target, fastattn.gaussian, (q + 50, k + 50, v), named, alpha=0.3, **how)


@pytest.mark.parametrize("how", [{}, {"normalize": False}, {"exclude_self": True}], ids=str)
def test_gaussian_of_a_large_spread(target, how):
    q, k, v = SHAPE.arrays("float64")
    q, k = 30 * q, 30 * k
    k[..., :6, :] = q[:, ::2] + 0.1
    named = {"bias": RNG.standard_normal((1, 9)), "alibi": RNG.random(4)}
    check(target, fastattn.gaussian, (q, k, v), named, alpha=0.3, q_offset=0, **how)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", SPREADS)
def test_gradients_of_a_large_spread(target, case, dtype):
    """Promise 1, beside squares of differences."""
    q, k, v, alpha = spread(case, dtype)
    out, pullback = fastattn.vjp(fastattn.gaussian, q, k, v, alpha=alpha, backend=target.backend)
    p = make_problem(q, k, v, scale=-alpha, score_function=SQUARED_DISTANCE, gradients=True)
    grads = random_like(out), np.zeros((1, len(q)))
    exact, plain = exact_gradients(p, *grads, judging_dtype(p)), plain_gradients(p, *grads)
    for got, truth, yardstick, g in zip(pullback(grads[0]), exact, plain, p.gradients, strict=True):
        assert_exact_enough(got, truth, yardstick, g.dtype, f"gradient of {g.name}")


def test_gaussian_of_padding(target):
    """What nobody sees has gradient 0, NaN or not, and touches no other."""
    q, k, v = SHAPE.arrays("float64")
    found = []
    for padding in (0, np.nan):
        k[:, :, 6:], v[:, :, 6:] = padding, padding
        out, pullback = fastattn.vjp(fastattn.gaussian, q, k, v, kv_lengths=6,
                                     backend=target.backend)  # fmt: skip
        found.append(pullback(out))
    assert not found[1][1][:, :, 6:].any() and not found[1][2][:, :, 6:].any()
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_cosine_of_zero_has_gradient_zero(target):
    q, k, v = SHAPE.arrays("float64")
    q[0, 0, 2], k[1, 1, 3] = 0, 0
    out, pullback = fastattn.vjp(fastattn.cosine, q, k, v, backend=target.backend)
    dq, dk, _ = pullback(out)
    assert not dq[0, 0, 2].any() and not dk[1, 1, 3].any()
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


@pytest.mark.parametrize("poolings", [None, 3])
def test_pool(target, poolings):
    skip_unserved(target, bias=np.zeros(9), wrt=("bias",))  # which b is
    x = RNG.standard_normal((2, 7, 5))
    w = RNG.standard_normal(5 if poolings is None else (5, poolings))
    b = np.float64(0.3) if poolings is None else RNG.standard_normal(3)
    check(target, fastattn.pool, (x, w), {"b": b}, mask=RNG.random((2, 7)) < 0.8)
    check(target, fastattn.pool, (x[0], w), with_lse=False, kv_lengths=4)


@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_layer(target, kv_heads, inputs):
    dims = {} if inputs == 1 else {"key_dim": 6, "value_dim": 5 if inputs == 3 else None}
    layer = MultiHeadAttention(8, 4, kv_heads=kv_heads, dtype="float64", rng=0, **dims)
    arrays = [RNG.standard_normal((2, 4, 8)), RNG.standard_normal((1, 7, 6)),
              RNG.standard_normal((2, 7, 5))][:inputs]  # fmt: skip
    names = [*layer.parameters, "sinks"]
    sinks = RNG.standard_normal(4)
    values = [*(RNG.standard_normal(x.shape) for x in layer.parameters.values()), sinks]

    def call(*moved):
        for name, x in zip(names[:-1], moved[inputs:-1], strict=True):
            setattr(layer, name, x)
        return layer(*moved[:inputs], sinks=moved[-1], return_lse=True, backend=target.backend)

    out, lse = call(*arrays, *values)
    grads = random_like(out), random_like(lse, 8)
    _, pullback = fastattn.vjp(layer, *arrays, wrt=tuple(names), sinks=sinks, return_lse=True,
                               backend=target.backend)  # fmt: skip
    found = pullback(*grads)
    assert_slopes(
        lambda moved: sum((g * x).sum() for g, x in zip(grads, call(*moved), strict=True)),
        [*arrays, *values],
        found,
    )


@pytest.mark.parametrize("function, arrays, opts, error, message", [
    (fastattn.dot, (1, 2, 3), {}, ValueError, "q: expected at least 2 axes"),
    (fastattn.dot, SHAPE.arrays(), {"wrt": ("scale",)}, ValueError, "wrt: expected some of"),
    (fastattn.cosine, SHAPE.arrays(), {"temperature": 0}, ValueError, "temperature: expected"),
    (fastattn.cosine, SHAPE.arrays(), {"scale": 1.0}, TypeError, "scale: expected None, got float"),
    (fastattn.pool, (np.ones((3, 2)), np.ones(2)), {"wrt": ("w",)}, ValueError, "wrt: "),
    (fastattn.pool, (np.ones((3, 2)), np.ones(2)), {"wrt": "b"}, TypeError, "wrt: expected"),
    (fastattn.pool, (np.ones((3, 2)), np.ones(2)), {"wrt": 1}, TypeError, "wrt: expected"),
    (MultiHeadAttention(4, 2), (np.ones((3, 4)),), {"wrt": "w_q"}, TypeError, "wrt: expected"),
    (MultiHeadAttention(4, 2), (np.ones((3, 4)),), {"wrt": ("w",)}, ValueError, "wrt: expected"),
    (MultiHeadAttention(4, 2), (np.ones((3, 5)),), {}, ValueError, "query: expected shape"),
])  # fmt: skip
def test_errors(function, arrays, opts, error, message):
    with pytest.raises(error, match="^" + message):
        fastattn.vjp(function, *arrays, **opts)
