"""Distances and additive scores of the NumPy backend, dimension by dimension.

One dimension of a tile is as large as its scores, so no array has an axis more than these.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ...core.problem import DOT, ScoreFunction

__all__ = [
    "product_tangents",
    "score_function_gradients",
    "unscaled_scores",
    "where_visible",
]

# Dimensions that are summed from zero before they join the running sum, which alone would have
# several times the rounding error of `numpy.sum`.
CHUNK = 16


def unscaled_scores(fn: ScoreFunction, q, k) -> np.ndarray:
    """(..., queries, keys) from q (..., queries, head_dim) and k (..., keys, head_dim)."""
    distances = fn.name != "additive"
    total = _sum(_squares(q, k) if distances else _tanhs(fn, q, k))
    if not distances:
        return total
    if fn.name == "squared distance":  # of finite vectors that overflows to the largest number
        return _within_range(total, q, k)
    roots, limits, two = np.sqrt(total), np.finfo(q.dtype), q.dtype.type(2)
    # The squares of finite numbers may overflow though the distance does not; and small ones lose
    # their digits.
    far, near = np.isinf(total), total < two ** (limits.minexp + limits.nmant + 4)
    if far.any():
        unit = two ** (limits.maxexp // 2)
        roots = np.where(far, np.sqrt(_sum(_squares(q / unit, k / unit))) * unit, roots)
    if near.any():
        unit = two ** (limits.minexp // 4 * 3)
        roots = np.where(near, np.sqrt(_sum(_squares(q, k, unit))) * unit, roots)
    return roots


def _within_range(squares, q, k) -> np.ndarray:
    far = np.isinf(squares)
    if far.any():
        finite = np.isfinite(q).all(axis=-1)[..., None] & np.isfinite(k).all(axis=-1)[..., None, :]
        squares = np.where(far & finite, np.finfo(squares.dtype).max, squares)
    return squares


def score_function_gradients(fn: ScoreFunction, q, k, seen, grad):
    """``(grad_q, grad_k, grad_w)`` of what `unscaled_scores` returns, from its gradient
    `grad`, each with all leading axes of that but for `grad_w`, (head_dim,).
    """
    shape = grad.shape[:-2]
    grad_q, grad_k = (np.empty((*shape, *x.shape[-2:]), q.dtype) for x in (q, k))
    grad_w = np.zeros(q.shape[-1], q.dtype)
    if fn.name == "distance":
        lengths = unscaled_scores(fn, q, k)
        grad = np.where(lengths == 0, 0, grad / np.where(lengths == 0, 1, lengths))
    elif fn.name == "squared distance":
        grad = 2 * grad
    for d in range(q.shape[-1]):
        x, y = q[..., :, None, d], k[..., None, :, d]
        if fn.name != "additive":
            terms = grad * (x - y)
            sign = -1
        else:
            tanh = np.tanh(x + y)
            terms = grad * (1 - tanh * tanh) * fn.weights[d].astype(q.dtype)
            grad_w[d] = where_visible(seen, grad * tanh).sum()
            sign = 1
        terms = where_visible(seen, terms)
        grad_q[..., d] = terms.sum(axis=-1)
        grad_k[..., d] = sign * terms.sum(axis=-2)
    return grad_q, grad_k, grad_w


def product_tangents(fn: ScoreFunction, scale, q, k, d_scale, dq, dk) -> np.ndarray:
    """The tangent of ``scale`` times what `fn` makes of `q` and `k`, of which some, of `DOT` the
    scale too, have tangents and the others None.
    """
    real = q.dtype
    if fn is not DOT:
        if dq is dk is None:
            return np.zeros((*q.shape[:-1], k.shape[-2]), real)
        return scale.astype(real) * _unscaled_tangents(fn, q, k, dq, dk)
    terms = [] if dq is None else [dq * scale.astype(real)]
    if d_scale is not None:
        terms.append(q * d_scale.astype(real))
    products = [sum(terms) @ k.swapaxes(-1, -2)] if terms else []
    if dk is not None:
        products.append((q * scale.astype(real)) @ dk.swapaxes(-1, -2))
    return sum(products) if products else np.zeros((*q.shape[:-1], k.shape[-2]), real)


def _unscaled_tangents(fn: ScoreFunction, q, k, dq, dk) -> np.ndarray:
    total = _sum(_tangent_terms(fn, q, k, dq, dk))
    if fn.name == "squared distance":
        return 2 * total
    if fn.name == "distance":
        lengths = unscaled_scores(fn, q, k)
        return np.where(lengths == 0, 0, total / np.where(lengths == 0, 1, lengths))
    return total


def _tangent_terms(fn: ScoreFunction, q, k, dq, dk):
    sign = 1 if fn.name == "additive" else -1
    for d in range(q.shape[-1]):
        x, y = q[..., :, None, d], k[..., None, :, d]
        dx = 0 if dq is None else dq[..., :, None, d]
        dy = 0 if dk is None else sign * dk[..., None, :, d]
        if fn.name == "additive":
            yield fn.weights[d].astype(q.dtype) * (1 - np.tanh(x + y) ** 2) * (dx + dy)
        else:
            yield (x - y) * (dx + dy)


def _squares(q, k, unit=None):
    for d in range(q.shape[-1]):
        away = q[..., :, None, d] - k[..., None, :, d]
        if unit is not None:
            away /= unit
        away *= away
        yield away


def _tanhs(fn: ScoreFunction, q, k):
    for d, weight in enumerate(fn.weights.astype(q.dtype)):
        term = q[..., :, None, d] + k[..., None, :, d]
        np.tanh(term, out=term)
        term *= weight
        yield term


def _sum(terms: Iterator[np.ndarray]) -> np.ndarray:
    total: Any = 0
    for part in terms:
        for term in islice(terms, CHUNK - 1):
            part += term
        total = total + part
    return total


def where_visible(seen, x):
    """`x` where a key is seen, 0 elsewhere; `seen` is None if all are seen."""
    return x if seen is None else np.where(seen, x, 0)
