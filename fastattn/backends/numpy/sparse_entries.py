"""Pairs of a query and a key that a sparse mask shows, their scores and weights, in plain NumPy.

An entry of the mask is a tile of one score. For some rows at a time the keys of all entries are
gathered, and what belongs to a row is summed by ``reduceat``: time and memory follow the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...core.arguments import in_range
from ...core.dtypes import as_real
from ...core.problem import DOT, Problem
from .score_functions import unscaled_scores
from .tiles import Paged, capped_products_of, sum_in_range

__all__ = [
    "Entries", "Head", "add_sums", "added", "capped_products", "distance_index", "distances",
    "entry_blocks", "head_of", "kept_of", "keys_of", "length", "pieces", "queries_of",
    "row_maximum", "scores", "shift_and_total", "softmax", "summed", "unscaled", "values_of",
]  # fmt: skip

# Entries, or rows, that are looked at together: what is gathered for them takes a MiB or a few.
ENTRIES = 1 << 13
# Numbers of a row that are summed from zero before they join the others, which alone would have
# several times the rounding error of a product.
RUN = 128


class Head(NamedTuple):
    """The operands of one query head of one batch entry."""

    where: tuple[int, ...]  # its index in a result
    kv_where: tuple[int, ...]
    q: np.ndarray  # (queries, head_dim)
    k: np.ndarray | Paged  # (keys, head_dim), or of pages (n_pages, page, head_dim)
    v: np.ndarray | Paged
    k_scales: np.ndarray | Paged | None  # (keys, groups)
    v_scales: np.ndarray | Paged | None
    scale: np.float64
    bias: np.ndarray | None  # (queries, keys)
    relative_bias: np.ndarray | None  # (2 R + 1,)
    slope: Any  # of alibi, or None
    sink: Any
    q_offset: int


class Entries(NamedTuple):
    """Pairs of some queries of a head and the keys that they see, row by row."""

    queries: slice
    rows: np.ndarray  # (entries,), from the first query on, ascending
    keys: np.ndarray  # (entries,)
    biases: list[np.ndarray]  # (entries,), in the order in which they are added


def entry_blocks(p: Problem) -> Iterator[tuple[Head, Entries]]:
    """Every query with all entries of its row, and with the operands of its head."""
    intervals = p.key_range.bounds()
    for batch in np.ndindex(p.batch):
        starts = p.mask.starts[p.mask.pattern_of(batch)]
        for head in range(p.heads):
            h, interval = head_of(p, batch, head), None
            if intervals is not None:
                interval = tuple(np.broadcast_to(x, p.rows())[h.where] for x in intervals)
            first = 0
            while first < p.n_queries:
                last = int(np.searchsorted(starts, starts[first] + ENTRIES, "right")) - 1
                last = min(max(last, first + 1), first + ENTRIES, p.n_queries)
                yield h, _entries(p, h, slice(first, last), interval)
                first = last


def head_of(p: Problem, batch: tuple[int, ...], head: int) -> Head:
    where, kv_where = (*batch, head), (*batch, head // p.group)

    def of(x, index, heads):
        return None if x is None else np.broadcast_to(x, (*p.batch, heads, *x.shape[-2:]))[index]

    def of_keys(x):
        if x is None or p.block_table is None:
            return of(x, kv_where, p.kv_heads)
        pool = np.broadcast_to(x, (len(x), p.kv_heads, *x.shape[2:]))
        return Paged(pool[:, kv_where[-1]], p.block_table[batch if len(p.block_table) > 1 else 0])

    return Head(
        where, kv_where,
        of(p.q, where, p.heads), of_keys(p.k), of_keys(p.v), of_keys(p.k_scales),
        of_keys(p.v_scales), np.float64(p.scale if isinstance(p.scale, float) else p.scale[head]),
        of(p.bias, where, p.heads), None if p.relative_bias is None else p.relative_bias[head],
        None if p.alibi is None else p.accumulator.type(p.alibi[head]),
        None if p.sinks is None else p.accumulator.type(p.sinks[head]),
        p.q_offset if isinstance(p.q_offset, int) else int(p.q_offset[batch][0]),
    )  # fmt: skip


def _entries(p: Problem, h: Head, queries: slice, interval) -> Entries:
    """What is seen of some rows: biases of -inf leave entries out."""
    rows, keys = p.mask.entries(p.mask.pattern_of(h.where[:-1]), queries, interval)
    e = Entries(queries, rows, keys, [])
    if h.bias is not None:
        e.biases.append(h.bias[queries.start + rows, keys])
    if h.relative_bias is not None:
        e.biases.append(h.relative_bias[distance_index(h, e)])
    seen = np.all([bias != -np.inf for bias in e.biases], axis=0)
    if seen.all():
        return e
    return Entries(queries, rows[seen], keys[seen], [bias[seen] for bias in e.biases])


def pieces(e: Entries) -> Iterator[slice]:
    """So many entries at a time as are gathered together."""
    for first in range(0, len(e.keys), ENTRIES):
        yield slice(first, first + ENTRIES)


def keys_of(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    keys = e.keys[piece]
    return as_real(_gathered(h.k, keys), _gathered(h.k_scales, keys), p.accumulator, p.head_dim)


def values_of(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    keys = e.keys[piece]
    return as_real(_gathered(h.v, keys), _gathered(h.v_scales, keys), p.accumulator, p.value_dim)


def _gathered(x: np.ndarray | Paged | None, keys):
    if isinstance(x, Paged):
        return x.pool[x.pages[keys // x.pool.shape[1]], keys % x.pool.shape[1]]
    return None if x is None else x[keys]


def queries_of(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    return h.q[e.queries][e.rows[piece]].astype(p.accumulator)


def capped_products(
    p: Problem, h: Head, e: Entries, vectors: Callable = lambda x, dx: (x, dx)
) -> np.ndarray:
    """The scores before anything is added: (entries,)."""
    s = np.empty(len(e.keys), p.accumulator)
    for piece in pieces(e):
        q, k = (vectors(of(p, h, e, piece)[:, None], None)[0] for of in (queries_of, keys_of))
        scaled = q * h.scale.astype(p.accumulator) if p.score_function is DOT else q
        s[piece] = capped_products_of(p, h.scale, scaled, k, q)[:, 0, 0]
    return s


def unscaled(p: Problem, h: Head, e: Entries) -> np.ndarray:
    """What the scale of each score multiplies: (entries,)."""
    found = np.empty(len(e.keys), p.accumulator)
    for piece in pieces(e):
        q, k = queries_of(p, h, e, piece), keys_of(p, h, e, piece)
        if p.score_function is DOT:
            found[piece] = (q * k).sum(axis=-1)
        else:
            found[piece] = unscaled_scores(p.score_function, q[:, None], k[:, None])[:, 0, 0]
    return found


def distance_index(h: Head, e: Entries) -> np.ndarray:
    """Where the distance of each key stands in the relative bias."""
    assert h.relative_bias is not None
    reach = len(h.relative_bias) // 2
    return np.clip(e.keys - (e.rows + (e.queries.start + h.q_offset)), -reach, reach) + reach


def kept_of(p: Problem, h: Head, e: Entries) -> np.ndarray | None:
    """Which weights dropout keeps; None without it."""
    if p.dropout is None:
        return None
    *batch, head = h.where
    entry = np.ravel_multi_index(batch, p.batch) if batch else 0
    return p.dropout.kept_of(entry, head, e.queries.start + e.rows, e.keys)


def distances(h: Head, e: Entries) -> np.ndarray:
    return np.abs(e.rows + (e.queries.start + h.q_offset) - e.keys)


def scores(p: Problem, h: Head, e: Entries) -> np.ndarray:
    return added(p, h, e, capped_products(p, h, e))


def added(p: Problem, h: Head, e: Entries, products) -> np.ndarray:
    """The scores of `products`: with the biases, then alibi."""
    real, s = p.accumulator.type, products
    for bias in e.biases:
        bias = in_range(bias, real).astype(real)
        s = sum_in_range(s + bias, s, bias)
    if h.slope is not None:
        s = sum_in_range(s - h.slope * distances(h, e).astype(real), s, h.slope)
    return s


def length(side: slice) -> int:
    return side.stop - side.start


def _row_tops(p: Problem, h: Head, e: Entries, s) -> np.ndarray:
    """What scores are taken relative to: the largest of each row or its sink, 0 where is none."""
    top = row_maximum(e, s, -np.inf if h.sink is None else h.sink)
    return np.where(top == -np.inf, p.accumulator.type(0), top)


def row_maximum(e: Entries, s, initial) -> np.ndarray:
    """The largest number of each row, at least `initial`."""
    top = np.full(length(e.queries), initial, s.dtype)
    starts = np.flatnonzero(np.diff(e.rows, prepend=-1))
    if len(starts):
        rows = e.rows[starts]
        top[rows] = np.maximum(top[rows], np.maximum.reduceat(s, starts))
    return top


def softmax(p: Problem, h: Head, e: Entries, s) -> tuple[np.ndarray, np.ndarray]:
    """``(weights, lse)`` of the entries and of the rows."""
    shift, total = shift_and_total(p, h, e, s)
    return np.exp(s - shift[e.rows]) / total[e.rows], shift + np.log(total)


def shift_and_total(p: Problem, h: Head, e: Entries, s) -> tuple[np.ndarray, np.ndarray]:
    """The weights are ``exp(s - shift) / total``."""
    shift = _row_tops(p, h, e, s)
    total = summed(e.rows, np.exp(s - shift[e.rows]), len(shift))
    if h.sink is not None:
        total += np.exp(h.sink - shift)
    # Inf beside which others weigh nothing.
    return shift, np.where(shift == np.inf, p.accumulator.type(1), total)


def summed(places, x, n: int) -> np.ndarray:
    """`x` summed by its places, which ascend: (n, ...)."""
    total = np.zeros((n, *x.shape[1:]), x.dtype)
    add_sums(total, places, x)
    return total


def add_sums(total, places, x) -> None:
    """Add `x` to `total` at its places, which ascend."""
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    while len(starts) < len(x):
        # Runs of at most so many rows each, then runs of their sums.
        at = np.arange(len(x)) - np.repeat(starts, np.diff(starts, append=len(x)))
        runs = np.flatnonzero(at % RUN == 0)
        x, places = np.add.reduceat(x, runs, axis=0), places[runs]
        starts = np.flatnonzero(np.diff(places, prepend=-1))
    total[places] += x
