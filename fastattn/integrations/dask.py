"""Attention on Dask's arrays, larger than memory or on many machines: exact, block by block."""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

import fastattn

from ..core.dropout import Dropout
from ..core.option_table import PARTS, check, joined, split
from ..core.problem import Problem, make_problem
from ..dispatch import select

__all__ = ["scaled_dot"]

# The axes behind the leading ones, by name; an array of fewer axes has the last of them. d is one
# of an array's own, which is not cut.
_AXES = {"q": "hqd", "k": "hjd", "v": "hjd"} | {
    name: part.kind.lstrip("b").replace(".", "d")
    for name, part in PARTS.items()
    if isinstance(part.kind, str)
}


def scaled_dot(q, k, v, **options):
    """`fastattn.scaled_dot` on Dask's arrays: block of queries by block of keys.

    Parameters
    ----------
    q : dask Array, (..., Hq, Sq, D)
        In chunks along any axis but the last, which is made one.
    k, v : dask Array, (..., Hkv, Sk, D or Dv)
        Likewise. The chunks of their leading axes and heads are made those of `q`, and v's keys
        those of `k`. Only one chunk of keys need be in memory for one of queries.
    **options
        As of `fastattn.scaled_dot`, except ``block_table``, ``out`` and ``return_weights``. Arrays
        may be Dask's, but for a sparse `mask`, which cannot be cut; they are cut like the queries
        and keys. Chunks do not change which weights are dropped; with dropout leading axes but the
        first are made one chunk. ``threads``, 1 by default, is for each block; Dask works at
        several blocks at once.

    Returns
    -------
    out : dask Array, (..., Hq, Sq, Dv)
        In the chunks of `q`.
    lse : dask Array, (..., Hq, Sq), if `return_lse`
        In the same chunks.
    row_max : dask Array, (..., Hq, Sq), if `return_max`
        Likewise.

    Raises
    ------
    TypeError, ValueError
        Before anything is computed, as `fastattn.scaled_dot`; lengths out of range in a Dask array
        are found in the computation.

    Notes
    -----
    The parts are merged as in `fastattn.merge`, in a tree.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn.integrations.dask import scaled_dot
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 300, 16))
    >>> chunked = [da.from_array(x, chunks=(2, 100, 16)) for x in (q, k, v)]
    >>> out = scaled_dot(*chunked, causal=True)
    >>> out.chunks
    ((2, 2), (100, 100, 100), (16,))
    >>> np.allclose(out.compute(), fastattn.scaled_dot(q, k, v, causal=True))
    True
    """
    check("dask", options)
    options.setdefault("threads", 1)
    dropout = {name: options.pop(name, None) for name in ("dropout", "dropout_offset")}
    given, values = split(options)
    given = {"q": q, "k": k, "v": v, **given}
    asked = [values.pop(name, False) for name in ("return_lse", "return_max")]
    problem = _problem(given, values | dropout)
    values.pop("q_offset", None)
    if not isinstance(given.get("offsets"), da.Array):
        offset = problem.q_offset
        given["offsets"] = offset if isinstance(offset, int) else offset[..., 0]
    arrays = {name: da.asarray(x) for name, x in given.items()}
    whole = _Whole.of(problem, asked[1])
    if problem.one_head:
        heads = {name: arrays[name][None] for name in "qkv"}
        packed = _attend({**arrays, **heads}, values, problem, whole)[0]
    else:
        packed = _attend(arrays, values, problem, whole)
    out = packed[..., : whole.value_dim].astype(problem.dtype)
    chunks = {
        out.ndim - n: arrays["q"].chunks[-n]
        for n in range(2, arrays["q"].ndim + 1)
        if arrays["q"].shape[-n] == out.shape[-n]
    }
    sums = (packed[..., whole.value_dim + n] for n, wanted in enumerate(asked) if wanted)
    results = tuple(x.rechunk(chunks) for x in (out, *sums))
    return results if len(results) > 1 else results[0]


def _problem(arrays: dict[str, Any], values: dict[str, Any]) -> Problem:
    """The problem of arrays of which only shapes and dtypes are known, or an error."""
    parts = arrays | values
    for name, x in arrays.items():
        if isinstance(x, da.Array):
            if np.isnan(x.size):
                raise ValueError(f"{name}: chunks of unknown size; compute_chunk_sizes() helps")
            parts[name] = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    backend = parts.pop("backend", None)
    problem = make_problem(**joined(parts))
    if problem.is_sparse:
        raise TypeError("mask: expected an array, which can be cut, got a sparse one")
    select(problem, backend)
    return problem


