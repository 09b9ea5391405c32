"""Blocked attention in plain NumPy: the whole contract, O(S) memory, BLAS for the products.

The algorithm is the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax", algorithm 3) over blocks of keys, as in FlashAttention (Dao et al. 2022, section 3).
"""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .numpy_backward import run_backward, unsupported_backward
from .numpy_maps import run_map, run_top
from .numpy_tiles import (
    BLOCK_K,
    BLOCK_Q,
    Heads,
    capped_products,
    key_blocks,
    product,
    queries_of,
    query_blocks,
    rows_of,
    scores,
)

__all__ = [
    "name",
    "plan",
    "run",
    "run_backward",
    "run_map",
    "run_top",
    "unsupported",
    "unsupported_backward",
]

name = "numpy"


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    if problem.is_flex:
        return "a score_mod or mask_mod would be called for every score"
    return None


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    weights = np.empty(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    with np.errstate(all="ignore"):
        for heads, queries in query_blocks(p):
            _attend(p, heads, queries, result, lse, weights)
    return lse, weights


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    return {
        "kernel": f"NumPy in {problem.accumulator}",
        "tile": f"{BLOCK_Q} queries, {BLOCK_K} keys a block",
        "threads": "as many as NumPy's BLAS takes",
    }


def _attend(p: Problem, h: Heads, queries: slice, result, lse, weights, margin=0.0) -> None:
    """Attend from one block of queries to every block of keys that one of them sees.

    Weights are relative to the largest score plus `margin`: log(2 * n_keys) keeps the sum of huge
    values from overflowing, at the price of a largest weight that is not exactly 1.
    """
    real = p.accumulator
    q = queries_of(p, h, queries)
    rows = q.shape[:-1]
    top = np.full(rows, -np.inf, real)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, rows)
    shift = np.where(np.isfinite(top), top + real.type(margin), 0)
    total = np.exp(top - shift)
    some = np.zeros(rows, bool)
    out = np.zeros((*rows, p.value_dim), real)
    for keys in key_blocks(p, h, queries):
        s, seen = scores(p, h, capped_products(p, h, q, keys), queries, keys)
        old_top, old_shift = top, shift
        top = np.maximum(top, s.max(axis=-1))
        shift = np.where(np.isfinite(top), top + real.type(margin), 0)
        weight = np.exp(s - shift[..., None])
        rescale = np.where(old_top == -np.inf, 0, np.exp(old_shift - shift))
        total = total * rescale + weight.sum(axis=-1)
        out = out * rescale[..., None] + product(weight, seen, rows_of(h.v, h.v_scales, keys, real))
        some |= True if seen is None else seen.any(axis=-1)
    if margin == 0 and not np.isfinite(out[np.isfinite(total)]).all():
        return _attend(p, h, queries, result, lse, weights, margin=np.log(2 * p.n_keys))
    # A row that sees nothing has a total of 0 and gets 0; one that sees only -inf gets 0 / 0.
    unseen = ~some
    out = out / np.where(unseen & (total == 0), 1, total)[..., None]

    def deliver(target, values):  # (kv_heads, group, queries, ...) -> (heads, queries, ...)
        target[h.where][:, queries] = values.reshape(h.shape[0] * h.shape[1], *values.shape[2:])

    deliver(result, out)
    if lse is not None:
        deliver(lse, shift + np.log(total))
    if weights is not None:
        view = weights[h.where][:, queries]
        view[...] = 0
        for keys in key_blocks(p, h, queries):
            s, seen = scores(p, h, capped_products(p, h, q, keys), queries, keys)
            w = np.exp(s - shift[..., None]) / total[..., None]
            if seen is not None:
                w = np.where(seen, w, 0)
            view[..., keys] = w.reshape(h.shape[0] * h.shape[1], *w.shape[2:])
