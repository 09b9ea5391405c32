"""Gradients of distances and additive scores: the definition's, finite differences, autograd."""

import numpy as np
import pytest
from helpers.gradients import exact_gradients, plain_gradients, random_like
from helpers.oracles import assert_exact_enough, judging_dtype, same_bits
from helpers.problems import Shape, options
from test_score_functions import parameters, problem_of

import fastattn
from fastattn.dispatch import named, unsupported_backward

SHAPE = Shape(2, 4, 6, 9, 5, kv_heads=2, value_dim=3)
LONG = Shape(1, 8, 20, 700, 6)  # several blocks of keys
BOTH = ("euclidean", "additive")
PARAMETERS = ("w_q", "w_k", "w", "b")


def arguments(name, shape=SHAPE, dtype="float64"):
    """Arrays and parameters; the widths of queries and keys of an additive score differ."""
    q, k, v = shape.arrays(dtype)
    if name == "euclidean":
        return (q, k, v), {}
    return (q, np.concatenate([k, k[..., :2] + 1], axis=-1), v), parameters(
        shape.head_dim, shape.head_dim + 2, hidden=7, dtype=dtype
    )


def vjp(target, name, arrays, given, wrt=(), **opts):
    """On this backend; skips the test where that cannot serve."""
    inner = tuple(n for n in wrt if n in ("bias", "alibi", "sinks"))
    p = problem_of(name, *arrays, **given, **opts, gradients=True, wrt=inner)
    reason = unsupported_backward(named(target.backend), p)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    function = getattr(fastattn, name)
    return fastattn.vjp(function, *arrays, wrt=wrt, backend=target.backend, return_lse=True,
                        **given, **opts)  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, LONG], ids=["small", "long"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BOTH)
def test_promise_1(target, name, dtype, shape):
    """As exact as plain NumPy's; of an additive score those of what the projections return."""
    (q, k, v), given = arguments(name, shape, dtype)
    if name == "additive":  # identities, so that what the kernels get and give is seen
        eye = np.eye(7, dtype=dtype)
        q, k = (np.ascontiguousarray(np.resize(x, (*x.shape[:-1], 7))) for x in (q, k))
        given |= {"w_q": eye, "w_k": eye, "b": np.zeros(7, dtype)}
    # An alibi that makes an lse of 70 would show how that is rounded, no matter the measure.
    alibi = ("alibi",) if shape is SHAPE else ()
    for seed, names in enumerate([("softcap", "-inf", "sinks"), ("causal", "mask", *alibi)]):
        opts = options(names, shape, seed)
        wrt = tuple(n for n in ("bias", "alibi", "sinks") if n in opts)
        own = ("w",) if name == "additive" else ()
        results, pullback = vjp(target, name, (q, k, v), given, wrt + own, **opts)
        grads = [random_like(x, seed) for seed, x in enumerate(results)]
        grads[1] = np.where(np.isfinite(results[1]), grads[1], 0)
        p = problem_of(name, q, k, v, **given, **opts, gradients=True, wrt=wrt + own)
        exact, plain = exact_gradients(p, *grads, judging_dtype(p)), plain_gradients(p, *grads)
        for got, truth, yardstick, g in zip(
            pullback(*grads), exact, plain, p.gradients, strict=True
        ):
            assert got.shape == g.shape
            assert_exact_enough(got, truth, yardstick, g.dtype, f"gradient of {g.name}")


