"""A call in chunks, so that what is made of its queries, keys and values takes a few MiB.

Entries and heads that are small are taken together. How the queries and the keys of one head are
split depends on the sizes of one head alone, so that slices of a call agree with the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .backward import of_its_array, solve_backward
from .core.backward import Backward
from .core.dropout import Dropout
from .core.option_table import OPTIONS, PARTS
from .core.problem import DOT, Gradient, Problem, make_problem
from .core.sparse_mask import SparseMask
from .merge import merge

__all__ = [
    "Chunk",
    "Gradients",
    "Union",
    "blocks",
    "entries",
    "fill",
    "narrowed",
    "runs",
    "singles",
]  # fmt: skip

# What one operand of a chunk takes at most, once it is copied. Queries and keys that are split are
# split in whole tiles and blocks of the kernels.
CHUNK_BYTES = 4 << 20
QUERIES, KEYS = 384, 512


class Chunk(NamedTuple):
    """Some batch entries, heads, queries and keys of a problem."""

    batch: tuple[slice, ...]
    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice

    def of(self, x, axes: str):
        """The chunk's view of an array of (batch, *axes): h, g, q and j stand for heads, key heads,
        queries and keys, a point for an axis of its own. Axes of length 1 broadcast and stay.
        """
        sides = {"h": self.heads, "g": self.kv_heads, "q": self.queries, "j": self.keys}
        where = (*self.batch, *(sides.get(axis, slice(None)) for axis in axes))
        where = where[len(where) - x.ndim :]
        return x[tuple(slice(None) if n == 1 else s for n, s in zip(x.shape, where, strict=True))]

    def options(self, p: Problem) -> dict[str, Any]:
        """The options of `p` as `make_problem` takes them, for the chunk's own queries and keys.
        Sinks come with the first keys.
        """
        first = self.keys.start
        shift = self.queries.start - first
        found = {name: getattr(p, name) for name in _VALUES}
        for name, axes in _ARRAYS.items():
            x = getattr(p, name)
            if isinstance(x, SparseMask):
                found[name] = x.part(self.batch, self.queries, self.keys)
            elif x is not None and not (name == "sinks" and first > 0):
                found[name] = self.of(x, axes) if isinstance(x, np.ndarray) else x
        offset = self.of(p.q_offset, "q")[..., 0] if np.ndim(p.q_offset) else p.q_offset
        found["q_offset"] = offset + shift
        r = p.key_range
        found["window"] = (r.left, r.right)
        if p.dropout is not None:
            found |= self._dropout(p, p.dropout)
        if r.lengths is not None:
            lengths = self.of(r.lengths, "") - first
            found["kv_lengths"] = np.clip(lengths, 0, self.keys.stop - first)
        if r.spans is not None:
            found["spans"] = tuple(self.of(x, "hq") - first for x in r.spans)
        return found

    def _dropout(self, p: Problem, dropout: Dropout) -> dict[str, Any]:
        # Its batch entries are a run of the flattened ones: axes are split from the first one on.
        first = tuple(side.start for side in self.batch)
        entry = int(np.ravel_multi_index(first, p.batch)) if first else 0
        own = dropout.shifted(entry, self.heads.start, self.queries.start, self.keys.start)
        return {"dropout": (own.rate, own.seed), "dropout_offset": own.offset}

    def backward(self, b: Backward) -> Backward:
        """`b` for the chunk's queries."""
        grad_lse = None if b.grad_lse is None else self.of(b.grad_lse, "hq")
        return b._replace(
            out=self.of(b.out, "hq."), lse=self.of(b.lse, "hq"),
            grad_out=self.of(b.grad_out, "hq."), grad_lse=grad_lse,
        )  # fmt: skip

    def gradients(
        self, b: Backward, q, k, v, options, backend, score_function=DOT
    ) -> dict[str, np.ndarray]:
        """By their names those of `q`, `k`, `v` and of the options; `b` has its queries only."""
        p = b.problem
        wrt = tuple(g.name for g in p.gradients[3:] if g.name in options)
        for g in p.gradients[3:]:
            if g.name == "bias":
                options["bias"] = self.of(narrowed(p.bias, g.shape), "hqj")
        stated = make_problem(
            q, k, v, gradients=True, wrt=wrt, score_function=score_function, **options
        )
        found = solve_backward(stated, backend, b.grad_out, b.out, b.lse, b.grad_lse)
        return dict(zip(("q", "k", "v", *wrt), found, strict=True))


# The options that a problem keeps under their names: values, and arrays that are cut along their
# axes behind the leading ones.
_KEPT = {name: OPTIONS[name] for name in Problem.__slots__ if name in OPTIONS}
_VALUES = tuple(name for name, x in _KEPT.items() if x.about != "results" and not x.takes_arrays)
_ARRAYS = {
    part.option: part.kind.lstrip("b")
    for part in PARTS.values()
    if isinstance(part.kind, str)
    and part.kind.strip(".")
    and part.option in _KEPT.keys() - {"out", "q_offset"}
}
_AXES = {"q": "hq.", "k": "gj.", "v": "gj.", **_ARRAYS}


class Gradients:
    """Those of a problem, summed up chunk by chunk, in the accumulator's dtype: with the axes that
    their arrays have, of length 1 where these broadcast.
    """

    def __init__(self, p: Problem):
        self.found = {}
        for g in p.gradients:
            shape = getattr(p, g.name).shape if g.name in "qkv" else g.shape
            self.found[g.name] = np.zeros(shape, p.accumulator)

    def add(self, chunk: Chunk, found: dict[str, np.ndarray]) -> None:
        with np.errstate(all="ignore"):
            for name, x in found.items():
                total, axes = self.found[name], _AXES[name]
                own = chunk.of(total, axes[-total.ndim :])
                own += of_its_array(x, Gradient(name, own.shape, own.dtype))


