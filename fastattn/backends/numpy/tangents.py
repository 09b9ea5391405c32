"""Forward mode in plain NumPy: a softmax and its derivative along tangents, in O(S) memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ...core.output import empty_like
from ...core.problem import DOT, Problem
from . import sparse_tangents
from .score_functions import product_tangents, where_visible
from .tiles import (
    Heads,
    biases,
    capped_products_of,
    distances,
    dropped,
    kept,
    key_blocks,
    keys_of,
    product,
    query_blocks,
    rescale,
    scores,
    shift_of,
    values_of,
)

__all__ = [
    "along_problem",
    "push_block_forward",
    "run_forward_mode",
    "score_tangents",
    "unsupported_forward_mode",
]

OPTIONS = ("bias", "relative_bias", "alibi", "sinks")


def unsupported_forward_mode(problem: Problem) -> str | None:
    """Why this backend cannot push tangents through `problem`, or None."""
    if problem.is_flex:
        return "a score_mod or mask_mod would be called for every score"
    return None


def unchanged(x, dx):
    """Vectors and their tangents as they are."""
    return x, dx


def run_forward_mode(
    problem: Problem,
    tangents: Mapping[str, np.ndarray],
    *,
    functions=None,
    vectors: Callable = unchanged,
) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)`` along `tangents`, by the names of the problem's operands
    that have one: of q, k, v, scale, bias, relative_bias, alibi and sinks, in their shapes.

    `functions` makes those of `fastattn.flex` for some heads. ``vectors(x, dx)`` makes of queries,
    or of keys, and of their tangents, which may be None, what is multiplied.
    """
    p = problem
    along = along_problem(p, tangents)
    moving = frozenset(tangents)
    out = empty_like(p.q, p.rows(p.value_dim), p.dtype)
    lse = np.empty(p.rows(), p.accumulator)
    if p.is_sparse:
        sparse_tangents.run_forward_mode(p, along, moving, vectors, out, lse)
        return out, lse
    with np.errstate(all="ignore"):
        blocks = zip(query_blocks(p, functions), query_blocks(along), strict=True)
        for (heads, queries), (of_tangents, _) in blocks:
            block = push_block_forward(p, heads, of_tangents, moving, queries, vectors)
            for target, x in ((out, block.d_out), (lse, block.d_lse)):
                target[heads.where][:, queries] = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    return out, lse


def along_problem(p: Problem, tangents: Mapping[str, np.ndarray]) -> Problem:
    """`p` with tangents in the places of its operands: what has none is p's own, or None."""
    fields: dict[str, Any] = {**dict.fromkeys(OPTIONS), **tangents}
    return replace(p, **fields)


class Pushed(NamedTuple):
    """A block of queries and its tangents; axes (kv_heads, group, queries, ...)."""

    out: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    shift: np.ndarray  # the weights are exp(score - shift) / total
    total: np.ndarray


def push_block_forward(
    p: Problem, h: Heads, along: Heads, moving, queries: slice, vectors=unchanged
) -> Pushed:
    """One block of queries; the tangents of its operands are in `along`.

    With weights ``w`` and tangents ``ds`` of the scores, that of the lse is ``sum(w * ds)`` and
    that of ``out = w @ v`` is ``(w * ds) @ v + w @ dv - sum(w * ds) * out``.
    """
    real = p.accumulator
    unmodified = h._replace(functions=None)
    dq = along.q[:, :, queries].astype(real) if "q" in moving else None
    q, dq = vectors(h.q[:, :, queries].astype(real), dq)
    scaled = q * h.scale.astype(real) if p.score_function is DOT else q
    d_scale = along.scale if "scale" in moving else None
    rows = q.shape[:-1]
    top = np.full(rows, -np.inf, real)
    slope = np.zeros(rows, real)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, rows)
        if along.sinks is not None:
            slope = np.where(top == -np.inf, 0, along.sinks)
    shift = shift_of(top)
    total = np.where(top == -np.inf, real.type(0), real.type(1))
    mean, moved = np.zeros((2, *rows, p.value_dim), real)
    for keys in key_blocks(p, h, queries):
        dk = keys_of(p, along, keys) if "k" in moving else None
        k, dk = vectors(keys_of(p, h, keys), dk)
        products = capped_products_of(p, h.scale, scaled, k, q)
        s, seen = plain, plain_seen = scores(p, unmodified, products, queries, keys)
        if h.functions is not None:
            s, seen = h.functions.modified(plain, plain_seen, queries, keys)
        old, none = shift, top == -np.inf
        top = np.maximum(top, s.max(axis=-1))
        shift = shift_of(top)
        factor = np.where(none, 0, rescale(old, shift))
        weight = where_visible(seen, np.exp(s - shift[..., None]))
        v = values_of(p, h, keys)
        total = total * factor + weight.sum(axis=-1)
        slope, mean, moved = slope * factor, mean * factor[..., None], moved * factor[..., None]
        keep = kept(p, h, queries, keys)
        used = dropped(p, weight, keep)
        mean += product(used, seen, v)
        if moving != {"v"}:
            ds = product_tangents(p.score_function, h.scale, q, k, d_scale, dq, dk)
            ds = score_tangents(p, along, products, ds, queries, keys)
            if h.functions is not None:
                ds = h.functions.before(ds, plain, seen, queries, keys)
            ds = where_visible(seen, weight * ds)
            slope += ds.sum(axis=-1)
            moved += product(dropped(p, ds, keep), seen, v)
        if "v" in moving:
            moved += product(used, seen, values_of(p, along, keys))
    empty = total == 0
    total = np.where(empty, 1, total)
    slope = slope / total
    out = mean / total[..., None]
    return Pushed(out, moved / total[..., None] - slope[..., None] * out, slope, shift, total)


def score_tangents(p: Problem, along: Heads, products, d_products, queries: slice, keys: slice):
    """The tangents of the scores of one tile, from its products and their tangents before the
    softcap.
    """
    real, ds = p.accumulator.type, d_products
    if p.softcap is not None:
        ds = ds * (1 - (products / real(p.softcap)) ** 2)
    for bias in biases(along, queries, keys):
        ds = ds + bias.astype(real)
    if along.alibi is not None:
        ds = ds - along.alibi[..., None] * distances(along, queries, keys).astype(real)
    return ds