@pytest.mark.parametrize("names", [(), ("causal",), ("kv_lengths", "softcap"), ("mask", "bias")])
@pytest.mark.parametrize("name", BOTH)
def test_finite_differences(target, name, names):
    """Along a random direction of every array and parameter; broadcast ones, too."""
    (q, k, v), given = arguments(name)
    opts = options(names, SHAPE)
    for arrays in ((q, k, v), (q[:1, :1], k[:, :1], v), (q[0, 0], k[0, 0], v[0, 0])):
        more = {n: x if arrays[0].ndim > 2 else x[(0,) * (x.ndim - 2)] if n in ("mask", "bias")
                else 5 if n == "kv_lengths" else x for n, x in opts.items()}  # fmt: skip
        if arrays[0].shape[0] == 1 and arrays[1].shape[1] == 1:
            more = {n: x for n, x in more.items() if n not in ("mask", "bias")}
        wrt = (*given, *(("bias",) if "bias" in more else ()))
        if "bias" in more:
            more["bias"] = more["bias"].astype(np.float64)
        moved = {n: x for n, x in more.items() if n in wrt}
        rest = {n: x for n, x in more.items() if n not in wrt}
        (out, lse), pullback = vjp(target, name, arrays, given, wrt, **more)
        grads = random_like(out), np.where(np.isfinite(lse), random_like(lse, 8), 0)

        def loss(values, wrt=wrt, rest=rest, grads=grads):
            out, lse = getattr(fastattn, name)(
                *values[:3], backend="reference", return_lse=True,
                **dict(zip(wrt, values[3:], strict=True)), **rest,
            )  # fmt: skip
            return (grads[0] * out).sum() + (grads[1] * np.where(np.isfinite(lse), lse, 0)).sum()

        values = [*arrays, *given.values(), *moved.values()]
        found = pullback(*grads)
        assert len(found) == len(values)
        step = 1e-5
        for n, (x, gradient) in enumerate(zip(values, found, strict=True)):
            assert gradient.shape == x.shape
            assert gradient.dtype == np.float64
            direction = random_like(x, 9)
            up, down = (
                loss([y + sign * step * direction if m == n else y for m, y in enumerate(values)])
                for sign in (1, -1)
            )
            # An error of step**2, and of the losses' last digits over the step.
            slope = (up - down) / (2 * step)
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", BOTH)
def test_autograd(target, name):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    arrays, given = arguments(name)
    results, pullback = vjp(target, name, arrays, given, tuple(given), causal=True)
    grads = random_like(results[0]), np.where(np.isfinite(results[1]), random_like(results[1]), 0)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (*arrays, *given.values())]
    q, k, v, *weights = tensors
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    if name == "euclidean":
        s = -torch.cdist(q, k)
    else:
        w_q, w_k, w, b = weights
        s = torch.tanh((q @ w_q + b)[..., :, None, :] + (k @ w_k)[..., None, :, :]) @ w
    seen = torch.ones(6, 9, dtype=torch.bool).tril(diagonal=3)
    s = s.masked_fill(~seen, -torch.inf)
    theirs = torch.softmax(s, dim=-1) @ v, torch.logsumexp(s, dim=-1)
    wanted = torch.autograd.grad(theirs, tensors, [torch.from_numpy(x) for x in grads])
    for got, want in zip(pullback(*grads), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_distance_of_zero_has_gradient_zero(target):
    (q, k, v), _ = arguments("euclidean")
    k[:, :, 3] = q[:, ::2, 2]
    alone = np.arange(9) == 3
    (_, _), pullback = vjp(target, "euclidean", (q[:, ::2], k, v), {}, mask=alone)
    dq, dk, _ = pullback(np.ones((2, 2, 6, 3)), np.ones((2, 2, 6)))
    assert not dq[:, :, 2].any()
    assert np.isfinite(dq).all() and np.isfinite(dk).all() and dk[:, :, 3].any()


@pytest.mark.parametrize("name", BOTH)
def test_padding_has_gradient_zero_and_touches_nothing(target, name):
    (q, k, v), given = arguments(name)
    found = []
    for padding in (0, np.nan, np.inf):
        k[:, :, 6:], v[:, :, 6:] = padding, padding
        (out, _), pullback = vjp(target, name, (q, k, v), given, tuple(given), kv_lengths=6)
        found.append(pullback(out))
    assert not found[1][1][:, :, 6:].any() and not found[1][2][:, :, 6:].any()
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", BOTH)
def test_same_bits_for_any_threads(target, name):
    if not target.bitwise:
        pytest.skip(f"{target.backend} does not promise it")
    arrays, given = arguments(name, Shape(2, 4, 150, 1100, 7, kv_heads=2), "float32")
    found = []
    for threads in (1, 3):
        wrt = tuple(given) or ("scale",)
        (out, _), pullback = vjp(target, name, arrays, given, wrt, causal=True, threads=threads)
        found.append(pullback(out))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_dtypes_of_gradients():
    """The wider of the array's and of the result's."""
    arrays, given = arguments("additive", dtype="float32")
    given["w_k"], given["w"] = given["w_k"].astype(np.float64), given["w"].astype(np.float16)
    out, pullback = fastattn.vjp(fastattn.additive, *arrays, wrt=PARAMETERS, **given)
    dtypes = [x.dtype.name for x in pullback(out)]
    assert dtypes == ["float32"] * 4 + ["float64"] + ["float32"] * 2
    arrays, given = arguments("additive", dtype="float16")
    out, pullback = fastattn.vjp(fastattn.additive, *arrays, wrt=PARAMETERS, **given)
    assert [x.dtype for x in pullback(out)] == [np.float16] * 7


ARRAYS, GIVEN = arguments("additive")


@pytest.mark.parametrize("name, opts, error, message", [
    ("euclidean", {"wrt": ("w",)}, ValueError, "wrt: expected some of 'scale', 'bias',.* got 'w'"),
    ("euclidean", {"wrt": ("bias",)}, ValueError, "wrt: expected .*, got 'bias' without bias="),
    ("euclidean", {"out": np.ones(3)}, ValueError, "out: expected None, got an array"),
    ("euclidean", {"scale": -1.0}, ValueError, "scale: expected a finite number > 0, got -1.0"),
    ("euclidean", {"backend": "numba"}, ValueError, "backend: 'numba' given, which cannot serve"),
    ("additive", {"wrt": ("v",)}, ValueError, "wrt: expected some of 'w_q', 'w_k', 'w', 'b', "),
    ("additive", {"wrt": "b"}, TypeError, "wrt: expected a tuple of names, got str"),
    ("additive", {"wrt": ("b",), "b": None}, ValueError, "wrt: expected .*, got 'b' without b="),
    ("additive", {"scale": 1.0}, TypeError, "scale: expected None, got float"),
    ("additive", {"w": np.ones(8)}, ValueError, r"w: expected shape .*, got \(8,\)"),
])  # fmt: skip
def test_errors(name, opts, error, message):
    arrays = ARRAYS if name == "additive" else (*ARRAYS[:1], ARRAYS[1][..., :5], ARRAYS[2])
    given = GIVEN if name == "additive" else {}
    with pytest.raises(error, match="^" + message):
        fastattn.vjp(getattr(fastattn, name), *arrays, **{**given, **opts})