def _attend(
    arrays: dict[str, da.Array], values: dict[str, Any], p: Problem, whole: _Whole
) -> da.Array:
    """``out`` with ``lse``, and the maximum, as more columns: (..., Sq, Dv + 1 or Dv + 2)."""
    batch = tuple(f"batch {n}" for n in range(len(p.batch)))
    sizes = dict(zip((*batch, *"hqj"), (*p.batch, p.heads, p.n_queries, p.n_keys), strict=True))
    labels = {}
    for name, x in arrays.items():
        every = (*batch, *_AXES[name])
        labels[name] = every[len(every) - x.ndim :]
    cut = _cut(arrays, labels, sizes, p.group if p.kv_heads > 1 else 1)
    if p.dropout is not None:  # so that the entries of a block follow one another
        cut |= {axis: (sizes[axis],) for axis in batch[1:]}
    operands: list[Any] = []
    places = dict(zip(_PLACES, (*"qjh", *batch[:1]), strict=False))
    for axis in places.values():
        operands += [da.arange(sizes[axis], chunks=(cut[axis],)), (axis,)]
    for name, x in arrays.items():
        operands += [x.rechunk(_chunks(x, labels[name], sizes, cut)), labels[name]]
    out = (*batch, *"hqjd")
    columns = whole.value_dim + 1 + whole.return_max
    packed = da.blockwise(
        _part, out, *operands, names=(*places, *arrays), values=values, p=whole,
        align_arrays=False, adjust_chunks={**cut, "j": (1,) * len(cut["j"]), "d": columns},
        meta=np.empty((0,) * len(out), p.accumulator),
    )  # fmt: skip
    merged = partial(_merged, value_dim=whole.value_dim)
    return da.reduction(
        packed, _as_it_is, merged, axis=packed.ndim - 2, combine=merged, concatenate=True,
        dtype=packed.dtype, meta=np.empty((0,) * (packed.ndim - 1), packed.dtype),
    )  # fmt: skip


def _cut(arrays, labels, sizes, group: int) -> dict[str, tuple[int, ...]]:
    """The chunks of each axis: of the first of q, k and v that has it in full, groups whole."""
    cut: dict[str, tuple[int, ...]] = {}
    for name in "qkv":
        for label, pieces in zip(labels[name], arrays[name].chunks, strict=True):
            if sum(pieces) == sizes.get(label):
                cut.setdefault(label, tuple(n for n in pieces if n) or (0,))
    ends = [end for end in accumulate(cut["h"]) if end % group == 0]
    return {**cut, "h": tuple(b - a for a, b in pairwise((0, *ends)))}


def _chunks(x: da.Array, labels, sizes, cut) -> tuple[tuple[int, ...], ...]:
    """Those of one array: an axis of 1 broadcasts, heads of keys are cut with their groups."""
    chunks = []
    for label, n in zip(labels, x.shape, strict=True):
        if n == 1 or label == "d":
            chunks.append((n,))
        elif n == sizes[label]:
            chunks.append(cut[label])
        else:
            chunks.append(tuple(piece * n // sizes[label] for piece in cut[label]))
    return tuple(chunks)


# ---------------------------------------------------------------------------- one block at a time


_PLACES = ("rows", "columns", "heads", "entries")  # whose numbers each block is told


class _Whole(NamedTuple):
    """What blocks need to know of the whole problem."""

    n_keys: int
    value_dim: int
    entries: int  # in one place of the first leading axis
    dropout: Dropout | None
    return_max: bool

    @classmethod
    def of(cls, p: Problem, return_max: bool) -> _Whole:
        return cls(p.n_keys, p.value_dim, math.prod(p.batch[1:]), p.dropout, return_max)


def _part(*blocks, names, values, p: _Whole) -> np.ndarray:
    """One block of queries with one of keys, (..., queries, 1, columns)."""
    parts = dict(zip(names, blocks, strict=True))
    rows, columns, heads = (parts.pop(name) for name in _PLACES[:3])
    entries = parts.pop("entries", np.zeros(1, int))
    options: dict[str, Any] = {}
    if p.dropout is not None:
        start = (int(x[:1].sum()) for x in (entries * p.entries, heads, rows, columns))
        own = p.dropout.shifted(*start)
        options = {"dropout": (own.rate, own.seed), "dropout_offset": own.offset}
    first, here = int(columns[:1].sum()), columns.size
    parts["offsets"] = parts["offsets"] + int(rows[:1].sum()) - first
    if first > 0:
        parts.pop("sinks", None)  # they count once
    if "kv_lengths" in parts:
        lengths = parts["kv_lengths"]
        wrong = lengths[(lengths < 0) | (lengths > p.n_keys)]
        if wrong.size:
            raise ValueError(f"kv_lengths: expected 0..{p.n_keys}, got {wrong[0]}")
    for name in {"kv_lengths", "start", "stop"} & parts.keys():
        parts[name] = np.clip(parts[name], first, first + here) - first
    options |= joined(parts | values) | {"return_lse": True, "return_max": p.return_max}
    found = fastattn.scaled_dot(**options)
    return _packed(*found)[..., None, :]


def _packed(out: np.ndarray, *sums: np.ndarray) -> np.ndarray:
    columns = (x[..., None] for x in sums)
    return np.concatenate([out.astype(sums[0].dtype), *columns], axis=-1)


def _merged(parts: np.ndarray, axis, keepdims, value_dim: int) -> np.ndarray:
    pairs = [(x[..., :value_dim], x[..., value_dim]) for x in np.moveaxis(parts, -2, 0)]
    row_max = parts[..., value_dim + 1 :].max(axis=-2)
    packed = np.concatenate([_packed(*fastattn.merge(*pairs)), row_max], axis=-1)
    return packed[..., None, :] if keepdims else packed


def _as_it_is(x: np.ndarray, axis, keepdims) -> np.ndarray:
    return x
