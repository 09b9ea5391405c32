"""Maps of the weights in plain NumPy: each tile's weights are made twice, in O(S) memory."""

from __future__ import annotations

import numpy as np

from ...core.bins import covered, no_top_keys
from ...core.problem import Problem
from . import sparse
from .score_functions import where_visible
from .tiles import Heads, capped_products, key_blocks, queries_of, query_blocks, scores, sums

__all__ = ["run_map", "run_top"]


def run_map(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """The weights summed over cells, float64 (batch, heads, rows, columns)."""
    p = problem
    found = np.zeros((*p.batch, p.heads, rows, columns))
    if p.is_sparse:
        sparse.run_map(p, found)
        return found
    with np.errstate(all="ignore"):
        for heads, queries in query_blocks(p):
            _pool(p, heads, queries, found[heads.where])
    return found


def _pool(p: Problem, h: Heads, queries: slice, found) -> None:
    """Add the weights of one block of queries to `found`, (heads, rows, columns)."""
    q = queries_of(p, h, queries)
    shift, total = sums(p, h, q, queries)
    rows, first_queries = covered(queries, p.n_queries, found.shape[-2])
    for keys in key_blocks(p, h, queries):
        s, seen = scores(p, h, capped_products(p, h, q, keys, queries), queries, keys)
        weights = where_visible(seen, np.exp(s - shift[..., None]) / total[..., None])
        columns, first_keys = covered(keys, p.n_keys, found.shape[-1])
        weights = np.add.reduceat(weights, first_queries, axis=-2, dtype=np.float64)
        weights = np.add.reduceat(weights, first_keys, axis=-1)
        found[:, rows, columns] += weights.reshape(-1, *weights.shape[-2:])


def run_top(problem: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n)."""
    p = problem
    if p.is_sparse:
        return sparse.run_top(p, n)
    indices, weights = no_top_keys(p, n)
    kept = min(n, p.n_keys)
    with np.errstate(all="ignore"):
        for heads, queries in query_blocks(p):
            found = _strongest(p, heads, queries, kept)
            for target, values in zip((indices, weights), found, strict=True):
                view = target[heads.where][:, queries, :kept]
                view[...] = values.reshape(view.shape)
    return indices, weights


def _strongest(p: Problem, h: Heads, queries: slice, n: int):
    """``(indices, weights)`` of one block of queries, (kv_heads, group, queries, n)."""
    q = queries_of(p, h, queries)
    best = np.full((*q.shape[:-1], n), -np.inf, p.accumulator)
    indices = np.full(best.shape, -1)
    some = np.zeros(q.shape[:-1], bool)
    for keys in key_blocks(p, h, queries):
        s, seen = scores(p, h, capped_products(p, h, q, keys, queries), queries, keys)
        some |= True if seen is None else seen.any(axis=-1)
        s = np.where(np.isnan(s), -np.inf, s)
        better = (s > best[..., -1:]).any(axis=-1)
        rivals = np.concatenate((best[better], s[better]), axis=-1)
        order = np.argsort(-rivals, axis=-1, kind="stable")[:, :n]
        j = np.broadcast_to(np.arange(keys.start, keys.stop), s[better].shape)
        j = np.concatenate((indices[better], j), axis=-1)
        best[better] = np.take_along_axis(rivals, order, axis=-1)
        indices[better] = np.take_along_axis(j, order, axis=-1)
    shift, total = (x[..., None] for x in sums(p, h, q, queries))
    weights = np.where(indices < 0, 0, np.exp(best - shift) / total)
    wrong = np.isnan(total) | (some[..., None] & (total == 0))
    return np.where(wrong, -1, indices), np.where(wrong, np.nan, weights)
