"""Keys in a pool of pages: the block table, checked, and where a key lies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .arguments import integers
from .visibility import KeyRange

__all__ = [
    "Held", "block_table_array", "check_pool", "page_runs", "rows_in_pages", "usable_table",
]  # fmt: skip


class Held(NamedTuple):
    """What a `KVCache` says of its keys and values, which takes the place of a block table. Nothing
    of it is checked.
    """

    table: np.ndarray  # (batch, pages), int64
    n_keys: int  # no more than the rows of these
    head_dim: int
    value_dim: int
    scales: tuple[np.ndarray, ...]  # of k and v, (n_pages, kv_heads, page, groups), or none
    widens: bool  # do the dtypes of k and v count for that of the result?


def check_pool(q, k, v) -> None:
    """An error if these are not the queries of a batch and the keys and values of a pool."""
    for name, x, axes in (
        ("q", q, "batch, heads, queries, head_dim"),
        ("k", k, "n_pages, kv_heads, page, head_dim"),
        ("v", v, "n_pages, kv_heads, page, value_dim"),
    ):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected shape ({axes}) with block_table, got {x.shape}")
    if v.shape[0] != k.shape[0] or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"v: expected {k.shape[0]} pages of {k.shape[2]} keys as in k, "
            f"got {v.shape[0]} of {v.shape[2]}"
        )


def block_table_array(value, batch: int) -> np.ndarray:
    """The block table as int64, or an error; its entries are for `usable_table` to check."""
    table = integers("block_table", value)
    if table.ndim != 2 or table.shape[0] not in (1, batch):
        raise ValueError(
            f"block_table: expected shape (batch, pages) with batch {batch} or 1, got {table.shape}"
        )
    return table


def usable_table(table: np.ndarray, n_pages: int, page: int, visible: KeyRange) -> np.ndarray:
    """`table` with 0 for the entries that no query needs, whatever they were, or an error if one
    that a query needs is no page of the pool.
    """
    wrong = (table < 0) | (table >= n_pages)
    if not wrong.any():
        return table
    needed = _needed(visible, table.shape[1], page)
    if table.shape[0] == 1:
        needed = np.logical_or.reduce(needed, axis=0, keepdims=True)
    for b, n in np.argwhere(wrong & needed):
        raise ValueError(
            f"block_table: expected pages in 0..{n_pages - 1}, got {table[b, n]} for page {n} of "
            f"entry {b}"
        )
    return np.where(wrong, 0, table)


def _needed(visible: KeyRange, pages: int, page: int) -> np.ndarray:
    """Which pages hold a key that some query of the entry may see, (batch, pages)."""
    bounds = visible.bounds()
    assert bounds is not None  # there are lengths
    start, stop = np.broadcast_arrays(*bounds)
    entries = start.shape[0] if start.ndim > 2 else 1
    start, stop = (x.reshape(entries, x.size // max(entries, 1)) for x in (start, stop))
    some, page = start < stop, max(page, 1)
    first, last = np.where(some, start // page, 0), np.where(some, -(-stop // page), 0)
    edges = np.zeros((len(start), pages + 1), np.int64)
    entry = np.arange(len(start))[:, None]
    np.add.at(edges, (entry, first), some)
    np.subtract.at(edges, (entry, last), some)
    return edges[:, :-1].cumsum(axis=1) > 0


def page_runs(first: int, last: int, page: int) -> Iterator[tuple[int, slice]]:
    """The keys ``first <= j < last`` page by page: its place in the block table, and its rows."""
    while first < last:
        n, row = divmod(first, page)
        end = min(page, row + last - first)
        yield n, slice(row, end)
        first += end - row


def rows_in_pages(pool, pages, first: int, last: int) -> np.ndarray:
    """The keys ``first <= j < last`` of the sequence whose pages of the `pool`, (n_pages, heads,
    page, ...), these are: (heads, last - first, ...).
    """
    runs = [pool[pages[n], :, rows] for n, rows in page_runs(first, last, pool.shape[2])]
    if len(runs) == 1:
        return runs[0]
    empty = np.empty((pool.shape[1], 0, *pool.shape[3:]), pool.dtype)
    return np.concatenate(runs, axis=1) if runs else empty
