"""Keys and values that grow token by token, in the precision that memory allows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .attention import scaled_dot, solve
from .core.arguments import count, integers, plain
from .core.dtypes import FLOATS, float_type, is_float
from .core.options import span_sides
from .core.problem import make_problem

__all__ = ["KVCache"]

_STORED = (*FLOATS, "int8")
_INT8_MAX = 127
_SMALLEST_SCALE = np.finfo(np.float32).smallest_subnormal
# What `attend` takes: the cache says itself which keys there are and where they are.
_OPTIONS = set(scaled_dot.__kwdefaults__ or ()) - {"kv_lengths", "q_offset"}


class _State(NamedTuple):
    """What a cache holds at one moment. It is replaced, never changed, so that a call that runs
    beside an `append` of another thread sees the cache as it was at its start.
    """

    # Keys, values, and the scales of both where they have some: (batch, kv_heads, capacity, ...).
    arrays: list[np.ndarray]
    lengths: np.ndarray  # (batch,), int64
    longest: int
    ragged: bool  # do the lengths differ?


class KVCache:
    """The keys and values of a batch of sequences, and attention to them.

    Parameters
    ----------
    batch : int
        How many sequences.
    kv_heads : int
        Heads of the keys and values; those of the queries are a multiple.
    head_dim : int
        Length of a key.
    value_dim : int, optional
        Length of a value; `head_dim` by default.
    capacity : int, default 256
        Tokens of each sequence that there is room for at first. Where more come the room doubles,
        so that tokens are copied at most twice on average, however many there will be.
    max_tokens : int, optional
        The most that a sequence may have; no limit by default.
    dtype : {"float32", "float64", "float16", "bfloat16", "int8"}, default "float32"
        What is stored. Attention reads less memory with less: float16 and bfloat16 are widened,
        and int8 is multiplied by its scale, as the kernel reads them, never as an array. int8 has
        one scale per token and head, the largest absolute value over 127: off by at most 1/254 of
        that. bfloat16 needs the package ``ml_dtypes``.

    Attributes
    ----------
    lengths : ndarray of int64, (batch,)
        How many tokens each sequence has.
    capacity : int
        How many there is room for now.

    Raises
    ------
    TypeError, ValueError
        If a size is not a whole number of at least 1, `capacity` exceeds `max_tokens`, or `dtype`
        is none of these or cannot be had.

    Examples
    --------
    A prompt of 5 tokens, then 3 steps of one token each; 4 query heads read 2 key heads:

    >>> import numpy as np
    >>> import fastattn
    >>> cache = fastattn.KVCache(1, 2, 16, dtype="int8")
    >>> def project(heads, n, rng=np.random.default_rng(0)):
    ...     return rng.standard_normal((1, heads, n, 16), np.float32)
    >>> for n in (5, 1, 1, 1):
    ...     cache.append(project(2, n), project(2, n))
    ...     out = cache.attend(project(4, n))
    >>> out.shape
    (1, 4, 1, 16)
    >>> cache
    KVCache(int8, batch 1, kv_heads 2, head_dim 16, lengths 8, capacity 256, 0.02 MiB)
    """

    def __init__(
        self, batch, kv_heads, head_dim, *, value_dim=None, capacity=256, max_tokens=None,
        dtype="float32",
    ):  # fmt: skip
        self._heads = count("batch", batch), count("kv_heads", kv_heads)
        head_dim = count("head_dim", head_dim)
        value_dim = head_dim if value_dim is None else count("value_dim", value_dim)
        capacity = count("capacity", capacity)
        self._max_tokens = None if max_tokens is None else count("max_tokens", max_tokens)
        if self._max_tokens is not None and capacity > self._max_tokens:
            most = self._max_tokens
            raise ValueError(f"capacity: expected at most max_tokens {most}, got {capacity}")
        stored = _storage(dtype)
        scales = [] if stored.kind != "i" else [((), np.dtype(np.float32))] * 2
        # What is stored of a token and head, by shape and dtype: key, value, and their scales.
        self._kinds = [((head_dim,), stored), ((value_dim,), stored), *scales]
        lengths = np.zeros(self._heads[0], np.int64)
        self._state = _State(self._allocate(capacity), lengths, 0, False)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sequence has, (batch,)."""
        return self._state.lengths.copy()

    @property
    def capacity(self) -> int:
        """How many tokens of each sequence there is room for."""
        return self._state.arrays[0].shape[2]

    @property
    def dtype(self) -> np.dtype:
        """What is stored."""
        return self._kinds[0][1]

    def __repr__(self) -> str:
        (head_dim,), (value_dim,) = (shape for shape, _ in self._kinds[:2])
        arrays, lengths, _, ragged = self._state
        tokens = f"{lengths.min()}..{lengths.max()}" if ragged else f"{lengths[0]}"
        return (
            f"KVCache({self.dtype}, batch {self._heads[0]}, kv_heads {self._heads[1]}, "
            f"head_dim {head_dim}, "
            + f"value_dim {value_dim}, " * (value_dim != head_dim)
            + f"lengths {tokens}, capacity {arrays[0].shape[2]}, "
            + f"max_tokens {self._max_tokens}, " * (self._max_tokens is not None)
            + f"{sum(x.nbytes for x in arrays) / 2**20:.2f} MiB)"
        )

    def __copy__(self) -> KVCache:
        """A cache of its own, which shares no memory with this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        arrays, *rest = self._state
        other._state = _State([x.copy() for x in arrays], *rest)
        return other

    def append(self, k, v, counts=None) -> None:
        """Add tokens behind those that are there.

        Parameters
        ----------
        k : array_like of floats, (batch, kv_heads, n, head_dim)
            Rounded to what is stored.
        v : array_like of floats, (batch, kv_heads, n, value_dim)
            Likewise.
        counts : array_like of int, (batch,), optional
            Where sequences get different numbers: only the first ``counts[b]`` tokens of sequence
            ``b`` are read.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype is wrong, a count is not in ``0..n``, a sequence would have more
            than `max_tokens`, or int8 is to hold a NaN, an Inf or more than float32 can. Nothing
            has been stored then.
        MemoryError
            If there is no room for more. Nothing has been stored then.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(2, 1, 4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), counts=[3, 1])
        >>> cache.lengths
        array([3, 1])
        """
        k, v = self._operand("k", k, 0), self._operand("v", v, 1)
        n = k.shape[2]
        if v.shape[2] != n:
            raise ValueError(f"v: expected {n} tokens as in k, got {v.shape[2]}")
        state = self._state
        if counts is not None:
            counts = self._counts(counts, n)
            if (counts == n).all():
                counts = None
        after = self._after(state, n if counts is None else counts)
        if self._max_tokens is not None and after.longest > self._max_tokens:
            raise ValueError(
                f"k: expected at most max_tokens {self._max_tokens} in a sequence, got {n} for one "
                f"that would have {after.longest}"
            )
        new = [k, v]
        if self.dtype.kind == "i":
            seen = None if counts is None else np.arange(n) < counts[:, None, None]
            (k, k_scales), (v, v_scales) = _quantised("k", k, seen), _quantised("v", v, seen)
            new = [k, v, k_scales, v_scales]
        if after.longest > after.arrays[0].shape[2]:
            after = after._replace(arrays=self._grown(state, after.longest))
        with np.errstate(over="ignore", invalid="ignore"):
            for stored, x in zip(after.arrays, new, strict=True):
                for b, first, last in _places(state, after):
                    stored[b, :, first:last] = x[b, :, : last - first]
        self._state = after

    def attend(self, q, counts=None, causal=True, *, backend=None, out=None, **options):
        """Attention of the last positions of each sequence to all that it has.

        Parameters
        ----------
        q : array_like, (batch, heads, n, head_dim)
            The queries of the last tokens of each sequence, whose keys are appended already. Row
            ``i`` is at position ``lengths - n + i``; rows before the first token, in a sequence
            shorter than `n`, see nothing under a causal mask.
        counts : array_like of int, (batch,), optional
            How many queries each sequence has, where that differs, as in `append`: the first
            ``counts[b]`` rows of sequence ``b`` are its last positions, row ``i`` is at position
            ``lengths[b] - counts[b] + i``, and the rows behind them, whatever they hold, get an
            `out` of 0 and an `lse` of -inf.
        causal : bool, default True
            Hide from each query what follows it.
        backend, out, **options
            As of `fastattn.scaled_dot`, but for `q_offset` and `kv_lengths`, which are the cache's
            own. For arrays of queries by keys there are ``lengths.max()`` keys.

        Returns
        -------
        out, lse, weights
            As of `fastattn.scaled_dot`: the dtype is the widest of `q` and what is stored, that of
            `q` with int8.

        Raises
        ------
        TypeError, ValueError
            As `scaled_dot` would, before any work.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(1, 1, 2)
        >>> cache.append([[[[1.0, 0.0], [0.0, 1.0]]]], [[[[2.0, 0.0], [0.0, 2.0]]]])
        >>> cache.attend(np.ones((1, 1, 1, 2), np.float32))
        array([[[[1., 1.]]]], dtype=float32)
        """
        for name in options.keys() - _OPTIONS:
            raise TypeError(f"{name}: attend() has no such option")
        q = plain("q", q)
        batch = self._heads[0]
        if q.ndim != 4 or q.shape[0] != batch:
            raise ValueError(f"q: expected shape ({batch}, heads, n, head_dim), got {q.shape}")
        n = q.shape[2]
        state = self._state
        if counts is not None:
            counts = self._counts(counts, n, state.lengths)
            options["q_offset"] = state.lengths - counts
            if (counts == n).all():
                counts = None
            else:
                options["spans"] = _spans_of_rows(counts, n, options.get("spans"))
        if state.ragged:
            options["kv_lengths"] = state.lengths
            options.setdefault("q_offset", state.lengths - n)
        k, v, *scales = (x[:, :, : state.longest] for x in state.arrays)
        options |= zip(("k_scales", "v_scales"), scales, strict=False)
        results = solve(make_problem(q, k, v, causal=causal, out=out, **options), backend, out)
        if counts is not None and options.get("sinks") is not None:
            _clear_rows(results, counts, n, options.get("return_lse", False))
        return results

    def truncate(self, n) -> None:
        """Keep the first tokens of each sequence, at most.

        Parameters
        ----------
        n : int or array_like of int, (batch,)
            How many; a sequence that has fewer keeps what it has. The room stays.

        Raises
        ------
        TypeError, ValueError
            If `n` is not made of integers of at least 0, or has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(2, 1, 4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)))
        >>> cache.truncate([2, 0])
        >>> cache.lengths
        array([2, 0])
        """
        n = integers("n", n)
        arrays, lengths, *_ = self._state
        if n.shape not in ((), lengths.shape):
            raise ValueError(f"n: expected shape () or {lengths.shape}, got {n.shape}")
        if n.min() < 0:
            raise ValueError(f"n: expected at least 0, got {n.min()}")
        self._state = _state(arrays, np.minimum(lengths, n))

    @staticmethod
    def _after(state: _State, counts) -> _State:
        """`state` with so many tokens more, for which there may be no room yet."""
        if isinstance(counts, int):  # for all sequences
            longest = state.longest + counts
            return _State(state.arrays, state.lengths + counts, longest, state.ragged)
        return _state(state.arrays, state.lengths + counts)

    def _operand(self, name, value, kind) -> np.ndarray:
        x = plain(name, value)
        if not is_float(x.dtype):
            raise TypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {x.dtype}")
        (dim,) = self._kinds[kind][0]
        batch, kv_heads = self._heads
        if x.ndim != 4 or x.shape[:2] != self._heads or x.shape[3] != dim:
            raise ValueError(
                f"{name}: expected shape ({batch}, {kv_heads}, n, {dim}), got {x.shape}"
            )
        return x

    def _counts(self, value, n, held=None) -> np.ndarray:
        """How many of `n` rows each sequence has; of queries, no more than the tokens it holds."""
        counts = integers("counts", value)
        batch = self._heads[0]
        if counts.shape != (batch,):
            raise ValueError(f"counts: expected shape ({batch},), got {counts.shape}")
        for b in np.flatnonzero((counts < 0) | (counts > n)):
            raise ValueError(f"counts: expected 0..{n}, got {counts[b]}")
        for b in () if held is None else np.flatnonzero(counts > held):
            raise ValueError(
                f"counts: expected at most the {held[b]} tokens of sequence {b}, got {counts[b]}"
            )
        return counts

    def _allocate(self, capacity) -> list[np.ndarray]:
        return [np.empty((*self._heads, capacity, *shape), dtype) for shape, dtype in self._kinds]

    def _grown(self, state: _State, needed: int) -> list[np.ndarray]:
        """The arrays with room for so many tokens of each sequence."""
        capacity = max(needed, 2 * state.arrays[0].shape[2])
        if self._max_tokens is not None:
            capacity = min(capacity, self._max_tokens)
        grown = self._allocate(capacity)
        empty = state._replace(lengths=np.zeros_like(state.lengths), longest=0, ragged=False)
        for stored, larger in zip(state.arrays, grown, strict=True):
            for b, _, last in _places(empty, state):
                larger[b, :, :last] = stored[b, :, :last]
        return grown


def _state(arrays, lengths) -> _State:
    longest = int(lengths.max())
    return _State(arrays, lengths, longest, bool((lengths != longest).any()))


def _places(before: _State, after: _State):
    """``(b, first, last)`` of the tokens that each sequence gained, all at once where they are
    alike.
    """
    if not (before.ragged or after.ragged):
        yield slice(None), before.longest, after.longest
    else:
        first, last = before.lengths.tolist(), after.lengths.tolist()
        yield from zip(range(len(first)), first, last, strict=True)


def _live_rows(counts, n) -> np.ndarray:
    """Which rows are queries, (batch, 1, n)."""
    return np.arange(n) < counts[:, None, None]


def _spans_of_rows(counts, n, spans):
    """Spans in which the rows that are no queries see nothing, and the others what they did."""
    live = _live_rows(counts, n)
    if spans is None:
        return 0, np.where(live, np.iinfo(np.int64).max, 0)
    start, stop = span_sides(spans)
    stop = integers("spans", stop)
    return start, np.where(live, stop, 0)


def _clear_rows(results, counts, n, return_lse) -> None:
    """A row that is no query gets nothing of its sink either."""
    dead = ~_live_rows(counts, n)
    out = results[0] if isinstance(results, tuple) else results
    np.copyto(out, 0, where=dead[..., None])
    if return_lse:
        np.copyto(results[1], -np.inf, where=dead)


def _storage(dtype) -> np.dtype:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _STORED:
        raise ValueError(f"dtype: expected one of {', '.join(_STORED)}, got {name}")
    try:
        return float_type(name)
    except ModuleNotFoundError:
        raise ValueError("dtype: bfloat16 needs the package ml_dtypes") from None


def _quantised(name, x, seen):
    """``(numbers, scales)``, int8 and float32 per row, of the rows that are `seen`; None: all."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    if seen is not None:
        x = np.where(seen[..., None], x, np.zeros((), x.dtype))
    x = x.astype(real, copy=False)
    with np.errstate(all="ignore"):
        top = np.abs(x).max(axis=-1)
        scales = (top / real(_INT8_MAX)).astype(np.float32)
        scales[(scales == 0) & (top > 0)] = _SMALLEST_SCALE
        if not np.isfinite(scales).all():
            raise ValueError(
                f"{name}: expected numbers for int8 that float32 holds, got a NaN, an Inf or more"
            )
        steps = x / np.where(scales == 0, np.float32(1), scales)[..., None]
    np.rint(steps, out=steps)
    # Only a subnormal scale, which is coarse, makes more steps than there are.
    np.minimum(steps, _INT8_MAX, out=steps)
    np.maximum(steps, -_INT8_MAX, out=steps)
    return steps.astype(np.int8), scales
