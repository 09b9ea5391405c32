"""The tiles of the NumPy backend: a block of queries by a block of keys, for some heads at once.

What an operand looks like in a tile, which tiles there are, and the arithmetic of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...core.arguments import in_range
from ...core.dtypes import as_real
from ...core.pages import rows_in_pages
from ...core.problem import DOT, Problem
from .score_functions import unscaled_scores

__all__ = [
    "BLOCK_K",
    "Heads",
    "Paged",
    "biases",
    "block_q",
    "capped_products",
    "capped_products_of",
    "distance_index",
    "distances",
    "dropped",
    "kept",
    "key_blocks",
    "keys_of",
    "product",
    "queries_of",
    "query_blocks",
    "rescale",
    "scores",
    "shift_of",
    "sum_in_range",
    "sums",
    "values_of",
]

# One tile of scores is BLOCK_K keys by at least MIN_BLOCK_Q queries, for as many heads as fit
# TILE_ELEMENTS. Blocks of 512 keys balance the rounding of the sum within a block against that of
# the sum over blocks.
MIN_BLOCK_Q = 256
BLOCK_K = 512
TILE_ELEMENTS = 1 << 19


class Paged(NamedTuple):
    """Keys or values of one batch entry that lie in a pool of pages."""

    pool: np.ndarray  # (n_pages, kv_heads, page, ...)
    pages: np.ndarray  # those of the entry, in order


class Heads(NamedTuple):
    """The operands of some key heads of one batch entry, axes (kv_heads, group, length, ...)."""

    where: tuple  # the index of the query heads in a result
    kv_where: tuple  # that of the key heads
    shape: tuple[int, int]  # (kv_heads, group)
    q: np.ndarray
    k: np.ndarray | Paged
    v: np.ndarray | Paged
    k_scales: np.ndarray | Paged | None
    v_scales: np.ndarray | Paged | None
    scale: np.ndarray  # () or (kv_heads, group, 1, 1), float64
    bias: np.ndarray | None
    relative_bias: np.ndarray | None  # (kv_heads, group, 2 R + 1), of the dtype of sums
    mask: np.ndarray | None
    alibi: np.ndarray | None
    sinks: np.ndarray | None
    spans: tuple[np.ndarray, ...] | None
    position: np.ndarray  # (queries,), of each query on the key axis
    functions: Any = None  # of `fastattn.flex`, for a tile: see `backends.numba.gradients`


def block_q(p: Problem) -> int:
    """How many queries a tile takes.

    The threads of a BLAS meet after every product, so few large ones are quicker, many times on a
    busy machine. Where queries see different keys, smaller tiles are what lets some be skipped.
    """
    r = p.key_range
    if r.left is not None or r.spans is not None or p.mask is not None or p.is_flex:
        return MIN_BLOCK_Q
    rows = TILE_ELEMENTS // (max(BLOCK_K, p.head_dim, p.value_dim) * p.group)
    if r.right is not None:
        rows = min(rows, max(p.n_queries // 4, MIN_BLOCK_Q))
    return max(MIN_BLOCK_Q, rows // MIN_BLOCK_Q * MIN_BLOCK_Q)


def query_blocks(p: Problem, functions=None) -> Iterator[tuple[Heads, slice]]:
    """Every block of queries, with the operands of as many heads as share a tile."""
    step = block_q(p)
    tile = max(1, min(step, p.n_queries) * min(BLOCK_K, p.n_keys) * p.group)
    kv_step = max(1, TILE_ELEMENTS // tile)
    intervals = p.key_range.bounds()
    for batch in np.ndindex(p.batch):
        for kv in range(0, p.kv_heads, kv_step):
            heads = _operands(p, intervals, batch, slice(kv, min(kv + kv_step, p.kv_heads)))
            if functions is not None:
                heads = heads._replace(functions=functions(heads.where))
            for first in range(0, p.n_queries, step):
                yield heads, slice(first, min(first + step, p.n_queries))


def _operands(p: Problem, intervals, batch, kv: slice) -> Heads:
    def grouped(x, *rest):  # (batch, heads, *rest) -> (kv_heads, group, *rest)
        x = np.broadcast_to(x, (*p.batch, p.heads, *rest))[batch]
        return x.reshape(p.kv_heads, p.group, *rest)[kv]

    def shared(x):
        if x is None:
            return None
        if p.block_table is not None:
            pool = np.broadcast_to(x, (len(x), p.kv_heads, *x.shape[2:]))[:, kv]
            return Paged(pool, p.block_table[batch if len(p.block_table) > 1 else 0])
        return np.broadcast_to(x, (*p.batch, p.kv_heads, *x.shape[-2:]))[batch][kv][:, None]

    def per_head(x, dtype=p.accumulator):
        if x is None:
            return None
        return x.astype(dtype).reshape(p.kv_heads, p.group, *x.shape[1:] or (1,))[kv]

    full, scale = (p.n_queries, p.n_keys), np.asarray(p.scale)
    offset = p.q_offset if isinstance(p.q_offset, int) else p.q_offset[batch]
    return Heads(
        where=(*batch, slice(kv.start * p.group, kv.stop * p.group)),
        kv_where=(*batch, kv),
        shape=(kv.stop - kv.start, p.group),
        q=grouped(p.q, p.n_queries, p.head_dim),
        k=shared(p.k),
        v=shared(p.v),
        k_scales=shared(p.k_scales),
        v_scales=shared(p.v_scales),
        scale=per_head(scale, np.float64)[..., None] if scale.ndim else scale,
        bias=None if p.bias is None else grouped(p.bias, *full),
        relative_bias=per_head(p.relative_bias),
        mask=None if p.mask is None else grouped(p.mask, *full),
        alibi=per_head(p.alibi),
        sinks=per_head(p.sinks),
        spans=None if intervals is None else tuple(grouped(x, p.n_queries) for x in intervals),
        position=np.arange(p.n_queries) + offset,
    )


def keys_of(p: Problem, h: Heads, keys: slice) -> np.ndarray:
    """Some keys as the numbers that are computed with, (kv_heads, 1, keys, head_dim)."""
    return as_real(_some(h.k, keys), _some(h.k_scales, keys), p.accumulator, p.head_dim)


def values_of(p: Problem, h: Heads, keys: slice) -> np.ndarray:
    """Some values likewise, (kv_heads, 1, keys, value_dim)."""
    return as_real(_some(h.v, keys), _some(h.v_scales, keys), p.accumulator, p.value_dim)


def _some(x: np.ndarray | Paged | None, keys: slice) -> np.ndarray | None:
    if x is None:
        return None
    if isinstance(x, Paged):
        return rows_in_pages(x.pool, x.pages, keys.start, keys.stop)[:, None]
    return x[:, :, keys]


def queries_of(p: Problem, h: Heads, queries: slice) -> np.ndarray:
    """Some queries, scaled for products."""
    real = p.accumulator
    q = h.q[:, :, queries].astype(real)
    return q * h.scale.astype(real) if p.score_function is DOT else q


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
        if h.functions is not None:
            keys = h.functions.visible_keys(queries, keys)
            if keys.start == keys.stop:
                continue
        masked = h.mask is not None and not h.mask[:, :, queries, keys].any()
        if not masked and not any((x == -np.inf).all() for x in biases(h, queries, keys)):
            yield keys


def capped_products(
    p: Problem, h: Heads, q, keys: slice, queries: slice | None = None
) -> np.ndarray:
    """The scores of one tile before anything is added; `q` is that of `queries_of`. Where `queries`
    says which these are, scores of finite vectors are within the range of numbers.
    """
    k = keys_of(p, h, keys)
    return capped_products_of(p, h.scale, q, k, None if queries is None else h.q[:, :, queries])


def capped_products_of(p: Problem, scale, q, k, unscaled=None) -> np.ndarray:
    """`capped_products` of vectors (..., queries, head_dim) and (..., keys, head_dim). `unscaled`
    are the queries as they were given.
    """
    if p.score_function is DOT:
        s = q @ k.swapaxes(-1, -2)
    else:
        s = scale.astype(p.accumulator) * unscaled_scores(p.score_function, q, k)
    if unscaled is not None and not np.isfinite(s).all():
        s = _products_in_range(p, scale, unscaled, k, s)
    if p.softcap is None:
        return s
    cap = p.accumulator.type(p.softcap)
    return cap * np.tanh(s / cap)


def _products_in_range(p: Problem, scale, q, k, s) -> np.ndarray:
    """`s` without what overflowed though its vectors are finite, and with what an infinite scale
    makes of the sum, not of its terms; other bits stay as they are.
    """
    finite = np.isfinite(q).all(axis=-1)[..., None] & np.isfinite(k).all(axis=-1)[..., None, :]
    finite = finite & np.isfinite(scale)
    lost = ~np.isfinite(s) & (finite | np.isinf(scale))
    if not lost.any():
        return s
    wide = np.longdouble if p.accumulator == np.float64 else np.float64
    q, k = q.astype(wide), k.astype(wide)
    exact = (
        q @ k.swapaxes(-1, -2)
        if p.score_function is DOT
        else unscaled_scores(p.score_function, q, k)
    )
    most, exact = np.finfo(s.dtype).max, scale.astype(wide) * exact
    exact = np.where(finite, np.clip(exact, -most, most), exact)
    return np.where(lost, exact, s).astype(s.dtype)


def shift_of(top, margin=0.0) -> np.ndarray:
    """What scores are taken relative to in a row with that maximum."""
    return np.where(top == -np.inf, top.dtype.type(0), top + top.dtype.type(margin))


def rescale(old, new) -> np.ndarray:
    """The factor of sums relative to `old` that are to be relative to `new`; both may be Inf."""
    return np.where(old == new, old.dtype.type(1), np.exp(old - new))


def scores(p: Problem, h: Heads, products, queries: slice, keys: slice):
    """``(s, seen)`` of one tile: the score, -inf where hidden; `seen` is None if all are seen."""
    real = p.accumulator.type
    s, seen = products, None
    for bias in biases(h, queries, keys):
        rounded = in_range(bias, real).astype(real)
        if (rounded == -np.inf).any():
            seen = bias != -np.inf if seen is None else seen & (bias != -np.inf)
        s = sum_in_range(s + rounded, s, rounded)
    if h.alibi is not None:
        far = h.alibi[..., None] * distances(h, queries, keys).astype(real)
        s = sum_in_range(s - far, s, h.alibi[..., None])
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
    if h.functions is not None:
        s, seen = h.functions.modified(s, seen, queries, keys)
    return s, seen


def biases(h: Heads, queries: slice, keys: slice) -> Iterator[np.ndarray]:
    """What is added to the scores of one tile, in order."""
    if h.bias is not None:
        yield h.bias[:, :, queries, keys]
    if h.relative_bias is not None:
        yield h.relative_bias[:, :, distance_index(h, queries, keys)]


def sum_in_range(total, a, b) -> np.ndarray:
    """`total` without what overflowed though `a` and `b`, which it was made of, are finite."""
    if np.isfinite(total).all():
        return total
    most = np.finfo(total.dtype).max
    return np.where(np.isfinite(a) & np.isfinite(b), np.clip(total, -most, most), total)


def kept(p: Problem, h: Heads, queries: slice, keys: slice) -> np.ndarray | None:
    """Which weights of one tile dropout keeps; None without it."""
    if p.dropout is None:
        return None
    *batch, heads = h.where
    entry = np.ravel_multi_index(batch, p.batch) if batch else 0
    head = np.arange(heads.start, heads.stop).reshape(*h.shape, 1)
    return p.dropout.kept(entry, head, np.arange(queries.start, queries.stop), keys)


def dropped(p: Problem, x, kept) -> np.ndarray:
    """One tile after dropout of all but those `kept`."""
    if p.dropout is None:
        return x
    return np.where(kept, x * x.dtype.type(p.dropout.factor), x.dtype.type(0))


def sums(p: Problem, h: Heads, q, queries: slice):
    """``(shift, total)`` of a row's softmax ``exp(s - shift) / total``; `q` is scaled already."""
    top = np.full(q.shape[:-1], -np.inf, p.accumulator)
    if h.sinks is not None:
        top = np.broadcast_to(h.sinks, top.shape)
    total = np.where(top == -np.inf, top.dtype.type(0), top.dtype.type(1))
    for keys in key_blocks(p, h, queries):
        s, _ = scores(p, h, capped_products(p, h, q, keys, queries), queries, keys)
        old, top = top, np.maximum(top, s.max(axis=-1))
        shift = shift_of(top)
        total = total * rescale(old, shift) + np.exp(s - shift[..., None]).sum(axis=-1)
    # Inf beside which others weigh nothing; with a NaN the top is NaN too.
    return shift_of(top), np.where(top == np.inf, top.dtype.type(1), total)


def distance_index(h: Heads, queries: slice, keys: slice) -> np.ndarray:
    """Where the distance of each key from each query stands in a row of the relative bias."""
    assert h.relative_bias is not None
    reach = h.relative_bias.shape[-1] // 2
    i = h.position[queries, None]
    return np.clip(np.arange(keys.start, keys.stop) - i, -reach, reach) + reach


def distances(h: Heads, queries: slice, keys: slice) -> np.ndarray:
    """``abs(i - j)`` with the place `i` of each query on the key axis."""
    i = h.position[queries, None]
    return np.abs(i - np.arange(keys.start, keys.stop))


def product(weight, seen, v):
    """``weight @ v`` in which an hidden key takes no part, whatever is in its `v`."""
    if seen is None or np.isfinite(v).all():
        return weight @ v
    finite = np.isfinite(v)
    out = weight @ np.where(finite, v, 0)
    for j in np.flatnonzero(~finite.all(axis=(0, 1, 3))):
        wild = np.where(finite[:, :, None, j], 0, v[:, :, None, j])
        term = np.where(wild == 0, 0, weight[..., j, None] * wild)
        out = out + np.where(np.broadcast_to(seen, weight.shape)[..., j, None], term, 0)
    return out
