"""Sparse masks: the keys that each query sees, listed, as a `scipy.sparse` CSR array has them.

SciPy is the user's to import: an array of its is known by its attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import plain

__all__ = ["SparseMask", "is_sparse", "sparse_mask"]

_ROWS = "(queries, keys)"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SparseMask:
    """The keys that are seen, query by query: those of query ``i`` are
    ``keys[starts[n, i] : starts[n, i + 1]]``, ascending.

    There is one pattern `n` for all of a batch, or one for each entry of its last axis.
    """

    starts: np.ndarray  # (patterns, queries + 1), int64
    keys: np.ndarray  # int32 or int64
    n_keys: int

    @property
    def n_queries(self) -> int:
        return self.starts.shape[1] - 1

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.starts, self.keys

    @property
    def n_entries(self) -> int:
        """How many pairs are seen, of all patterns."""
        return int((self.starts[:, -1] - self.starts[:, 0]).sum())

    def pattern_of(self, batch: tuple[int, ...]) -> int:
        """The pattern of a batch entry."""
        return batch[-1] if len(self.starts) > 1 else 0

    def entries(
        self, pattern: int, queries: slice, interval: tuple[np.ndarray, ...] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``(rows, keys)`` of some queries, the rows counted from the first of them. Of all
        queries `interval` is ``(start, stop)``: the keys ``start <= j < stop`` are left.
        """
        starts = self.starts[pattern, queries.start : queries.stop + 1]
        rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        keys = self.keys[starts[0] : starts[-1]]
        if interval is not None:
            start, stop = (side[queries] for side in interval)
            inside = (start[rows] <= keys) & (keys < stop[rows])
            rows, keys = rows[inside], keys[inside]
        return rows, keys

    def part(self, batch: tuple[slice, ...], queries: slice, keys: slice) -> SparseMask:
        """The mask of some entries, queries and keys, these counted from the first of each."""
        patterns = range(len(self.starts))
        if len(patterns) > 1:
            patterns = patterns[batch[-1]]
        parts = []
        for pattern in patterns:
            rows, found = self.entries(pattern, queries)
            inside = (keys.start <= found) & (found < keys.stop)
            parts.append((rows[inside], found[inside] - keys.start))
        return _joined(parts, queries.stop - queries.start, keys.stop - keys.start)

    def dense(self) -> np.ndarray:
        """As a mask of (queries, keys), or of (patterns, 1, queries, keys)."""
        seen = np.zeros((len(self.starts), 1, self.n_queries, self.n_keys), bool)
        for pattern, view in enumerate(seen):
            view[0][self.entries(pattern, slice(0, self.n_queries))] = True
        return seen if len(seen) > 1 else seen[0, 0]


def is_sparse(value) -> bool:
    """Is `value` a sparse mask, an array of `scipy.sparse`, or a sequence that has one?"""
    if type(value) is np.ndarray and value.dtype.kind != "O":
        return False
    if isinstance(value, SparseMask):
        return True
    items = value if _is_sequence(value) else [value]
    listed = any(hasattr(x, "tocsr") or hasattr(x, "indptr") for x in items)
    return listed or len(items) == 0  # of a batch of none


def _is_sequence(value) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind == "O" and value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, memoryview))


def sparse_mask(value, batch: tuple[int, ...], n_queries: int, n_keys: int) -> SparseMask:
    """`value`, for which `is_sparse` holds, as a `SparseMask` of its own order, or an error."""
    if isinstance(value, SparseMask):
        return value
    if not _is_sequence(value):
        return _read("mask:", value, n_queries, n_keys)
    if not batch:
        raise ValueError(
            f"mask: expected one CSR array for {_ROWS} = ({n_queries}, {n_keys}), got a sequence "
            f"of {len(value)}; it has one for each entry of a leading axis"
        )
    if len(value) != batch[-1]:
        raise ValueError(
            f"mask: expected {batch[-1]} CSR arrays, one for each entry of the last leading axis, "
            f"got {len(value)}"
        )
    if len(value) == 0:
        return SparseMask(np.zeros((1, n_queries + 1), np.int64), np.empty(0, np.int32), n_keys)
    read: dict[int, SparseMask] = {}
    for n, x in enumerate(value):
        if id(x) not in read:
            read[id(x)] = _read(f"mask: item {n}:", x, n_queries, n_keys)
    if len(read) == 1:
        return read[id(value[0])]
    masks = [read[id(x)] for x in value]
    sizes = np.cumsum([0, *(len(x.keys) for x in masks)])
    starts = np.concatenate([x.starts + size for x, size in zip(masks, sizes, strict=False)])
    return SparseMask(starts, np.concatenate([x.keys for x in masks]), n_keys)


