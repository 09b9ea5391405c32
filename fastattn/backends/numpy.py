"""Blocked attention in plain NumPy: the whole contract, O(S) memory, BLAS for the products.

The algorithm is the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation
for softmax", algorithm 3) over blocks of keys, as in FlashAttention (Dao et al. 2022, section 3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..problem import Problem

name = "numpy"

# One tile of scores is BLOCK_Q x BLOCK_K for as many heads as fit TILE_ELEMENTS. Blocks of 512 keys
# balance the rounding of the sum within a block against that of the sum over blocks.
BLOCK_Q = 256
BLOCK_K = 512
TILE_ELEMENTS = 1 << 20


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    if problem.score_mod is not None or problem.mask_mod is not None:
        return "a score_mod or mask_mod would be called for every score"
    return None


def run(problem: Problem):
    """Fill ``problem.result``; return ``(lse, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    weights = np.empty(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    block_q = min(BLOCK_Q, p.n_queries)
    tile = max(1, block_q * min(BLOCK_K, p.n_keys) * p.group)
    kv_step = max(1, TILE_ELEMENTS // tile)
    intervals = p.intervals()
    with np.errstate(all="ignore"):
        for batch in np.ndindex(p.batch):
            for kv in range(0, p.kv_heads, kv_step):
                heads = _heads(p, intervals, batch, slice(kv, min(kv + kv_step, p.kv_heads)))
                for first in range(0, p.n_queries, BLOCK_Q):
                    queries = slice(first, min(first + BLOCK_Q, p.n_queries))
                    _attend(p, heads, queries, lse, weights)
    return lse, weights


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    return {
        "kernel": f"NumPy in {problem.accumulator}",
        "tile": f"{BLOCK_Q} queries, {BLOCK_K} keys a block",
        "threads": "as many as NumPy's BLAS takes",
    }


class _Heads(NamedTuple):
    """The operands of some key heads of one batch entry, axes (kv_heads, group, length, ...)."""

    where: tuple  # their index in a result
    shape: tuple[int, int]  # (kv_heads, group)
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None
    alibi: np.ndarray | None
    sinks: np.ndarray | None
    spans: tuple[np.ndarray, ...] | None
    q_offset: int


def _heads(p: Problem, intervals, batch, kv: slice) -> _Heads:
    def grouped(x, *rest):  # (batch, heads, *rest) -> (kv_heads, group, *rest)
        x = np.broadcast_to(x, (*p.batch, p.heads, *rest))[batch]
        return x.reshape(p.kv_heads, p.group, *rest)[kv]

    def shared(x):
        return np.broadcast_to(x, (*p.batch, p.kv_heads, *x.shape[-2:]))[batch][kv][:, None]

    def per_head(x):
        return None if x is None else x.astype(p.accumulator).reshape(p.kv_heads, p.group, 1)[kv]

    full = (p.n_queries, p.n_keys)
    return _Heads(
        where=(*batch, slice(kv.start * p.group, kv.stop * p.group)),
        shape=(kv.stop - kv.start, p.group),
        q=grouped(p.q, p.n_queries, p.head_dim),
        k=shared(p.k),
        v=shared(p.v),
        bias=None if p.bias is None else grouped(p.bias, *full),
        mask=None if p.mask is None else grouped(p.mask, *full),
        alibi=per_head(p.alibi),
        sinks=per_head(p.sinks),
        spans=None if intervals is None else tuple(grouped(x, p.n_queries) for x in intervals),
        q_offset=p.q_offset if isinstance(p.q_offset, int) else int(p.q_offset[batch]),
    )


def _attend(p: Problem, h: _Heads, queries: slice, lse, weights, margin=0.0) -> None:
    """Attend from one block of queries to every block of keys that one of them sees.

    Weights are relative to the largest score plus `margin`: log(2 * n_keys) keeps the sum of huge
    values from overflowing, at the price of a largest weight that is not exactly 1.
    """
    real = p.accumulator
    q = h.q[:, :, queries].astype(real) * real.type(p.scale)
    rows = q.shape[:-1]
    top = np.full(rows, -np.inf, real)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, rows)
    shift = np.where(np.isfinite(top), top + real.type(margin), 0)
    total = np.exp(top - shift)
    some = np.zeros(rows, bool)
    out = np.zeros((*rows, p.value_dim), real)
    for keys in _key_blocks(p, h, queries):
        s, seen = _scores(p, h, q, queries, keys)
        old_top, old_shift = top, shift
        top = np.maximum(top, s.max(axis=-1))
        shift = np.where(np.isfinite(top), top + real.type(margin), 0)
        weight = np.exp(s - shift[..., None])
        rescale = np.where(old_top == -np.inf, 0, np.exp(old_shift - shift))
        total = total * rescale + weight.sum(axis=-1)
        out = out * rescale[..., None] + _product(weight, seen, h.v[:, :, keys].astype(real))
        some |= True if seen is None else seen.any(axis=-1)
    if margin == 0 and not np.isfinite(out[np.isfinite(total)]).all():
        return _attend(p, h, queries, lse, weights, margin=np.log(2 * p.n_keys))
    # A row that sees nothing has a total of 0 and gets 0; one that sees only -inf gets 0 / 0.
    unseen = ~some
    out = out / np.where(unseen & (total == 0), 1, total)[..., None]
    row_lse = shift + np.log(total)

    def deliver(target, values):  # (kv_heads, group, queries, ...) -> (heads, queries, ...)
        target[h.where][:, queries] = values.reshape(h.shape[0] * h.shape[1], *values.shape[2:])

    deliver(p.result, out)
    if lse is not None:
        deliver(lse, row_lse)
    if weights is not None:
        view = weights[h.where][:, queries]
        view[...] = 0
        for keys in _key_blocks(p, h, queries):
            s, seen = _scores(p, h, q, queries, keys)
            w = np.exp(s - row_lse[..., None])
            if seen is not None:
                w = np.where(seen, w, 0)
            view[..., keys] = w.reshape(h.shape[0] * h.shape[1], *w.shape[2:])


def _key_blocks(p: Problem, h: _Heads, queries: slice):
    """The blocks of keys, at fixed places, that some query of the block sees."""
    first, last = 0, p.n_keys
    if h.spans is not None:
        start, stop = (side[:, :, queries] for side in h.spans)
        some = start < stop
        first = start.min(where=some, initial=p.n_keys)
        last = stop.max(where=some, initial=0)
    for begin in range(first // BLOCK_K * BLOCK_K, last, BLOCK_K):
        yield slice(begin, min(begin + BLOCK_K, p.n_keys))


def _scores(p: Problem, h: _Heads, q, queries: slice, keys: slice):
    """``(s, seen)`` of one tile: the score, -inf where unseen; `seen` is None if all are seen."""
    real = p.accumulator.type
    s = q @ h.k[:, :, keys].astype(real).swapaxes(-1, -2)
    if p.softcap is not None:
        cap = real(p.softcap)
        s = cap * np.tanh(s / cap)
    seen = None
    if h.bias is not None:
        bias = h.bias[:, :, queries, keys]
        rounded = bias.astype(real)
        product, s = s, s + rounded
        if (rounded == -np.inf).any():  # which a large number may round to
            seen = bias != -np.inf
        if not np.isfinite(s).all():
            # A number that this dtype cannot hold, or that overflows the sum, is a number still.
            most = np.finfo(real).max
            s = np.where(np.isfinite(bias) & np.isfinite(product), np.clip(s, -most, most), s)
    j = np.arange(keys.start, keys.stop)
    if h.alibi is not None:
        i = np.arange(queries.start, queries.stop)[:, None] + h.q_offset
        s = s - h.alibi[..., None] * np.abs(i - j).astype(real)
    if h.spans is not None:
        start, stop = (side[:, :, queries, None] for side in h.spans)
        inside = (start <= keys.start).all() and (keys.stop <= stop).all()
        if not inside:
            within = (start <= j) & (j < stop)
            seen = within if seen is None else seen & within
    if h.mask is not None:
        mask = h.mask[:, :, queries, keys]
        seen = mask if seen is None else seen & mask
    if seen is not None:
        s = np.where(seen, s, -np.inf)
    return s, seen


def _product(weight, seen, v):
    """``weight @ v`` in which an unseen key takes no part, whatever is in its `v`."""
    if seen is None or np.isfinite(v).all():
        return weight @ v
    wild = ~np.isfinite(v).all(axis=(0, 1, 3))  # keys with a NaN or an Inf in some head
    out = weight[..., ~wild] @ v[:, :, ~wild]
    for j in np.flatnonzero(wild):
        term = weight[..., j, None] * v[:, :, None, j]
        out = out + np.where(np.broadcast_to(seen, weight.shape)[..., j, None], term, 0)
    return out
