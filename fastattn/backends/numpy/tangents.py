"""Forward mode in plain NumPy: a softmax and its derivative along tangents, in O(S) memory."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ...core.output import empty_like
from ...core.problem import DOT, Problem
from .score_functions import score_function_tangents, where_visible
from .tiles import (
    Heads,
    capped_products,
    dropped,
    kept,
    key_blocks,
    keys_of,
    product,
    queries_of,
    query_blocks,
    rescale,
    scores,
    shift_of,
    values_of,
)

__all__ = ["run_forward_mode"]


class _Moving(NamedTuple):
    """Which operands have a tangent."""

    q: bool
    k: bool
    v: bool


def run_forward_mode(problem: Problem, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)`` along the tangents of the problem's operands, each of
    its operand's shape, or None where that stays.
    """
    p = problem
    moving = _Moving(q is not None, k is not None, v is not None)
    tangents = replace(
        p,
        q=p.q if q is None else q,
        k=p.k if k is None else k,
        v=p.v if v is None else v,
        bias=None,
        mask=None,
    )
    out = empty_like(p.q, p.rows(p.value_dim), p.dtype)
    lse = np.empty(p.rows(), p.accumulator)
    with np.errstate(all="ignore"):
        blocks = zip(query_blocks(p), query_blocks(tangents), strict=True)
        for (heads, queries), (along, _) in blocks:
            for target, block in zip(
                (out, lse), _block(p, heads, along, moving, queries), strict=True
            ):
                rows = block.reshape(-1, *block.shape[2:])
                target[heads.where][:, queries] = rows
    return out, lse


def _block(p: Problem, h: Heads, along: Heads, moving: _Moving, queries: slice):
    """The tangents of one block of queries.

    With weights ``w`` and tangents ``ds`` of the scores, that of the lse is ``sum(w * ds)`` and
    that of ``out = w @ v`` is ``(w * ds) @ v + w @ dv - sum(w * ds) * out``.
    """
    real = p.accumulator
    q = queries_of(p, h, queries)
    dq = queries_of(p, along, queries) if moving.q else None
    rows = q.shape[:-1]
    top = np.full(rows, -np.inf, real)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, rows)
    shift = shift_of(top)
    total = np.where(top == -np.inf, real.type(0), real.type(1))
    slope = np.zeros(rows, real)
    mean, moved = np.zeros((2, *rows, p.value_dim), real)
    for keys in key_blocks(p, h, queries):
        products = capped_products(p, h, q, keys, queries)
        s, seen = scores(p, h, products, queries, keys)
        old, none = shift, top == -np.inf
        top = np.maximum(top, s.max(axis=-1))
        shift = shift_of(top)
        factor = np.where(none, 0, rescale(old, shift))
        weight = where_visible(seen, np.exp(s - shift[..., None]))
        k, v = keys_of(p, h, keys), values_of(p, h, keys)
        total = total * factor + weight.sum(axis=-1)
        slope, mean, moved = slope * factor, mean * factor[..., None], moved * factor[..., None]
        keep = kept(p, h, queries, keys)
        used = dropped(p, weight, keep)
        mean += product(used, seen, v)
        if moving.q or moving.k:
            dk = keys_of(p, along, keys) if moving.k else None
            ds = _score_tangents(p, h.scale, q, k, dq, dk)
            if p.softcap is not None:
                ds *= 1 - (products / real.type(p.softcap)) ** 2
            ds = where_visible(seen, weight * ds)
            slope += ds.sum(axis=-1)
            moved += product(dropped(p, ds, keep), seen, v)
        if moving.v:
            moved += product(used, seen, values_of(p, along, keys))
    empty = total == 0
    total = np.where(empty, 1, total)
    slope /= total
    total = total[..., None]
    return moved / total - slope[..., None] * (mean / total), slope


def _score_tangents(p: Problem, scale, q, k, dq, dk) -> np.ndarray:
    """Those of the scores before softcap; `q` and `dq` are those of `queries_of`."""
    if p.score_function is not DOT:
        return scale.astype(p.accumulator) * score_function_tangents(p.score_function, q, k, dq, dk)
    if dk is None:
        return dq @ k.swapaxes(-1, -2)
    ds = q @ dk.swapaxes(-1, -2)
    return ds if dq is None else ds + dq @ k.swapaxes(-1, -2)
