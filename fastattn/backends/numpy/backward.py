"""Gradients in plain NumPy: each tile's weights are made again from ``lse``, in O(S) memory.

Dao et al. (2022), "FlashAttention", algorithm 4, with the queries in the outer loop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...core.backward import Backward
from ...core.output import empty_like
from ...core.problem import DOT, Problem
from ...core.row_sums import RowSums, sink_weights
from . import sparse_backward
from .score_functions import score_function_gradients, unscaled_scores, where_visible
from .tiles import (
    Heads,
    capped_products,
    distance_index,
    distances,
    dropped,
    kept,
    key_blocks,
    keys_of,
    product,
    queries_of,
    query_blocks,
    scores,
    sums,
    values_of,
)

__all__ = [
    "add",
    "add_along_diagonals",
    "new_gradients",
    "run_backward",
    "unsupported_backward",
]


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    if problem.is_flex:
        return "a score_mod or mask_mod would be called for every score"
    return None


def run_backward(backward: Backward, functions=None) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, each of the accumulator's dtype
    and with the axes of the problem, of length 1 where its array broadcasts. `functions` makes
    those of `fastattn.flex` for some heads.
    """
    b, p = backward, backward.problem
    found = new_gradients(p)
    if p.is_sparse:
        sparse_backward.run_backward(b, found)
        return found
    with np.errstate(all="ignore"):
        for heads, queries in query_blocks(p, functions):
            _differentiate(b, heads, _rows(b, heads, queries), found)
    return found


def new_gradients(p: Problem) -> dict[str, np.ndarray]:
    """Zeros for every gradient that `p` asks for, by name."""
    found: dict[str, np.ndarray] = {}
    shared = {} if p.block_table is not None else {"k": p.k, "v": p.v}
    for name, x in {"q": p.q, **shared}.items():
        found[name] = empty_like(x, p.with_axes(x.shape), p.accumulator)
        found[name].fill(0)
    for gradient in p.gradients[3:]:
        shape = gradient.shape
        if gradient.name == "bias":
            shape = p.with_axes(shape)
        elif gradient.name == "scale":
            shape = (p.heads,)
        # A parameter's few numbers are sums over the whole batch, to be rounded once, at the end.
        real = p.accumulator if gradient.name == "bias" else np.float64
        found[gradient.name] = np.zeros(shape, real)
    return found


class _Rows(NamedTuple):
    """What a block of queries brings along; axes (kv_heads, group, queries, ...)."""

    queries: slice
    q: np.ndarray  # scaled for products
    grad_out: np.ndarray
    mean: np.ndarray  # of the weights' gradients
    delta: np.ndarray  # what is taken off every score's
    shift: np.ndarray  # the weights are exp(score - shift) / total
    total: np.ndarray


def _rows(b: Backward, h: Heads, queries: slice) -> _Rows:
    p, real = b.problem, b.problem.accumulator

    def block(x):
        x = x[h.where][:, queries]
        return x.reshape(*h.shape, *x.shape[1:]).astype(real)

    q = queries_of(p, h, queries)
    grad_out, lse = block(b.grad_out), block(b.lse)
    mean = (grad_out * block(b.out)).sum(axis=-1)
    delta = mean if b.grad_lse is None else mean - block(b.grad_lse)
    rows = _Rows(queries, q, grad_out, mean, delta, lse, np.ones_like(lse))
    bound = np.broadcast_to(b.coarse(), p.n_queries)[queries]
    coarse = np.isfinite(lse) & (np.abs(lse) > bound)
    if not coarse.any():
        return rows
    shift, total = sums(p, h, q, queries)
    coarse &= b.replaces(shift + np.log(total.astype(np.float64)), lse)
    return rows._replace(shift=np.where(coarse, shift, lse), total=np.where(coarse, total, 1))


