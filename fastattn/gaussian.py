"""Attention by distance: the Gaussian kernel as a scaled dot product of one more dimension."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .api import scaled_dot
from .arguments import flag, plain
from .backward import of_its_array, scaled_dot_backward
from .backward_problem import Backward, pose_backward
from .dispatch import select, unsupported_backward
from .merge import merge
from .problem import Gradient, Problem, pose
from .results import empty_like
from .scores import positive, refuse
from .seen import seen_keys
from .vjp import differentiates

__all__ = ["gaussian"]


def gaussian(
    q, k, v, *, alpha=1.0, normalize=True, exclude_self=False,
    return_lse=False, return_weights=False, out=None, **options,
):  # fmt: skip
    """Exact attention by distance: the score is ``-alpha * |q_i - k_j|**2``.

    Parameters
    ----------
    q, k, v : array_like, (..., Hq, Sq, D), (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        As of `fastattn.scaled_dot`; in the host's memory.
    alpha : float, default 1.0
        Finite and > 0.
    normalize : bool, default True
        Divide by the sum of the weights, as softmax does: the Nadaraya-Watson kernel smoother. If
        False the weights are ``exp(score)`` as they are, and so is their sum of the values.
    exclude_self : bool, default False
        Hide the key ``j == i + q_offset``, which with as many queries as keys is the query itself.
        With `kv_lengths` it requires `q_offset`.
    return_lse, return_weights, out, **options
        As of `fastattn.scaled_dot`, except ``scale`` and ``softcap``, and ``sinks`` only where
        `normalize` is True. `bias` and `alibi` change the score after the distance.

    Returns
    -------
    out : ndarray, (..., Hq, Sq, Dv)
        As of `fastattn.scaled_dot`.
    lse : ndarray, (..., Hq, Sq), if `return_lse`
        Logarithm of the sum of ``exp(score)``, with `normalize` or without.
    weights : ndarray, (..., Hq, Sq, Sk), if `return_weights`

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, and where an option has no meaning here.

    Notes
    -----
    ``-alpha |q - k|**2 = 2 alpha (q.k - |k|**2 / 2) - alpha |q|**2``: the first term is a dot
    product of vectors with one more number, the last a factor of each query. So that they do not
    cancel far from the origin, the mean of the keys that are seen is subtracted from keys and
    queries first, for each batch entry and each head of the keys; half precision is computed in
    float32. The smoother is Nadaraya (1964), "On Estimating Regression", and Watson (1964), "Smooth
    Regression Analysis", equation 2.

    Examples
    --------
    >>> import fastattn
    >>> data = [[1, 2], [3, 4], [5, 6]]
    >>> fastattn.gaussian(data, data, data, alpha=0.5, normalize=False).round(3)
    array([[1.055, 2.073],
           [3.11 , 4.147],
           [5.055, 6.073]])
    >>> fastattn.gaussian(data, data, data, alpha=0.5, exclude_self=True).round(3)
    array([[3., 4.],
           [3., 4.],
           [3., 4.]])
    """
    lifted = _lift(q, k, v, alpha, normalize, exclude_self, options, out=out,
                   return_lse=return_lse, return_weights=return_weights)  # fmt: skip
    results = _results(lifted, *_attend(lifted))
    if out is not None:
        out[...] = results[0]
        results[0] = out
    return tuple(results) if len(results) > 1 else results[0]


class _Lifted(NamedTuple):
    """A call of `gaussian` as one of `scaled_dot`, in the accumulator's dtype."""

    problem: Problem  # what was asked, validated
    q: np.ndarray  # (batch, heads, queries, head_dim + 1)
    k: np.ndarray  # (batch, kv_heads, keys, head_dim + 1)
    v: np.ndarray
    distance: np.ndarray  # (batch, heads, queries): alpha times that of the query to 0, squared
    normalize: bool
    parts: tuple  # the spans of one call each, over disjoint keys
    options: dict


def _lift(q, k, v, alpha, normalize, exclude_self, options, **results) -> _Lifted:
    refuse("gaussian", options, "scale", "softcap")
    alpha = positive("alpha", alpha)
    normalize, exclude_self = flag("normalize", normalize), flag("exclude_self", exclude_self)
    q, k, v = (plain(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    backend = options.pop("backend", None)
    p = pose(q, k, v, **options, **results)
    if p.sinks is not None and not normalize:
        raise ValueError("sinks: given with normalize=False, which divides by nothing")
    if exclude_self and p.key_range.lengths is not None and options.get("q_offset") is None:
        raise ValueError(
            "q_offset: None given with kv_lengths and exclude_self; pass 0 for a padded batch of "
            "whole sequences, kv_lengths - n_queries for a cache"
        )
    parts = _without_self(p) if exclude_self else (p.key_range.spans,)
    with np.errstate(all="ignore"):
        centre = _centre(
            [replace(p, key_range=replace(p.key_range, spans=spans)) for spans in parts]
        )
        k, squares = _moved(p.k, centre)
        far = np.isinf(squares)  # a score of -inf, whatever the query: not Inf - Inf
        if far.any():
            k[far] = 0
        k[..., -1] = -squares / 2
        if p.group > 1:
            centre = np.repeat(centre, p.group, axis=-3)
        q, squares = _moved(p.q, centre)
        q[..., -1] = 1
    for name in ("sinks", "spans"):
        options.pop(name, None)
    options |= {"scale": 2 * alpha, "backend": backend}
    v = p.v.astype(p.accumulator, copy=False)
    return _Lifted(p, q, k, v, alpha * squares, normalize, parts, options)


def _moved(x, centre):
    """``x - centre`` with room for one more number, in the memory order of `x`, and the squares of
    its lengths.
    """
    shape = np.broadcast_shapes(x.shape, centre.shape)
    moved = empty_like(x, (*shape[:-1], shape[-1] + 1), centre.dtype)
    vectors = np.subtract(x, centre, out=moved[..., :-1])
    return moved, np.einsum("...d,...d->...", vectors, vectors)


def _without_self(p: Problem):
    """The spans before and after each query's own place on the key axis."""
    start, stop = (0, p.n_keys) if p.key_range.spans is None else p.key_range.spans
    offset = p.q_offset
    if isinstance(offset, np.ndarray):
        offset = offset[..., None, None]
    place = np.arange(p.n_queries) + offset
    return (start, np.minimum(stop, place)), (np.maximum(start, place + 1), stop)


def _centre(parts: list[Problem]) -> np.ndarray:
    """The mean of the keys that are seen and finite: (batch, kv_heads, 1, head_dim)."""
    p = parts[0]
    seen = functools.reduce(np.logical_or, map(seen_keys, parts))
    total, count = p.k.sum(axis=-2, keepdims=True, dtype=np.float64), p.n_keys
    if not (seen.all() and np.isfinite(total).all()):  # or else there is nothing to leave out
        used = (seen & np.isfinite(p.k).all(axis=-1))[..., None]
        total = np.where(used, p.k, 0).sum(axis=-2, keepdims=True, dtype=np.float64)
        count = used.sum(axis=-2, keepdims=True)
    return (total / np.maximum(count, 1)).astype(p.accumulator)


def _attend(lifted: _Lifted):
    """``(out, lse, weights)`` of the softmax, with the lse of the lifted scores."""
    p = lifted.problem
    parts = [
        scaled_dot(
            lifted.q, lifted.k, lifted.v, spans=spans, return_lse=True,
            return_weights=p.return_weights, **lifted.options,
        )
        for spans in lifted.parts
    ]  # fmt: skip
    if len(parts) == 1:
        return (*parts[0], None)[:3]
    out, lse = merge(*(part[:2] for part in parts))
    if not p.return_weights:
        return out, lse, None
    with np.errstate(all="ignore"):
        shares = (np.where(own == -np.inf, 0, np.exp(own - lse)) for _, own, _ in parts)
        terms = (x[..., None] * part[2] for x, part in zip(shares, parts, strict=True))
        weights = functools.reduce(np.add, terms)
    return out, lse, weights


def _results(lifted: _Lifted, y, lse, weights) -> list:
    """What `gaussian` returns, from what `_attend` does."""
    p = lifted.problem
    _, total, share = _shares(lifted, lse)
    results = [_scaled(y, share, p.dtype)]
    if p.return_lse:
        results.append(total)
    if p.return_weights:
        results.append(_scaled(weights, share, p.dtype))
    return [x[0] for x in results] if p.one_head else results


def _shares(lifted: _Lifted, lse):
    """``(lse, total, share)``: the logarithm of the sum of exp(score) without sinks and with, and
    by what the softmax is to be multiplied, None for 1.
    """
    p = lifted.problem
    with np.errstate(all="ignore"):
        lse = lse - lifted.distance
        if p.sinks is None and lifted.normalize:
            return lse, lse, None
        if p.sinks is None:
            return lse, lse, np.exp(lse)
        total = np.logaddexp(lse, p.sinks.astype(lse.dtype)[:, None])
        return lse, total, np.where(lse == -np.inf, 0, np.exp(lse - total))


def _scaled(x, share, dtype):
    with np.errstate(all="ignore"):
        if share is not None:
            x = x * share[..., None].astype(x.dtype, copy=False)
        return x.astype(dtype, copy=False)


@differentiates(gaussian)
def _gaussian(
    q, k, v, *, wrt, alpha=1.0, normalize=True, exclude_self=False, return_weights=False, **options
):
    wants_lse = flag("return_lse", options.pop("return_lse", False))
    asked = {"return_lse": True, "return_weights": return_weights, "gradients": True, "wrt": wrt}
    lifted = _lift(q, k, v, alpha, normalize, exclude_self, options, **asked)
    p = lifted.problem
    select(p, lifted.options["backend"], unsupported_backward)
    y, scores_lse, weights = _attend(lifted)
    out, total, *rest = _results(lifted, y, scores_lse, weights)

    def pullback(grad_out, grad_lse=None):
        b = pose_backward(p, grad_out, out, total, grad_lse)
        return tuple(
            of_its_array(found, gradient)
            for found, gradient in zip(
                _gradients(lifted, b, y, scores_lse), p.gradients, strict=True
            )
        )

    results = (out, *([total] if wants_lse else []), *rest)
    return (results if len(results) > 1 else out), pullback


def _gradients(lifted: _Lifted, b: Backward, y, scores_lse):
    """In the order of the problem's, not yet summed over axes that broadcast.

    ``out = y * share``, and the distance of a query to 0 is subtracted from its lse, so it gets
    minus what the lse gets.
    """
    p = lifted.problem
    lse, _, share = _shares(lifted, scores_lse)
    inner = tuple(gradient.name for gradient in p.gradients[3:] if gradient.name != "sinks")
    with np.errstate(all="ignore"):
        share = np.ones_like(lse) if share is None else share
        from_lse = np.zeros_like(lse) if b.grad_lse is None else b.grad_lse
        grad_y = b.grad_out.astype(p.accumulator, copy=False)
        along = (grad_y * y).sum(axis=-1) * share
        grad_y = grad_y * share[..., None]
        grad = along * (1 - share) + from_lse * share if lifted.normalize else along + from_lse
        grad = np.where(lse == -np.inf, 0, grad)
        parts = [
            scaled_dot_backward(grad_y, lifted.q, lifted.k, lifted.v, y, scores_lse, grad_lse=grad,
                                wrt=inner, spans=spans, **lifted.options)
            for spans in lifted.parts
        ]  # fmt: skip
        dq, dk, dv, *others = (functools.reduce(np.add, same) for same in zip(*parts, strict=True))
        outwards = Gradient("distance", (*lifted.q.shape[:-1], 1), grad.dtype)
        outward = lifted.options["scale"] * of_its_array(grad[..., None], outwards)
        dq = dq[..., :-1] - np.where(outward == 0, 0, outward * lifted.q[..., :-1])
        last = dk[..., -1:]
        dk = dk[..., :-1] - np.where(last == 0, 0, last * lifted.k[..., :-1])
        found = {"q": dq, "k": dk, "v": dv, **dict(zip(inner, others, strict=True))}
        if p.sinks is not None:
            axes = tuple(range(len(p.batch)))
            found["sinks"] = ((1 - share) * (from_lse - along)).sum(axis=-1).sum(axis=axes)
    return [found[gradient.name] for gradient in p.gradients]
