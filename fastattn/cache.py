"""Keys and values that grow token by token, in the precision that memory allows."""

from __future__ import annotations

import numpy as np

from .api import answer
from .arguments import count, integers, plain
from .dtypes import float_type
from .problem import pose

__all__ = ["KVCache"]

_FLOATS = ("float32", "float64", "float16", "bfloat16")
_STORED = (*_FLOATS, "int8")
_INT8_MAX = 127


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
            raise ValueError(f"capacity: {capacity} given, max_tokens {self._max_tokens} at most")
        stored = _storage(dtype)
        scales = [] if stored.kind != "i" else [((), np.dtype(np.float32))] * 2
        # What is stored of a token and head, by shape and dtype: key, value, and their scales.
        self._kinds = [((head_dim,), stored), ((value_dim,), stored), *scales]
        self._lengths = np.zeros(self._heads[0], np.int64)
        self._arrays = self._allocate(capacity)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sequence has, (batch,)."""
        return self._lengths.copy()

    @property
    def capacity(self) -> int:
        """How many tokens of each sequence there is room for."""
        return self._arrays[0].shape[2]

    @property
    def dtype(self) -> np.dtype:
        """What is stored."""
        return self._kinds[0][1]

    def __repr__(self) -> str:
        (head_dim,), (value_dim,) = (shape for shape, _ in self._kinds[:2])
        lengths = self._lengths
        tokens = f"{lengths.min()}..{lengths.max()}" if np.ptp(lengths) else f"{lengths[0]}"
        return (
            f"KVCache({self.dtype}, batch {self._heads[0]}, kv_heads {self._heads[1]}, "
            f"head_dim {head_dim}, "
            + f"value_dim {value_dim}, " * (value_dim != head_dim)
            + f"lengths {tokens}, capacity {self.capacity}, "
            + f"max_tokens {self._max_tokens}, " * (self._max_tokens is not None)
            + f"{sum(x.nbytes for x in self._arrays) / 2**20:.2f} MiB)"
        )

    def append(self, k, v, counts=None) -> None:
        """Add tokens behind those that are there.

        Parameters
        ----------
        k : array_like of floats, (batch, kv_heads, n, head_dim)
            Rounded to what is stored.
        v : array_like of floats, (batch, kv_heads, n, value_dim)
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
            raise ValueError(f"v: {v.shape[2]} tokens differ from k's {n}")
        counts = np.full_like(self._lengths, n) if counts is None else self._counts(counts, n)
        after = self._lengths + counts
        if self._max_tokens is not None and after.max() > self._max_tokens:
            raise ValueError(
                f"k: {n} tokens given, but a sequence would have {after.max()} and max_tokens is "
                f"{self._max_tokens}"
            )
        new = [k, v]
        if self.dtype.kind == "i":
            seen = None if (counts == n).all() else np.arange(n) < counts[:, None, None]
            (k, k_scales), (v, v_scales) = _quantised("k", k, seen), _quantised("v", v, seen)
            new = [k, v, k_scales, v_scales]
        if after.max() > self.capacity:
            self._grow(int(after.max()))
        with np.errstate(over="ignore", invalid="ignore"):
            for stored, x in zip(self._arrays, new, strict=True):
                for b, first, last in _places(self._lengths, after):
                    stored[b, :, first:last] = x[b, :, : last - first]
        self._lengths = after

    def attend(self, q, causal=True, *, backend=None, out=None, **options):
        """Attention of the last positions of each sequence to all that it has.

        Parameters
        ----------
        q : array_like, (batch, heads, n, head_dim)
            The queries of the last `n` tokens of each sequence, whose keys are appended already:
            query ``i`` is at position ``lengths - n + i``. Those before the first token, in a
            sequence shorter than `n`, see nothing under a causal mask.
        causal : bool, default True
            Hide from each query what follows it.
        backend, out, **options
            As of `fastattn.scaled_dot`; `q_offset` and `kv_lengths` are the cache's own. For arrays
            of queries by keys there are ``lengths.max()`` keys.

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
        for name in ("q_offset", "kv_lengths", "k_scales", "v_scales"):
            if name in options:
                raise TypeError(f"{name}: given, but the cache's own is taken")
        q = plain("q", q)
        batch = self._heads[0]
        if q.ndim != 4 or q.shape[0] != batch:
            raise ValueError(f"q: shape {q.shape} given, ({batch}, heads, n, head_dim) wanted")
        longest = int(self._lengths.max())
        if (self._lengths != longest).any():
            options["kv_lengths"] = self._lengths
            options["q_offset"] = self._lengths - q.shape[2]
        k, v, *scales = (x[:, :, :longest] for x in self._arrays)
        options |= zip(("k_scales", "v_scales"), scales, strict=False)
        return answer(pose(q, k, v, causal=causal, out=out, **options), backend, out)

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
        if n.shape not in ((), self._lengths.shape):
            raise ValueError(f"n: shape {n.shape} given, () or {self._lengths.shape} wanted")
        if n.min() < 0:
            raise ValueError(f"n: {n.min()} given, at least 0 wanted")
        self._lengths = np.minimum(self._lengths, n)

    def _operand(self, name, value, kind) -> np.ndarray:
        x = plain(name, value)
        if x.dtype.name not in _FLOATS:
            raise TypeError(f"{name}: {x.dtype} given, one of {', '.join(_FLOATS)} wanted")
        (dim,) = self._kinds[kind][0]
        batch, kv_heads = self._heads
        if x.ndim != 4 or x.shape[:2] != self._heads or x.shape[3] != dim:
            raise ValueError(
                f"{name}: shape {x.shape} given, ({batch}, {kv_heads}, n, {dim}) wanted"
            )
        return x

    def _counts(self, value, n) -> np.ndarray:
        counts = integers("counts", value)
        if counts.shape != self._lengths.shape:
            raise ValueError(f"counts: shape {counts.shape} given, {self._lengths.shape} wanted")
        wrong = counts[(counts < 0) | (counts > n)]
        if wrong.size:
            raise ValueError(f"counts: {wrong[0]} given, 0..{n} wanted")
        return counts

    def _allocate(self, capacity) -> list[np.ndarray]:
        return [np.empty((*self._heads, capacity, *shape), dtype) for shape, dtype in self._kinds]

    def _grow(self, needed) -> None:
        capacity = max(needed, 2 * self.capacity)
        if self._max_tokens is not None:
            capacity = min(capacity, self._max_tokens)
        grown = self._allocate(capacity)  # all of it, before anything is changed
        for place, larger in enumerate(grown):
            for b, _, last in _places(np.zeros_like(self._lengths), self._lengths):
                larger[b, :, :last] = self._arrays[place][b, :, :last]
            self._arrays[place] = larger


def _places(first, last):
    """``(b, first, last)`` of each sequence, all at once where they are alike."""
    if (first == first[0]).all() and (last == last[0]).all():
        yield slice(None), int(first[0]), int(last[0])
    else:
        yield from zip(range(len(first)), first.tolist(), last.tolist(), strict=True)


def _storage(dtype) -> np.dtype:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _STORED:
        raise ValueError(f"dtype: {name} given, one of {', '.join(_STORED)} wanted")
    try:
        return float_type(name)
    except ModuleNotFoundError:
        raise ValueError("dtype: bfloat16 given, which needs the package ml_dtypes") from None


def _quantised(name, x, seen):
    """``(numbers, scales)``, int8 and float32 per row, of the rows that are `seen`; None: all."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    if seen is not None:
        x = np.where(seen[..., None], x, np.zeros((), x.dtype))
    x = x.astype(real, copy=False)
    with np.errstate(all="ignore"):
        scales = (np.abs(x).max(axis=-1) / real(_INT8_MAX)).astype(np.float32)
        if not np.isfinite(scales).all():
            raise ValueError(f"{name}: a NaN, an Inf or more than float32 holds, not for int8")
        steps = x / np.where(scales == 0, np.float32(1), scales)[..., None]
    np.rint(steps, out=steps)
    # Only a subnormal scale, which is coarse, makes more steps than there are.
    np.minimum(steps, _INT8_MAX, out=steps)
    np.maximum(steps, -_INT8_MAX, out=steps)
    return steps.astype(np.int8), scales
