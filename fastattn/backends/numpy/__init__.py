"""Blocked attention in plain NumPy: the whole contract, O(S) memory, BLAS for the products.

The algorithm is the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax", algorithm 3) over blocks of keys, as in FlashAttention (Dao et al. 2022, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...core.problem import Problem
from . import sparse
from .backward import run_backward, unsupported_backward
from .tangents import run_forward_mode, unsupported_forward_mode
from .tiles import (
    BLOCK_K,
    Heads,
    block_q,
    capped_products,
    dropped,
    kept,
    key_blocks,
    product,
    queries_of,
    query_blocks,
    rescale,
    scores,
    shift_of,
    values_of,
)
from .weight_maps import run_map, run_top

__all__ = [
    "describe",
    "name",
    "run",
    "run_backward",
    "run_forward_mode",
    "run_map",
    "run_top",
    "unsupported",
    "unsupported_backward",
    "unsupported_forward_mode",
]

name = "numpy"


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    if problem.is_flex:
        return "a score_mod or mask_mod would be called for every score"
    return None


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    row_max = np.empty(p.rows(), p.accumulator) if p.return_max else None
    if p.is_sparse:
        weights = np.zeros(p.rows(p.n_keys), p.dtype) if p.return_weights else None
        sparse.run(p, result, lse, row_max, weights)
        return lse, row_max, weights
    weights = np.empty(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    with np.errstate(all="ignore"):
        for heads, queries in query_blocks(p):
            _attend(p, heads, queries, result, lse, row_max, weights)
    return lse, row_max, weights


def describe(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    return {
        "kernel": f"NumPy in {problem.accumulator}",
        "tile": f"{min(block_q(problem), problem.n_queries)} queries, {BLOCK_K} keys a block",
        "threads": "as many as NumPy's BLAS takes",
    }


def _attend(p: Problem, h: Heads, queries: slice, result, lse, row_max, weights) -> None:
    """Attend from one block of queries to every block of keys that one of them sees."""
    q = queries_of(p, h, queries)
    sums = _sums(p, h, q, queries)
    out, total = sums.out, sums.total
    lost = ~np.isfinite(out) & np.isfinite(total)[..., None]
    if lost.any():
        expected = _infinite_values(p, h, queries, out)
        lost &= ~(np.isnan(expected) | (out == expected))
    # A row that sees nothing gets 0, whatever its sink is; one that sees only -inf gets 0 / 0.
    out = np.where(sums.some[..., None], out / total[..., None], out.dtype.type(0))
    if lost.any():  # smaller weights keep the sum of huge values from overflowing
        again = _sums(p, h, q, queries, margin=np.log(2 * p.n_keys))
        most = np.finfo(out.dtype).max
        mean = np.clip(again.out / again.total[..., None], -most, most)
        mean = np.where(np.isfinite(again.out), mean, again.out)
        out = np.where(lost, mean, out)

    def deliver(target, values):  # (kv_heads, group, queries, ...) -> (heads, queries, ...)
        target[h.where][:, queries] = values.reshape(h.shape[0] * h.shape[1], *values.shape[2:])

    deliver(result, out)
    shift = shift_of(sums.top)
    total = np.where(shift == np.inf, 1, total)  # beside which others weigh nothing
    if lse is not None:
        deliver(lse, shift + np.log(total))
    if row_max is not None:
        deliver(row_max, sums.row_max)
    if weights is not None:
        view = weights[h.where][:, queries]
        view[...] = 0
        for keys in key_blocks(p, h, queries):
            s, seen = scores(p, h, capped_products(p, h, q, keys, queries), queries, keys)
            w = np.exp(s - shift[..., None]) / total[..., None]
            if seen is not None:
                w = np.where(seen, w, 0)
            view[..., keys] = w.reshape(h.shape[0] * h.shape[1], *w.shape[2:])


class _Sums(NamedTuple):
    """What a block of queries made of all keys; axes (kv_heads, group, queries, ...)."""

    out: np.ndarray  # the weighted sum of values
    total: np.ndarray  # that of the weights
    top: np.ndarray  # the largest score, or the sink
    row_max: np.ndarray  # the largest score
    some: np.ndarray  # is any key seen?


def _sums(p: Problem, h: Heads, q, queries: slice, margin=0.0) -> _Sums:
    """Weights are relative to the largest score plus `margin`."""
    real = p.accumulator
    rows = q.shape[:-1]
    top = np.full(rows, -np.inf, real)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, rows)
    shift = shift_of(top, margin)
    total = np.where(top == np.inf, real.type(1), np.exp(top - shift))
    row_max = np.full(rows, -np.inf, real)
    some = np.zeros(rows, bool)
    out = np.zeros((*rows, p.value_dim), real)
    for keys in key_blocks(p, h, queries):
        s, seen = scores(p, h, capped_products(p, h, q, keys, queries), queries, keys)
        old_shift, none = shift, top == -np.inf
        row_max = np.maximum(row_max, s.max(axis=-1))
        top = np.maximum(top, row_max)
        shift = shift_of(top, margin)
        weight = np.exp(s - shift[..., None])
        factor = np.where(none, 0, rescale(old_shift, shift))
        total = total * factor + weight.sum(axis=-1)
        values = values_of(p, h, keys)
        weight = dropped(p, weight, kept(p, h, queries, keys))
        out = out * factor[..., None] + product(weight, seen, values)
        some |= True if seen is None else seen.any(axis=-1)
    return _Sums(out, total, top, row_max, some)


def _infinite_values(p: Problem, h: Heads, queries: slice, out) -> np.ndarray:
    """The sum of the values that are not finite and that a query sees; of the shape of `out`."""
    expected = np.zeros_like(out)
    for keys in key_blocks(p, h, queries):
        v = values_of(p, h, keys)
        wild = np.flatnonzero(~np.isfinite(v).all(axis=(0, 1, 3)))
        nothing = np.zeros((*out.shape[:-1], v.shape[-2]), out.dtype)
        _, seen = scores(p, h, nothing, queries, keys) if wild.size else (None, None)
        for j in wild:
            values = np.where(np.isfinite(v[:, :, None, j]), 0, v[:, :, None, j])
            sees = True if seen is None else np.broadcast_to(seen, nothing.shape)[..., j, None]
            expected += np.where(sees, values, 0)
    return expected
