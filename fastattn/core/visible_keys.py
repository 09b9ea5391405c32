"""Which keys are seen at all, by some query or other, without an array of queries x keys."""

from __future__ import annotations

import numpy as np

from .arguments import broadcast_shapes
from .problem import Problem
from .sparse_mask import SparseMask

__all__ = ["keys_visible_to_any"]

# How many queries' rows of a mask or a bias are looked at together.
_ROWS = 16


def keys_visible_to_any(p: Problem) -> np.ndarray:
    """Does a query see the key? bool, broadcastable to (batch, kv_heads, keys)."""
    intervals = p.key_range.bounds()
    if isinstance(p.mask, SparseMask):
        return _of_key_heads(p, _listed(p, p.mask, intervals))
    if p.mask is None and p.bias is None:
        if intervals is None:
            return np.ones(p.n_keys, bool)
        seen = _covered(*intervals, p.n_keys)
    else:
        seen = np.zeros((1, p.n_keys), bool)
        for first in range(0, p.n_queries, _ROWS):
            seen = seen | _visible_to_rows(p, intervals, slice(first, first + _ROWS))
    return _of_key_heads(p, seen)


def _of_key_heads(p: Problem, seen) -> np.ndarray:
    """The keys visible to any head of a group, from those visible to each head."""
    seen = np.broadcast_to(seen, (*seen.shape[:-2], p.heads, p.n_keys))
    by_group = seen.reshape(*seen.shape[:-2], p.kv_heads, p.group, p.n_keys)
    return np.logical_or.reduce(by_group, axis=-2)


def _listed(p: Problem, mask: SparseMask, intervals) -> np.ndarray:
    """The keys that a sparse mask and the rest show to any query, by head: (batch, heads, keys)."""
    shapes = [(len(mask.starts), 1)[-1 - len(p.batch) :], *(x.shape[:-1] for x in intervals or ())]
    if p.bias is not None:
        own = (1 if step == 0 else n for n, step in zip(p.bias.shape, p.bias.strides, strict=True))
        shapes.append(tuple(own)[:-2])
    lead = broadcast_shapes(*shapes)
    seen = np.zeros((*lead, p.n_keys), bool)
    every = slice(0, p.n_queries)
    for where in np.ndindex(lead):
        interval = None
        if intervals is not None:
            interval = tuple(np.broadcast_to(x, (*lead, p.n_queries))[where] for x in intervals)
        rows, keys = mask.entries(mask.pattern_of(where[:-1]), every, interval)
        if p.bias is not None:
            index = (i if step else 0 for i, step in zip(where, p.bias.strides, strict=False))
            keys = keys[p.bias[tuple(index)][rows, keys] != -np.inf]
        seen[where][keys] = True
    return seen


def _covered(start, stop, n_keys) -> np.ndarray:
    """Which keys lie in an interval ``start <= j < stop`` of the last axis: (..., keys)."""
    *lead, n = broadcast_shapes(start.shape, stop.shape)
    start, stop = (np.broadcast_to(x, (*lead, n)).reshape(-1, n) for x in (start, stop))
    edges = np.zeros((len(start), n_keys + 1), np.int64)
    rows = np.arange(len(start))[:, None]
    full = start < stop
    np.add.at(edges, (rows, start), full)
    np.subtract.at(edges, (rows, np.where(full, stop, start)), full)
    seen = edges[:, :-1].cumsum(axis=-1) > 0
    return seen.reshape(*(lead or [1]), n_keys)


def _visible_to_rows(p: Problem, intervals, rows: slice) -> np.ndarray:
    """`keys_visible_to_any` by some of the queries: broadcastable to (batch, heads, keys)."""

    def these(x):
        """`x` for these rows, with axes of length 1 for those along which it is broadcast."""
        x = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.strides)]
        return x if x.shape[-2] == 1 else x[..., rows, :]

    seen = np.ones((1, 1, p.n_keys), bool)
    if p.mask is not None:
        seen = seen & these(p.mask)
    if p.bias is not None:
        seen = seen & (these(p.bias) != -np.inf)
    if intervals is not None:
        start, stop = (np.atleast_1d(x)[..., None] for x in intervals)
        j = np.arange(p.n_keys)
        seen = seen & (these(np.atleast_2d(start)) <= j) & (j < these(np.atleast_2d(stop)))
    return np.logical_or.reduce(seen, axis=-2)