def entries(p: Problem) -> Iterator[Chunk]:
    """As many batch entries and heads as fit at a time, with all queries and keys."""
    batch = tuple(slice(0, n) for n in p.batch)
    heads, kv_heads = slice(0, p.heads), slice(0, p.kv_heads)
    whole = Chunk(batch, heads, kv_heads, slice(0, p.n_queries), slice(0, p.n_keys))
    return _split(p, whole, CHUNK_BYTES)


def singles(p: Problem, chunk: Chunk) -> Iterator[Chunk]:
    """Each batch entry and key head of the chunk by itself."""
    return _split(p, chunk, 0)


def _split(p: Problem, chunk: Chunk, most: int) -> Iterator[Chunk]:
    halves = _halves(p, chunk) if _bytes(p, chunk) > most else ()
    if not halves:
        yield chunk
    for half in halves:
        yield from _split(p, half, most)


def _bytes(p: Problem, chunk: Chunk) -> int:
    """Of the largest operand, without axes that broadcast."""
    rows = max(
        _length(chunk.heads) * _length(chunk.queries), _length(chunk.kv_heads) * _length(chunk.keys)
    )
    row = max(p.head_dim, p.value_dim) * p.accumulator.itemsize
    return math.prod(map(_length, chunk.batch)) * rows * row


def _length(side: slice) -> int:
    return side.stop - side.start


def _halves(p: Problem, chunk: Chunk) -> tuple[Chunk, ...]:
    """The chunk split along its batch or its heads; nothing if it is one entry and one key head."""
    for axis, side in enumerate(chunk.batch):
        if _length(side) > 1:
            batches = (
                (*chunk.batch[:axis], half, *chunk.batch[axis + 1 :]) for half in _halved(side)
            )
            return tuple(chunk._replace(batch=batch) for batch in batches)
    if _length(chunk.kv_heads) > 1:
        return tuple(
            chunk._replace(kv_heads=half, heads=slice(half.start * p.group, half.stop * p.group))
            for half in _halved(chunk.kv_heads)
        )
    return ()


def _halved(side: slice) -> tuple[slice, slice]:
    middle = (side.start + side.stop) // 2
    return slice(side.start, middle), slice(middle, side.stop)


def blocks(p: Problem, chunk: Chunk) -> Iterator[Chunk]:
    """The chunk's queries, as many as fit at a time."""
    row = p.group * max(p.head_dim, p.value_dim) * p.accumulator.itemsize
    for side in _cut(chunk.queries, row, QUERIES):
        yield chunk._replace(queries=side)


def runs(p: Problem, chunk: Chunk) -> Iterator[Chunk]:
    """The chunk's keys, as many as fit at a time."""
    row = max(p.head_dim, p.value_dim) * p.accumulator.itemsize
    for side in _cut(chunk.keys, row, KEYS):
        yield chunk._replace(keys=side)


def _cut(side: slice, row: int, multiple: int) -> Iterator[slice]:
    step = max(multiple, CHUNK_BYTES // row // multiple * multiple)
    for first in range(side.start, side.stop, step) or (side.start,):
        yield slice(first, min(first + step, side.stop))


def fill(p: Problem, result, found: Iterable[tuple[Chunk, tuple]]):
    """What a backend's `run` fills and returns, from ``(out, lse, row_max, weights)`` of blocks."""
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    row_max = np.empty(p.rows(), p.accumulator) if p.return_max else None
    weights = np.empty(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    for chunk, results in found:
        targets = result, lse, row_max, weights
        for target, x, axes in zip(targets, results, ("hq.", "hq", "hq", "hqj"), strict=True):
            if target is not None:
                with np.errstate(all="ignore"):
                    chunk.of(target, axes)[...] = x
    return lse, row_max, weights


class Union:
    """Attention of a block to sets of keys that have none in common, one set after another."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.out: Any = None
        self.lse: Any = None
        self.row_max: Any = None
        self.weights: Any = None

    def add(self, p: Problem, keys: slice, out, lse, *more) -> None:
        """The results of attention to some of the chunk's keys, of `keys`, with those besides that
        `p` asks for.
        """
        row_max = more[0] if p.return_max else None
        weights = more[-1] if p.return_weights else None
        if self.out is None:
            self.out, self.lse, self.row_max = out, lse, row_max
            if weights is not None and keys == self.chunk.keys:
                self.weights = weights
            elif weights is not None:
                shape = (*lse.shape, _length(self.chunk.keys))
                self.weights = np.zeros(shape, weights.dtype)
                self._of(keys)[...] = weights
            return
        if row_max is not None:
            self.row_max = np.maximum(self.row_max, row_max)
        before = self.lse
        wide = np.float64  # many sets are not to round the sum as often
        self.out, self.lse = merge((self.out.astype(wide), before.astype(wide)),
                                   (out.astype(wide), lse.astype(wide)))  # fmt: skip
        if weights is not None:
            with np.errstate(all="ignore"):
                self.weights *= self._share(before, weights.dtype)
                self._of(keys)[...] += weights * self._share(lse, weights.dtype)

    def _share(self, lse, dtype):
        """What a set's own weights are multiplied by."""
        return np.where(lse == -np.inf, 0, np.exp(lse - self.lse))[..., None].astype(dtype)

    def _of(self, keys: slice):
        first = self.chunk.keys.start
        return self.weights[..., keys.start - first : keys.stop - first]


def narrowed(x, shape):
    """The broadcast array `x` as one of its own `shape`, with axes of length 1 as that has."""
    own = (1,) * (x.ndim - len(shape)) + tuple(shape)
    return x[tuple(slice(0, 1) if n == 1 else slice(None) for n in own)]
