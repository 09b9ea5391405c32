"""Attention on Dask's arrays, larger than memory or on many machines: exact, block by block."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

import fastattn

from ..core.dropout import Dropout
from ..core.options import span_sides
from ..core.problem import Problem, make_problem
from ..dispatch import select

__all__ = ["scaled_dot"]

# The axes behind the leading ones, by name; an array of fewer axes has the last of them.
_AXES = {
    "q": "hid", "k": "hjd", "v": "hjd", "bias": "hij", "mask": "hij", "start": "hi", "stop": "hi",
    "alibi": "h", "sinks": "h", "q_offset": "", "kv_lengths": "",
}  # fmt: skip


def scaled_dot(
    q, k, v, *,
    scale=None, softcap=None, bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    dropout=None, dropout_offset=None,
    return_lse=False, backend=None, threads=1, precision=None,
):  # fmt: skip
    """`fastattn.scaled_dot` on Dask's arrays: block of queries by block of keys.

    Parameters
    ----------
    q : dask Array, (..., Hq, Sq, D)
        In chunks along any axis but the last, which is made one.
    k, v : dask Array, (..., Hkv, Sk, D or Dv)
        Likewise. The chunks of their leading axes and heads are made those of `q`, and v's keys
        those of `k`. Only one chunk of keys need be in memory for one of queries.
    bias, alibi, sinks, q_offset, kv_lengths, spans, mask : dask Array, or as in `scaled_dot`
        They are cut like the queries and keys.
    scale, softcap, causal, window, dropout, dropout_offset, return_lse, backend, precision
        As in `fastattn.scaled_dot`: chunks do not change which weights are dropped. With dropout
        leading axes but the first are made one chunk.
    threads : int, default 1
        How many to use for each block; Dask works at several blocks at once.

    Returns
    -------
    out : dask Array, (..., Hq, Sq, Dv)
        In the chunks of `q`.
    lse : dask Array, (..., Hq, Sq), if `return_lse`
        In the same chunks.

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
    start, stop = (None, None) if spans is None else span_sides(spans)
    options = {"scale": scale, "softcap": softcap, "causal": causal, "window": window,
               "backend": backend, "threads": threads, "precision": precision, "dropout": dropout,
               "dropout_offset": dropout_offset}  # fmt: skip
    given = {
        "q": q, "k": k, "v": v, "bias": bias, "mask": mask, "alibi": alibi, "sinks": sinks,
        "q_offset": q_offset, "kv_lengths": kv_lengths, "start": start, "stop": stop,
    }  # fmt: skip
    given = {name: x for name, x in given.items() if x is not None}
    problem = _problem(given, options)
    if not isinstance(q_offset, da.Array):
        offset = problem.q_offset
        given["q_offset"] = offset if isinstance(offset, int) else offset[..., 0]
    arrays = {name: da.asarray(x) for name, x in given.items()}
    if problem.one_head:
        packed = _attend({**arrays, **{x: arrays[x][None] for x in "qkv"}}, options, problem)[0]
    else:
        packed = _attend(arrays, options, problem)
    out, lse = packed[..., :-1].astype(problem.dtype), packed[..., -1]
    chunks = {
        out.ndim - n: arrays["q"].chunks[-n]
        for n in range(2, arrays["q"].ndim + 1)
        if arrays["q"].shape[-n] == out.shape[-n]
    }
    return (out.rechunk(chunks), lse.rechunk(chunks)) if return_lse else out.rechunk(chunks)


def _problem(given: dict[str, Any], options: dict[str, Any]) -> Problem:
    """The problem of arrays of which only shapes and dtypes are known, or an error."""
    words = dict(given)
    for name, x in given.items():
        if isinstance(x, da.Array):
            if np.isnan(x.size):
                raise ValueError(f"{name}: chunks of unknown size; compute_chunk_sizes() helps")
            words[name] = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    if "start" in words:
        words["spans"] = words.pop("start"), words.pop("stop")
    backend = options["backend"]
    problem = make_problem(**words, **{name: x for name, x in options.items() if name != "backend"})
    select(problem, backend)
    return problem