def _read(name: str, value: Any, n_queries: int, n_keys: int) -> SparseMask:
    """One CSR array; its own indices where they are in order."""
    kind = getattr(value, "format", type(value).__name__)
    if kind != "csr" or not all(hasattr(value, x) for x in ("indptr", "indices", "data", "shape")):
        hint = "; pass .tocsr()" if hasattr(value, "tocsr") else ""
        raise TypeError(f"{name} expected a sparse array in CSR format, got {kind}{hint}")
    if tuple(value.shape) != (n_queries, n_keys):
        raise ValueError(
            f"{name} expected a CSR array of {_ROWS} = ({n_queries}, {n_keys}), "
            f"got {tuple(value.shape)}"
        )
    starts = _whole(name, "indptr", value.indptr).astype(np.int64)
    if starts.shape != (n_queries + 1,) or starts[0] != 0 or (starts[1:] < starts[:-1]).any():
        raise ValueError(
            f"{name} expected an indptr that rises from 0 over {n_queries} rows, got {starts}"
        )
    n_entries = int(starts[-1])
    keys, data = _whole(name, "indices", value.indices), plain("mask", value.data)
    if keys.ndim != 1 or data.ndim != 1 or min(len(keys), len(data)) < n_entries:
        raise ValueError(
            f"{name} expected {n_entries} indices and values, as its indptr says, "
            f"got {keys.size} and {data.size}"
        )
    keys, data = keys[:n_entries], data[:n_entries]
    if n_entries and not 0 <= keys.min() <= keys.max() < n_keys:
        wrong = keys[(keys < 0) | (keys >= n_keys)][0]
        raise ValueError(f"{name} expected indices in 0..{n_keys - 1}, got {wrong}")
    rising = keys[1:] > keys[:-1]
    inner = starts[1:-1]
    rising[inner[(inner > 0) & (inner < n_entries)] - 1] = True  # from one row to the next
    if rising.all() and data.all():
        return SparseMask(
            starts[None], np.require(keys, keys.dtype.newbyteorder("="), ("C", "A")), n_keys
        )
    seen = data != 0
    rows = np.repeat(np.arange(n_queries), np.diff(starts))
    return _joined([_ordered(rows[seen], keys[seen])], n_queries, n_keys)


def _whole(name: str, part: str, value) -> np.ndarray:
    """Indices as int32 or int64."""
    x = plain("mask", value)
    if x.dtype.kind not in "iu":
        raise TypeError(f"{name} expected {part} of integers, got {x.dtype}")
    return x if x.dtype in (np.int32, np.int64) else x.astype(np.int64)


def _ordered(rows, keys) -> tuple[np.ndarray, np.ndarray]:
    """The entries by row and key, each once."""
    order = np.lexsort((keys, rows))
    rows, keys = rows[order], keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (keys[1:] != keys[:-1])
    return rows[first], keys[first]


def _joined(parts, n_queries: int, n_keys: int) -> SparseMask:
    """The mask of ``(rows, keys)``, in order, of each pattern."""
    starts = np.zeros((len(parts), n_queries + 1), np.int64)
    before = 0
    for row, (rows, keys) in zip(starts, parts, strict=True):
        row[0] = before
        row[1:] = before + np.bincount(rows, minlength=n_queries).cumsum()
        before += len(keys)
    keys = [keys for _, keys in parts] or [np.empty(0, np.int32)]
    keys = np.concatenate(keys) if len(keys) > 1 else keys[0]
    return SparseMask(starts, np.ascontiguousarray(keys, keys.dtype.newbyteorder("=")), n_keys)