def _differentiate(b: Backward, h: Heads, r: _Rows, found: dict[str, np.ndarray]) -> None:
    """Add what one block of queries contributes to every gradient."""
    p, real = b.problem, b.problem.accumulator.type
    unmodified = h._replace(functions=None)
    grad_q = np.zeros_like(r.q)
    scale = h.scale.astype(real)
    # Of what a score is multiplied by where the gradient of its scale is, and of distances.
    scale_sums, row_sums = np.zeros((2, 4, *r.delta.shape))
    for keys in key_blocks(p, h, r.queries):
        k, v = keys_of(p, h, keys), values_of(p, h, keys)
        products = capped_products(p, h, r.q, keys)
        s, seen = plain, plain_seen = scores(p, unmodified, products, r.queries, keys)
        if h.functions is not None:
            s, seen = h.functions.modified(plain, plain_seen, r.queries, keys)
        seen_by = None if seen is None else np.broadcast_to(seen, s.shape).swapaxes(-1, -2)
        weights = np.exp(s - r.shift[..., None]) / r.total[..., None]
        weights = where_visible(seen, weights)
        keep = kept(p, h, r.queries, keys)
        grad_weights = dropped(p, r.grad_out @ v.swapaxes(-1, -2), keep)
        grad_s = weights * (grad_weights - r.delta[..., None])
        grad_s = where_visible(seen, grad_s)
        if h.functions is not None:
            grad_s = h.functions.before(grad_s, plain, seen, r.queries, keys)
        if "bias" in found:
            add(found["bias"], (*h.where, r.queries, keys), grad_s)
        if "relative_bias" in found:
            add_along_diagonals(found["relative_bias"][h.where[-1]], h, r.queries, keys, grad_s)
        if "alibi" in found:
            row_sums += _row_sums(weights, grad_s, distances(h, r.queries, keys))
        slope = None if p.softcap is None else 1 - (products / real(p.softcap)) ** 2
        if "scale" in found:
            unscaled = _unscaled(p, h, r.queries, k)
            unscaled = unscaled if slope is None else unscaled * slope
            scale_sums += _row_sums(weights, grad_s, where_visible(seen, unscaled))
        if slope is not None:
            grad_s = where_visible(seen, grad_s * slope)
        of_keys = (*h.kv_where, keys, slice(None))
        if p.score_function is DOT:
            grad_q += product(grad_s, seen, k)
            grad_k = product(grad_s.swapaxes(-1, -2), seen_by, r.q)
        else:
            more_q, grad_k, more_w = score_function_gradients(
                p.score_function, r.q, k, seen, grad_s * scale
            )
            grad_q += more_q
            if "w" in found:
                found["w"] += more_w
        used = dropped(p, weights, keep).swapaxes(-1, -2)
        grad_v = product(used, seen_by, r.grad_out)
        for name, x in (("k", grad_k), ("v", grad_v)) if "k" in found else ():
            add(found[name], of_keys, x.sum(axis=1, keepdims=True))
    if p.score_function is DOT:
        grad_q *= scale
    add(found["q"], (*h.where, r.queries, slice(None)), grad_q)
    sink = np.zeros(())
    if h.sinks is not None:
        sink = sink_weights(h.sinks, np.exp(h.sinks - r.shift) / r.total)
    if "sinks" in found:
        found["sinks"][h.where[-1]] -= (sink * r.delta).sum(axis=-1).ravel()
    for name, sign, parts in (("scale", 1, scale_sums), ("alibi", -1, row_sums)):
        if name in found:
            totals = RowSums(*parts)
            slopes = totals.slopes
            if p.score_mod is None:  # or they are gradients of other scores than the weights are of
                passing = r.mean, r.mean - r.delta, sink, b.tolerance(r.shift)
                _, slopes = totals.settled(*passing)
            found[name][h.where[-1]] += sign * slopes.sum(axis=-1).ravel()


def add_along_diagonals(found, h: Heads, queries: slice, keys: slice, grad_s) -> None:
    """Add a tile to the gradient of the relative bias of its heads, (heads, 2 R + 1)."""
    index, last = distance_index(h, queries, keys), found.shape[-1] - 1
    tiles = grad_s.reshape(len(found), *index.shape)
    for end in {0, last}:  # where sums are long: by rows, in pairs
        of_rows = np.where(index == end, tiles, 0).sum(axis=-1, dtype=np.float64)
        found[:, end] += of_rows.sum(axis=-1)
    inner = (index > 0) & (index < last)
    for row, tile in zip(found, tiles, strict=True):
        row += np.bincount(index[inner], tile[inner], len(row))


def _unscaled(p: Problem, h: Heads, queries: slice, k) -> np.ndarray:
    """What the scale of a tile's scores multiplies."""
    q, k = h.q[:, :, queries].astype(np.float64), k.astype(np.float64)
    return (
        q @ k.swapaxes(-1, -2)
        if p.score_function is DOT
        else unscaled_scores(p.score_function, q, k)
    )


def _row_sums(weights, grad_s, apart) -> np.ndarray:
    """The fields of RowSums for one tile, of float64 products. Distances are counted from the least
    of each row, so that they are small, and the rest of them is added.
    """
    least = apart.min(axis=-1, keepdims=True)
    near = apart - least
    mass, grads = (x.sum(axis=-1, dtype=np.float64) for x in (weights, grad_s))
    distance, slope = (  # one array of products at a time
        np.multiply(x, near, dtype=np.float64).sum(axis=-1) for x in (weights, grad_s)
    )
    far = least[..., 0]
    return np.stack([mass, grads, distance + far * mass, slope + far * grads])


def add(found, where: tuple, tile) -> None:
    """Add to `found` at the index `where` a tile of (kv_heads, group, rows, columns), summed over
    the axes along which an array of found's shape broadcasts.
    """
    *batch, heads, rows, columns = where
    rest = found.shape[-3:]
    view = found[tuple(0 if n == 1 else i for n, i in zip(found.shape[:-3], batch, strict=True))]
    place = zip(rest, (heads, rows, columns), strict=True)
    tile = tile.reshape(tile.shape[0] * tile.shape[1], *tile.shape[2:])
    broadcast = tuple(axis for axis, n in enumerate(rest) if n == 1)
    view[tuple(slice(None) if n == 1 else at for n, at in place)] += tile.sum(
        axis=broadcast, keepdims=True
    )