def _attend(arrays: dict[str, da.Array], options: dict[str, Any], p: Problem) -> da.Array:
    """``out`` with ``lse`` as one more column, (..., Sq, Dv + 1)."""
    batch = tuple(f"batch {n}" for n in range(len(p.batch)))
    sizes = dict(zip((*batch, *"hij"), (*p.batch, p.heads, p.n_queries, p.n_keys), strict=True))
    labels = {}
    for name, x in arrays.items():
        every = (*batch, *_AXES[name])
        labels[name] = every[len(every) - x.ndim :]
    cut = _cut(arrays, labels, sizes, p.group if p.kv_heads > 1 else 1)
    if p.dropout is not None:  # so that the entries of a block follow one another
        cut |= {axis: (sizes[axis],) for axis in batch[1:]}
    operands: list[Any] = []
    places = dict(zip(_PLACES, (*"ijh", *batch[:1]), strict=False))
    for axis in places.values():
        operands += [da.arange(sizes[axis], chunks=(cut[axis],)), (axis,)]
    for name, x in arrays.items():
        operands += [x.rechunk(_chunks(x, labels[name], sizes, cut)), labels[name]]
    out = (*batch, *"hijd")
    packed = da.blockwise(
        _part, out, *operands, names=(*places, *arrays), options=options, p=_Whole.of(p),
        align_arrays=False, adjust_chunks={**cut, "j": (1,) * len(cut["j"]), "d": p.value_dim + 1},
        meta=np.empty((0,) * len(out), p.accumulator),
    )  # fmt: skip
    return da.reduction(
        packed, _as_it_is, _merged, axis=packed.ndim - 2, combine=_merged, concatenate=True,
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
    entries: int  # in one place of the first leading axis
    dropout: Dropout | None

    @classmethod
    def of(cls, p: Problem) -> _Whole:
        return cls(p.n_keys, math.prod(p.batch[1:]), p.dropout)


def _part(*blocks, names, options, p: _Whole) -> np.ndarray:
    """One block of queries with one of keys, (..., queries, 1, Dv + 1)."""
    words = dict(zip(names, blocks, strict=True))
    rows, columns, heads = (words.pop(name) for name in _PLACES[:3])
    entries = words.pop("entries", np.zeros(1, int))
    if p.dropout is not None:
        start = (int(x[:1].sum()) for x in (entries * p.entries, heads, rows, columns))
        options = options | {"dropout_offset": p.dropout.shifted(*start).offset}
    n_keys = p.n_keys
    first, here = int(columns[:1].sum()), columns.size
    words["q_offset"] = words["q_offset"] + int(rows[:1].sum()) - first
    if first > 0:
        words.pop("sinks", None)  # they count once
    if "kv_lengths" in words:
        lengths = words["kv_lengths"]
        wrong = lengths[(lengths < 0) | (lengths > n_keys)]
        if wrong.size:
            raise ValueError(f"kv_lengths: expected 0..{n_keys}, got {wrong[0]}")
        words["kv_lengths"] = np.clip(lengths, first, first + here) - first
    if "start" in words:
        sides = words.pop("start"), words.pop("stop")
        words["spans"] = tuple(np.clip(x, first, first + here) - first for x in sides)
    return _packed(*fastattn.scaled_dot(**words, **options, return_lse=True))[..., None, :]


def _packed(out: np.ndarray, lse: np.ndarray) -> np.ndarray:
    return np.concatenate([out.astype(lse.dtype), lse[..., None]], axis=-1)


def _merged(parts: np.ndarray, axis, keepdims) -> np.ndarray:
    pairs = [(x[..., :-1], x[..., -1]) for x in np.moveaxis(parts, -2, 0)]
    packed = _packed(*fastattn.merge(*pairs))
    return packed[..., None, :] if keepdims else packed


def _as_it_is(x: np.ndarray, axis, keepdims) -> np.ndarray:
    return x
