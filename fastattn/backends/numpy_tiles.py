"""The tiles of the NumPy backend: a block of queries by a block of keys, for some heads at once.

What an operand looks like in a tile, which tiles there are, and the arithmetic of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..dtypes import as_real
from ..problem import DOT, SQUARED_DISTANCE, Problem
from .numpy_measures import measure

__all__ = [
    "BLOCK_K",
    "BLOCK_Q",
    "Heads",
    "capped_products",
    "distances",
    "key_blocks",
    "product",
    "queries_of",
    "query_blocks",
    "scores",
    "sums",
]

# One tile of scores is BLOCK_Q x BLOCK_K for as many heads as fit TILE_ELEMENTS. Blocks of 512 keys
# balance the rounding of the sum within a block against that of the sum over blocks.
BLOCK_Q = 256
BLOCK_K = 512
TILE_ELEMENTS = 1 << 20


class Heads(NamedTuple):
    """The operands of some key heads of one batch entry, axes (kv_heads, group, length, ...)."""

    where: tuple  # the index of the query heads in a result
    kv_where: tuple  # that of the key heads
    shape: tuple[int, int]  # (kv_heads, group)
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None
    bias: np.ndarray | None
    mask: np.ndarray | None
    alibi: np.ndarray | None
    sinks: np.ndarray | None
    spans: tuple[np.ndarray, ...] | None
    q_offset: int


def query_blocks(p: Problem) -> Iterator[tuple[Heads, slice]]:
    """Every block of queries, with the operands of as many heads as share a tile."""
    block_q = min(BLOCK_Q, p.n_queries)
    tile = max(1, block_q * min(BLOCK_K, p.n_keys) * p.group)
    kv_step = max(1, TILE_ELEMENTS // tile)
    intervals = p.intervals()
    for batch in np.ndindex(p.batch):
        for kv in range(0, p.kv_heads, kv_step):
            heads = _operands(p, intervals, batch, slice(kv, min(kv + kv_step, p.kv_heads)))
            for first in range(0, p.n_queries, BLOCK_Q):
                yield heads, slice(first, min(first + BLOCK_Q, p.n_queries))


def _operands(p: Problem, intervals, batch, kv: slice) -> Heads:
    def grouped(x, *rest):  # (batch, heads, *rest) -> (kv_heads, group, *rest)
        x = np.broadcast_to(x, (*p.batch, p.heads, *rest))[batch]
        return x.reshape(p.kv_heads, p.group, *rest)[kv]

    def shared(x, rest=2):
        if x is None:
            return None
        return np.broadcast_to(x, (*p.batch, p.kv_heads, *x.shape[-rest:]))[batch][kv][:, None]

    def per_head(x):
        return None if x is None else x.astype(p.accumulator).reshape(p.kv_heads, p.group, 1)[kv]

    full = (p.n_queries, p.n_keys)
    return Heads(
        where=(*batch, slice(kv.start * p.group, kv.stop * p.group)),
        kv_where=(*batch, kv),
        shape=(kv.stop - kv.start, p.group),
        q=grouped(p.q, p.n_queries, p.head_dim),
        k=shared(p.k),
        v=shared(p.v),
        k_scales=shared(p.k_scales, 1),
        v_scales=shared(p.v_scales, 1),
        bias=None if p.bias is None else grouped(p.bias, *full),
        mask=None if p.mask is None else grouped(p.mask, *full),
        alibi=per_head(p.alibi),
        sinks=per_head(p.sinks),
        spans=None if intervals is None else tuple(grouped(x, p.n_queries) for x in intervals),
        q_offset=p.q_offset if isinstance(p.q_offset, int) else int(p.q_offset[batch]),
    )


def rows_of(x, scales, keys: slice, real) -> np.ndarray:
    """Some keys or values in the dtype `real`."""
    return as_real(x[:, :, keys], None if scales is None else scales[:, :, keys], real)


def queries_of(p: Problem, h: Heads, queries: slice) -> np.ndarray:
    """Some queries, scaled for products."""
    real = p.accumulator
    q = h.q[:, :, queries].astype(real)
    return q * real.type(p.scale) if p.measure is DOT else q


def key_blocks(p: Problem, h: Heads, queries: slice) -> Iterator[slice]:
    """The blocks of keys, at fixed places, that some query of the block sees."""
    first, last = 0, p.n_keys
    if h.spans is not None:
        start, stop = (side[:, :, queries] for side in h.spans)
        some = start < stop
        first = start.min(where=some, initial=p.n_keys)
        last = stop.max(where=some, initial=0)
    for begin in range(first // BLOCK_K * BLOCK_K, last, BLOCK_K):
        keys = slice(begin, min(begin + BLOCK_K, p.n_keys))
        masked = h.mask is not None and not h.mask[:, :, queries, keys].any()
        if not masked and (h.bias is None or (h.bias[:, :, queries, keys] != -np.inf).any()):
            yield keys


def capped_products(p: Problem, h: Heads, q, keys: slice) -> np.ndarray:
    """The scores of one tile before anything is added; `q` is that of `queries_of`."""
    k = rows_of(h.k, h.k_scales, keys, p.accumulator)
    if p.measure is DOT:
        s = q @ k.swapaxes(-1, -2)
    else:
        measured = measure(p.measure, q, k)
        s = p.accumulator.type(p.scale) * measured
        if p.measure is SQUARED_DISTANCE:  # what leaves the range is its end
            s = np.where(np.isfinite(measured), np.maximum(s, np.finfo(s.dtype).min), s)
    if p.softcap is None:
        return s
    cap = p.accumulator.type(p.softcap)
    return cap * np.tanh(s / cap)


def scores(p: Problem, h: Heads, products, queries: slice, keys: slice):
    """``(s, seen)`` of one tile: the score, -inf where unseen; `seen` is None if all are seen."""
    real = p.accumulator.type
    s, seen = products, None
    if h.bias is not None:
        bias = h.bias[:, :, queries, keys]
        rounded = bias.astype(real)
        s = products + rounded
        if (rounded == -np.inf).any():  # which a large number may round to
            seen = bias != -np.inf
        if not np.isfinite(s).all():
            # A number that this dtype cannot hold, or that overflows the sum, is a number still.
            most = np.finfo(real).max
            s = np.where(np.isfinite(bias) & np.isfinite(products), np.clip(s, -most, most), s)
    if h.alibi is not None:
        s = s - h.alibi[..., None] * distances(h, queries, keys).astype(real)
    if h.spans is not None:
        start, stop = (side[:, :, queries, None] for side in h.spans)
        inside = (start <= keys.start).all() and (keys.stop <= stop).all()
        if not inside:
            j = np.arange(keys.start, keys.stop)
            within = (start <= j) & (j < stop)
            seen = within if seen is None else seen & within
    if h.mask is not None:
        mask = h.mask[:, :, queries, keys]
        seen = mask if seen is None else seen & mask
    if seen is not None:
        s = np.where(seen, s, -np.inf)
    return s, seen


def sums(p: Problem, h: Heads, q, queries: slice):
    """``(shift, total)`` of a row's softmax ``exp(s - shift) / total``; `q` is scaled already."""
    top = np.full(q.shape[:-1], -np.inf, p.accumulator)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, top.shape)
    total = np.exp(top - np.where(np.isfinite(top), top, 0))
    for keys in key_blocks(p, h, queries):
        s, _ = scores(p, h, capped_products(p, h, q, keys), queries, keys)
        old, top = top, np.maximum(top, s.max(axis=-1))
        shift = np.where(np.isfinite(top), top, 0)
        rescale = np.where(old == -np.inf, 0, np.exp(old - shift))
        total = total * rescale + np.exp(s - shift[..., None]).sum(axis=-1)
    return np.where(np.isfinite(top), top, 0), total


def distances(h: Heads, queries: slice, keys: slice) -> np.ndarray:
    """``abs(i - j)`` with the place `i` of each query on the key axis."""
    i = np.arange(queries.start, queries.stop)[:, None] + h.q_offset
    return np.abs(i - np.arange(keys.start, keys.stop))


def product(weight, seen, v):
    """``weight @ v`` in which an unseen key takes no part, whatever is in its `v`."""
    if seen is None or np.isfinite(v).all():
        return weight @ v
    wild = ~np.isfinite(v).all(axis=(0, 1, 3))  # keys with a NaN or an Inf in some head
    out = weight[..., ~wild] @ v[:, :, ~wild]
    for j in np.flatnonzero(wild):
        term = weight[..., j, None] * v[:, :, None, j]
        out = out + np.where(np.broadcast_to(seen, weight.shape)[..., j, None], term, 0)
    return out
