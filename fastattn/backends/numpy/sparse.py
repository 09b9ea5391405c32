"""Attention under a sparse mask in plain NumPy."""

from __future__ import annotations

import numpy as np

from ...core.bins import no_top_keys
from ...core.problem import Problem
from .sparse_entries import (
    Entries,
    Head,
    add_sums,
    entry_blocks,
    kept_of,
    length,
    pieces,
    row_maximum,
    scores,
    softmax,
    values_of,
)
from .tiles import dropped

__all__ = ["run", "run_map", "run_top"]


def run(p: Problem, result, lse, row_max, weights) -> None:
    """Fill `result`, and `lse`, `row_max` and `weights` where given; weights hold 0 already."""
    with np.errstate(all="ignore"):
        for h, e in entry_blocks(p):
            s = scores(p, h, e)
            w, row_lse = softmax(p, h, e, s)
            result[h.where][e.queries] = _mean(p, h, e, dropped(p, w, kept_of(p, h, e)))
            if lse is not None:
                lse[h.where][e.queries] = row_lse
            if row_max is not None:
                row_max[h.where][e.queries] = row_maximum(e, s, -np.inf)
            if weights is not None:
                weights[h.where][e.queries][e.rows, e.keys] = w


def run_map(p: Problem, found) -> None:
    """Add the weights to the cells of `found`, (batch, heads, rows, columns)."""
    rows, columns = found.shape[-2:]
    with np.errstate(all="ignore"):
        for h, e in entry_blocks(p):
            w, _ = softmax(p, h, e, scores(p, h, e))
            # The inverse of `bin_starts`.
            row = ((e.queries.start + e.rows + 1) * rows - 1) // p.n_queries
            column = ((e.keys.astype(np.int64) + 1) * columns - 1) // p.n_keys
            first = row[0] if len(row) else 0
            cells = np.bincount((row - first) * columns + column, w)
            found[h.where].reshape(-1)[first * columns : first * columns + len(cells)] += cells


def run_top(p: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n)."""
    indices, weights = no_top_keys(p, n)
    with np.errstate(all="ignore"):
        for h, e in entry_blocks(p):
            s = scores(p, h, e)
            w, _ = softmax(p, h, e, s)
            wrong = np.zeros(length(e.queries), bool)
            wrong[e.rows[np.isnan(w) & (s != np.inf)]] = True  # beside Inf, which weighs Inf / Inf
            s = np.where(np.isnan(s), -np.inf, s)
            order = np.lexsort((-s, e.rows))  # stable: of equal scores the lower index first
            order = order[s[order] > -np.inf]
            rows = e.rows[order]
            place = np.arange(len(rows)) - np.searchsorted(rows, rows)
            order, rows, place = (x[place < n] for x in (order, rows, place))
            own_indices, own_weights = indices[h.where][e.queries], weights[h.where][e.queries]
            own_indices[rows, place], own_weights[rows, place] = e.keys[order], w[order]
            own_indices[wrong], own_weights[wrong] = -1, np.nan
    return indices, weights


def _mean(p: Problem, h: Head, e: Entries, w) -> np.ndarray:
    """The sum of the values by their weights, which add up to 1 at most."""
    out = np.zeros((length(e.queries), p.value_dim), p.accumulator)
    for piece in pieces(e):
        v = values_of(p, h, e, piece)
        add_sums(out, e.rows[piece], w[piece, None] * v)
    lost = np.isinf(out)
    if lost.any():  # the mean of the largest numbers may be rounded up
        infinite = np.zeros(out.shape, bool)
        for piece in pieces(e):
            rows, columns = np.nonzero(~np.isfinite(values_of(p, h, e, piece)))
            infinite[e.rows[piece][rows], columns] = True
        most = np.finfo(out.dtype).max
        out = np.where(lost & ~infinite & np.isfinite(out).any(), np.clip(out, -most, most), out)
    return out
