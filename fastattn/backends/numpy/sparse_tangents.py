"""Forward mode under a sparse mask in plain NumPy."""

from __future__ import annotations

import numpy as np

from ...core.problem import Problem
from ...core.row_sums import sink_weights
from .score_functions import product_tangents
from .sparse_entries import (
    Entries,
    Head,
    add_sums,
    added,
    capped_products,
    distance_index,
    distances,
    entry_blocks,
    head_of,
    kept_of,
    keys_of,
    length,
    pieces,
    queries_of,
    shift_and_total,
    summed,
    values_of,
)
from .tiles import dropped

__all__ = ["run_forward_mode"]


def run_forward_mode(p: Problem, along: Problem, moving, vectors, out, lse) -> None:
    """Fill `out` and `lse` with their tangents along those of the operands, which are in `along`
    for the names in `moving`; ``vectors`` is that of `tangents.run_forward_mode`.
    """
    with np.errstate(all="ignore"):
        for h, e in entry_blocks(p):
            a = head_of(along, h.where[:-1], h.where[-1])
            _push_forward(p, h, a, e, moving, vectors, out[h.where], lse[h.where])


def _push_forward(p: Problem, h: Head, a: Head, e: Entries, moving, vectors, out, lse) -> None:
    """The tangents of one block of queries, of `tangents.run_forward_mode`'s formulae."""
    real = p.accumulator.type
    products = capped_products(p, h, e, vectors)
    s = added(p, h, e, products)
    shift, total = shift_and_total(p, h, e, s)
    w = np.exp(s - shift[e.rows]) / total[e.rows]
    ds = np.empty_like(s)
    for piece in pieces(e):
        pairs = []
        for name, of in (("q", queries_of), ("k", keys_of)):
            x, dx = (of(p, each, e, piece)[:, None] for each in (h, a))
            pairs.append(vectors(x, dx if name in moving else None))
        (q, dq), (k, dk) = pairs
        d_scale = a.scale if "scale" in moving else None
        ds[piece] = product_tangents(p.score_function, h.scale, q, k, d_scale, dq, dk)[:, 0, 0]
    if p.softcap is not None:
        ds *= 1 - (products / real(p.softcap)) ** 2
    if a.bias is not None:
        ds += a.bias[e.queries.start + e.rows, e.keys].astype(real)
    if a.relative_bias is not None:
        ds += a.relative_bias[distance_index(a, e)].astype(real)
    if a.slope is not None:
        ds -= a.slope * distances(h, e).astype(real)
    slope = summed(e.rows, w * ds, len(shift))
    if a.sink is not None:
        slope += sink_weights(h.sink, np.exp(h.sink - shift) / total) * a.sink
    kept = kept_of(p, h, e)
    used, turned = dropped(p, w, kept), dropped(p, w * ds, kept)
    mean, moved = np.zeros((2, length(e.queries), p.value_dim), real)
    for piece in pieces(e):
        rows, v = e.rows[piece], values_of(p, h, e, piece)
        add_sums(mean, rows, used[piece, None] * v)
        add_sums(moved, rows, turned[piece, None] * v)
        if "v" in moving:
            add_sums(moved, rows, used[piece, None] * values_of(p, a, e, piece))
    out[e.queries] = moved - slope[:, None] * mean
    lse[e.queries] = slope
