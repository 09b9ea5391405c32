"""What gradients are measured against: the definition's, and those of a NumPy user."""

import numpy as np

from fastattn.backward import of_its_array
from fastattn.core.backward import Backward
from fastattn.core.option_table import DIFFERENTIABLE
from helpers.oracles import (
    assert_exact_enough,
    definition,
    judging_dtype,
    make_problem,
    plain_measure,
    plain_numpy,
    reference,
)
from helpers.remembered import remembered

ARRAY_OPTIONS = DIFFERENTIABLE


@remembered
def exact_gradients(p, grad_out, grad_lse=None, real=np.float64) -> list[np.ndarray]:
    """The definition's, from a forward pass that is not rounded between."""
    out, lse, _ = definition(p, real)
    grads = (None if x is None else with_heads(x, p).astype(real) for x in (grad_out, grad_lse))
    grad_out, grad_lse = grads
    found = reference.gradients(Backward(p, out, lse, grad_out, grad_lse), real)
    return [of_its_array(found[g.name], g._replace(dtype=np.dtype(real))) for g in p.gradients]


@remembered
def plain_gradients(p, grad_out, grad_lse=None) -> list[np.ndarray]:
    """As a NumPy user would write them, every step in the dtype of `p`."""
    real = p.dtype
    with np.errstate(all="ignore"):
        out, _, weights, _ = plain_numpy(p, real)
        grad_out = with_heads(grad_out, p).astype(real)
        seen = reference.visible(p)
        q = np.broadcast_to(p.q, p.rows(p.head_dim))
        k, v = (reference.per_query_head(x, p) for x in (p.k, p.v))
        delta = (grad_out * out).sum(axis=-1)
        if grad_lse is not None:
            delta = delta - with_heads(grad_lse, p).astype(real)
        grad_weights = (grad_out @ v.swapaxes(-1, -2)).astype(real)
        grad_weights, used = (reference.dropped(x, p).astype(real) for x in (grad_weights, weights))
        grad_s = weights * (grad_weights - delta[..., None])
        grad_s = np.where(seen, grad_s, np.zeros((), real))
        slope, scale = np.ones((), real), np.asarray(p.scale).astype(real)[..., None, None]
        if p.softcap is not None:
            s = plain_measure(p, q, k).astype(real) * scale
            slope = 1 - np.tanh(s / real.type(p.softcap)) ** 2
        scaled = (grad_s * slope * scale).astype(real)
        steps = (grad_out, delta)
        found = {
            **plain_measure_gradients(p, q, k, scaled),
            "v": reference.per_key_head((used.swapaxes(-1, -2) @ steps[0]).astype(real), p),
            "bias": grad_s,
        }
        leading = tuple(range(len(p.batch)))
        terms = np.where(seen, grad_s * slope * plain_measure(p, q, k), 0).astype(real)
        found["scale"] = terms.sum(axis=(-1, -2)).sum(axis=leading)
        if p.relative_bias is not None:
            found["relative_bias"] = np.zeros(p.relative_bias.shape, real)
            np.add.at(found["relative_bias"], reference.distance_index(p), grad_s)
        if p.alibi is not None:
            i, j = reference.positions(p)
            apart = np.abs(i - j).astype(real)
            found["alibi"] = -(grad_s * apart).sum(axis=(-1, -2)).sum(axis=leading)
        if p.sinks is not None:
            rest = (1 - weights.sum(axis=-1)).astype(real)
            found["sinks"] = -(rest * delta).sum(axis=-1).sum(axis=leading)
        return [of_its_array(found[g.name].astype(real), g) for g in p.gradients]


def plain_measure_gradients(p, q, k, grad) -> dict[str, np.ndarray]:
    """What goes through the score's measure; finite inputs only."""
    if p.score_function.name == "dot":
        grad_k = (grad.swapaxes(-1, -2) @ q).astype(p.dtype)
        return {"q": grad @ k, "k": reference.per_key_head(grad_k, p)}
    q, k, grad = q[..., :, None, :], k[..., None, :, :], grad[..., None]
    weights = p.score_function.weights.astype(p.dtype)
    if p.score_function.name.endswith("distance"):
        terms = 2 * grad * (q - k)
        if p.score_function.name == "distance":
            terms = grad * (q - k) / np.sqrt(((q - k) ** 2).sum(axis=-1, keepdims=True))
        return {"q": terms.sum(axis=-2), "k": reference.per_key_head(-terms.sum(axis=-3), p)}
    tanh = np.tanh(q + k)
    terms = grad * weights * (1 - tanh * tanh)
    return {
        "q": terms.sum(axis=-2),
        "k": reference.per_key_head(terms.sum(axis=-3), p),
        "w": (grad * tanh).sum(axis=tuple(range(grad.ndim - 1))),
    }


def with_heads(x, p) -> np.ndarray:
    x = np.asarray(x)
    return x[None] if p.one_head else x


def random_like(x, seed=7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(np.shape(x)).astype(np.asarray(x).dtype)


def check_gradients(
    target, q, k, v, *, wrt=None, with_lse=True, grad_size=None, judged=None, **options
):
    """Gradients on `target` are as exact as promise 1 wants results to be; returns them.

    By default those of every array option that is given, and with a gradient through lse.
    `grad_size` is rows of the gradient that arrives, and what they are multiplied by; `judged` are
    the gradients to look at, all by default.
    """
    if wrt is None:
        wrt = tuple(name for name in ARRAY_OPTIONS if name in options)
    results, pullback = target.vjp(q, k, v, wrt=wrt, return_lse=True, **options)
    grads = [random_like(x, seed) for seed, x in enumerate(results)]
    if not with_lse:
        grads[1] = None
    if grad_size is not None:
        rows, size = grad_size
        grads[0][..., rows, :] *= np.float32(size)
    found = pullback(*grads)
    options.pop("threads", None)
    p = make_problem(q, k, v, gradients=True, wrt=wrt, **options)
    exact, plain = exact_gradients(p, *grads, judging_dtype(p)), plain_gradients(p, *grads)
    assert len(found) == len(p.gradients) == 3 + len(wrt)
    for got, truth, yardstick, g in zip(found, exact, plain, p.gradients, strict=True):
        assert got.shape == g.shape
        if judged is not None and g.name not in judged:
            continue
        if g.name == "scale":  # so few sums of so much that the size of their errors is luck
            yardstick = truth + 2 * (yardstick - truth)
        assert_exact_enough(got, truth, yardstick, g.dtype, f"gradient of {g.name}")
    return found
