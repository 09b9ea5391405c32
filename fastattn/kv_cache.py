"""Keys and values that grow token by token, in the precision that memory allows."""

from __future__ import annotations

import numpy as np

from .cache_attention import attend
from .core.arguments import FAR, count, flag, integer, integers, plain
from .core.dtypes import FLOATS, as_real, is_float
from .core.option_table import check
from .core.page_pool import PAGE, PagePool
from .core.sequences import Sequences
from .core.signatures import attention
from .core.storage import storage

__all__ = ["KVCache"]


class KVCache:
    """The keys and values of a batch of sequences in a pool of pages, and attention to them.

    Growing, forking and reordering copy no keys: sequences share pages of 64 tokens, and one that
    appends to a page which others have gone on in copies that page.

    Parameters
    ----------
    batch : int
        How many sequences, or slots for them.
    kv_heads : int
        Heads of the keys and values; those of the queries are a multiple.
    head_dim : int
        Length of a key.
    value_dim : int, optional
        Length of a value; `head_dim` by default.
    values_in_keys : bool, default False
        Are the values the first `value_dim` columns of the keys? Then these are stored and read
        once, and `append` takes no values: multi-head latent attention with its projections
        absorbed (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).
    capacity : int, default 256
        Tokens of each sequence that there are pages for at first. Where more come as many pages are
        added; none of them moves.
    max_tokens : int, optional
        The most that a sequence may have; no limit by default.
    dtype : {"float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "int8", "int4"}
        What is stored, "float32" by default. Attention reads less memory with less: what is stored
        is widened as it is read, never as a whole. int8 has one scale per token and head, the
        largest absolute value over 127: off by at most 1/254 of that. int4 has one per token, head
        and 32 dims, the largest over 7: off by at most 1/14 of that. float8_e4m3fn rounds to 4
        significant bits: off by at most 1/16 of a number from 2**-6 to 448 and by 2**-10 below;
        beyond 464 it has NaN. bfloat16 and float8_e4m3fn need the package ``ml_dtypes``.
    window : int, optional
        A query at position ``p`` sees the keys ``p - window < j <= p`` only, its own among them.
        What the queries of the last `append` need is kept until the next; other pages are given
        back, so the cache does not grow with the sequence. Positions stay those of the sequence.
    keep_first : int, default 0
        With a `window`, the first tokens of a sequence that all its queries see besides, under a
        causal mask those before them: attention sinks (Xiao et al. 2024, "Efficient Streaming
        Language Models with Attention Sinks").

    Attributes
    ----------
    lengths : ndarray of int64, (batch,)
        How many tokens each sequence has had, those given back too.
    capacity : int
        How many tokens each there is room for now, if all have as many.
    dtype : dtype
        Of what is stored; uint8 for int4, of which it holds two.
    nbytes : int
        Of all pages, in use or not.
    pages_in_use : int
        How many pages of 64 tokens hold some; one that sequences share counts once.

    Raises
    ------
    TypeError, ValueError
        If a size is not a whole number of at least 1, `capacity` exceeds `max_tokens`, `keep_first`
        is given without a `window`, `value_dim` exceeds `head_dim` with `values_in_keys`, or
        `dtype` is none of these or cannot be had.

    Notes
    -----
    One thread may change a cache while others attend: a call sees the cache as it was at its start.

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
    KVCache(int8, batch 1, kv_heads 2, head_dim 16, lengths 8, 1 of 4 pages, 0.02 MiB)

    A prompt that two sequences share:

    >>> cache = fastattn.KVCache(2, 2, 16)
    >>> cache.append(*(np.repeat(project(2, 5), 2, axis=0) for _ in "kv"), counts=[5, 0])
    >>> cache.fork(0)
    1
    >>> cache.lengths
    array([5, 5])
    """

    def __init__(
        self, batch, kv_heads, head_dim, *, value_dim=None, values_in_keys=False, capacity=256,
        max_tokens=None, dtype="float32", window=None, keep_first=0,
    ) -> None:  # fmt: skip
        batch, self._kv_heads = count("batch", batch), count("kv_heads", kv_heads)
        head_dim = count("head_dim", head_dim)
        self._dims = head_dim, head_dim if value_dim is None else count("value_dim", value_dim)
        self._values_in_keys = flag("values_in_keys", values_in_keys)
        if self._values_in_keys and self._dims[1] > head_dim:
            raise ValueError(
                f"value_dim: expected at most head_dim {head_dim} with values_in_keys, "
                f"got {self._dims[1]}"
            )
        capacity = count("capacity", capacity)
        self._max_tokens = None if max_tokens is None else count("max_tokens", max_tokens)
        if self._max_tokens is not None and capacity > self._max_tokens:
            most = self._max_tokens
            raise ValueError(f"capacity: expected at most max_tokens {most}, got {capacity}")
        self._storage = storage(dtype)
        window = None if window is None else count("window", window)
        keep_first = integer("keep_first", keep_first)
        if keep_first < 0 or (keep_first and window is None):
            least = "0 without a window" if window is None else "at least 0"
            raise ValueError(f"keep_first: expected {least}, got {keep_first}")
        pool = self._new_pool(batch * -(-capacity // PAGE))
        self._sequences = Sequences(pool, batch, window, keep_first)

    def _new_pool(self, pages: int) -> PagePool:
        stored = [self._storage.fields(dim) for dim in self._dims]
        pool = PagePool(self._kv_heads, _by_field(stored[:1] if self._values_in_keys else stored))
        pool.grow(pages)
        return pool

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sequence has had, (batch,)."""
        return self._sequences.now.lengths.copy()

    @property
    def capacity(self) -> int:
        """How many tokens of each sequence there is room for."""
        return self._sequences.pool.pages // len(self._sequences.now.lengths) * PAGE

    @property
    def dtype(self) -> np.dtype:
        """Of what is stored."""
        return self._storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, in use or not."""
        return self._sequences.pool.nbytes

    @property
    def pages_in_use(self) -> int:
        """How many pages of 64 tokens hold some; one that sequences share counts once."""
        return self._sequences.pool.pages - self._sequences.pool.free

    def __repr__(self) -> str:
        (head_dim, value_dim), state = self._dims, self._sequences.now
        pool, window = self._sequences.pool, self._sequences.window
        lengths = state.lengths
        tokens = f"{lengths.min()}..{lengths.max()}" if state.ragged else f"{lengths[0]}"
        return (
            f"KVCache({self._storage.name}, batch {len(lengths)}, kv_heads {self._kv_heads}, "
            f"head_dim {head_dim}, "
            + f"value_dim {value_dim}, " * (value_dim != head_dim)
            + "values_in_keys, " * self._values_in_keys
            + f"lengths {tokens}, "
            + f"max_tokens {self._max_tokens}, " * (self._max_tokens is not None)
            + f"window {window}, " * (window is not None)
            + f"keep_first {self._sequences.keep_first}, " * bool(self._sequences.keep_first)
            + f"{self.pages_in_use} of {pool.pages} pages, {pool.nbytes / 2**20:.2f} MiB)"
        )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        sequences = state.pop("_sequences")
        return state | {"sequences": sequences.packed()}

    def __setstate__(self, state: dict) -> None:
        packed = state.pop("sequences")
        self.__dict__.update(state)
        self._sequences = Sequences.unpacked(self._new_pool, packed)

    def __copy__(self) -> KVCache:
        """A cache of its own, which shares no memory with this one."""
        other = object.__new__(type(self))
        other.__setstate__(self.__getstate__())
        return other

    def __deepcopy__(self, memo) -> KVCache:
        return self.__copy__()

    def append(self, k, v=None, counts=None) -> None:
        """Add tokens behind those that are there.

        Parameters
        ----------
        k : array_like of floats, (batch, kv_heads, n, head_dim)
            Rounded to what is stored.
        v : array_like of floats, (batch, kv_heads, n, value_dim)
            Likewise; None with `values_in_keys`.
        counts : array_like of int, (batch,), optional
            Where sequences get different numbers: only the first ``counts[b]`` tokens of sequence
            ``b`` are read.

        Raises
        ------
        TypeError, ValueError
            If a shape or dtype is wrong, a count is not in ``0..n``, a sequence would have more
            than `max_tokens`, or int8 or int4 is to hold a NaN, an Inf or more than
            float32 can. Nothing
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
        operands = [("k", self._operand("k", k, 0))]
        n = operands[0][1].shape[2]
        if not self._values_in_keys:
            operands.append(("v", self._operand("v", v, 1)))
            if operands[1][1].shape[2] != n:
                raise ValueError(f"v: expected {n} tokens as in k, got {operands[1][1].shape[2]}")
        elif v is not None:
            raise TypeError(f"v: expected None with values_in_keys, got {type(v).__name__}")
        state = self._sequences.now
        if counts is not None:
            counts = self._counts(counts, n)
            if (counts == n).all():
                counts = None
        longest = state.longest + n if counts is None else int((state.lengths + counts).max())
        if self._max_tokens is not None and longest > self._max_tokens:
            raise ValueError(
                f"k: expected at most max_tokens {self._max_tokens} in a sequence, got {n} for one "
                f"that would have {longest}"
            )
        seen = None if counts is None else np.arange(n) < counts[:, None, None]
        fields = _by_field([self._storage.rounded(name, x, seen) for name, x in operands])
        with np.errstate(over="ignore", invalid="ignore"):
            self._sequences.append(fields, n if counts is None else counts, self._max_tokens)

    @attention
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
            As of `fastattn.scaled_dot`, but for `q_offset`, `kv_lengths` and `block_table`, which
            are the cache's own. For arrays of queries by keys there are ``lengths.max()`` keys. A
            window of the cache holds besides.

        Returns
        -------
        out, lse, row_max, weights
            As of `fastattn.scaled_dot`, with the dtype of `q`. What is computed in is the widest of
            that and what is stored as float16, bfloat16, float32 or float64.

        Raises
        ------
        TypeError, ValueError
            As `scaled_dot` would, before any work; or if a key that one of the queries would see
            has been given back, as the `window` says.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(1, 1, 2)
        >>> cache.append([[[[1.0, 0.0], [0.0, 1.0]]]], [[[[2.0, 0.0], [0.0, 2.0]]]])
        >>> cache.attend(np.ones((1, 1, 1, 2), np.float32))
        array([[[[1., 1.]]]], dtype=float32)
        """
        check("attend", options)
        q, state = plain("q", q), self._sequences.now
        batch = len(state.lengths)
        if q.ndim != 4 or q.shape[0] != batch:
            raise ValueError(f"q: expected shape ({batch}, heads, n, head_dim), got {q.shape}")
        if q.shape[3] != self._dims[0]:
            raise ValueError(f"q: expected head_dim {self._dims[0]}, got {q.shape[3]}")
        if counts is not None:
            counts = self._counts(counts, q.shape[2], state.lengths)
        if self._values_in_keys:
            state = state._replace(views=self._views(state))
        return attend(
            self._sequences, state, self._storage, self._dims, q, counts, causal, backend, out,
            options,
        )  # fmt: skip

    def keys(self, b) -> np.ndarray:
        """The keys that are held of a sequence, oldest first.

        Parameters
        ----------
        b : int
            Which sequence.

        Returns
        -------
        ndarray, (kv_heads, n, head_dim)
            A copy, float32, or float64 where that is stored. With a window those that queries from
            the last `append` on can see.

        Raises
        ------
        TypeError, ValueError
            If there is no such sequence.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(1, 1, 2, window=2, keep_first=1)
        >>> for x in range(1, 6):
        ...     cache.append(np.full((1, 1, 1, 2), float(x)), np.zeros((1, 1, 1, 2)))
        >>> cache.keys(0)[0, :, 0]
        array([1., 4., 5.], dtype=float32)
        """
        return self._held(b, 0)

    def values(self, b) -> np.ndarray:
        """The values that are held of a sequence, oldest first.

        Parameters
        ----------
        b : int
            Which sequence.

        Returns
        -------
        ndarray, (kv_heads, n, value_dim)
            As `keys` gives them.

        Raises
        ------
        TypeError, ValueError
            If there is no such sequence.
        """
        return self._held(b, 1)

    def _held(self, b, kind: int) -> np.ndarray:
        state = self._sequences.now
        b = self._slot(b)
        fields = [self._sequences.rows(state, b, view) for view in self._views(state)[kind::2]]
        real = np.float64 if self.dtype == np.float64 else np.float32
        return as_real(fields[0], fields[1] if fields[1:] else None, real, self._dims[kind])

    def _views(self, state) -> tuple:
        """The pools of keys and of values, then those of their scales."""
        if not self._values_in_keys:
            return state.views
        of_values = self._storage.fields(self._dims[1])
        values = [k[..., : shape[0]] for k, (shape, _) in zip(state.views, of_values, strict=True)]
        return tuple(_by_field([state.views, values]))

    def _slot(self, b) -> int:
        b, batch = integer("b", b), len(self._sequences.now.lengths)
        if not 0 <= b < batch:
            raise ValueError(f"b: expected 0..{batch - 1}, got {b}")
        return b

    def truncate(self, n) -> None:
        """Keep the first tokens of each sequence, at most.

        Parameters
        ----------
        n : int or array_like of int, (batch,)
            How many; a sequence that has fewer keeps what it has.

        Raises
        ------
        TypeError, ValueError
            If `n` is not made of integers of at least 0, or has another shape; or with a window, if
            it drops more of a sequence than its last `append` brought.

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
        lengths, last = self._sequences.now[3:5]
        if type(n) is not int:
            n = integers("n", n)
            if n.shape not in ((), lengths.shape):
                raise ValueError(f"n: expected shape () or {lengths.shape}, got {n.shape}")
        least = n if type(n) is int else n.min()
        if least < 0:
            raise ValueError(f"n: expected at least 0, got {least}")
        if self._sequences.window is not None:
            for b in np.flatnonzero(lengths - np.minimum(lengths, n) > last):
                raise ValueError(
                    f"n: expected at least {lengths[b] - last[b]} of sequence {b}, as a window "
                    f"keeps what its last append needs, got {np.broadcast_to(n, lengths.shape)[b]}"
                )
        self._sequences.truncate(min(n, FAR) if type(n) is int else n)

    def reorder(self, indices) -> None:
        """Let each sequence be a copy of one that is there: beams that go on from the best.

        Parameters
        ----------
        indices : array_like of int, (new_batch,)
            Which, at least one; the same several times, too. The batch becomes theirs.

        Raises
        ------
        TypeError, ValueError
            If `indices` are no integers in ``0..batch - 1``, or not one axis of them.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn
        >>> cache = fastattn.KVCache(2, 1, 4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), counts=[3, 1])
        >>> cache.reorder([1, 1, 0])
        >>> cache.lengths
        array([1, 1, 3])
        """
        indices, batch = integers("indices", indices), len(self._sequences.now.lengths)
        if indices.ndim != 1 or indices.size < 1:
            raise ValueError(f"indices: expected shape (n,) with n >= 1, got {indices.shape}")
        for b in indices[(indices < 0) | (indices >= batch)]:
            raise ValueError(f"indices: expected 0..{batch - 1}, got {b}")
        self._sequences.reorder(indices)

    def free(self, b) -> None:
        """Empty a slot; its pages are given back unless others share them.

        Parameters
        ----------
        b : int
            Which.

        Raises
        ------
        TypeError, ValueError
            If there is no such sequence.
        """
        self._sequences.replace(self._slot(b), None)

    def fork(self, b) -> int:
        """Put a copy of a sequence into the first empty slot.

        Parameters
        ----------
        b : int
            Which sequence.

        Returns
        -------
        int
            The slot.

        Raises
        ------
        TypeError, ValueError
            If there is no such sequence, or no other slot is empty.
        """
        b = self._slot(b)
        for other in np.flatnonzero(self._sequences.now.lengths == 0):
            if other != b:
                self._sequences.replace(int(other), b)
                return int(other)
        raise ValueError(f"b: expected an empty slot for a copy of sequence {b}, got none")

    def _operand(self, name, value, kind) -> np.ndarray:
        x = plain(name, value)
        if not is_float(x.dtype):
            raise TypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {x.dtype}")
        dim, heads = self._dims[kind], (len(self._sequences.now.lengths), self._kv_heads)
        if x.ndim != 4 or x.shape[:2] != heads or x.shape[3] != dim:
            raise ValueError(
                f"{name}: expected shape ({heads[0]}, {heads[1]}, n, {dim}), got {x.shape}"
            )
        return x

    def _counts(self, value, n, held=None) -> np.ndarray:
        """How many of `n` rows each sequence has; of queries, no more than the tokens it holds."""
        counts = integers("counts", value)
        batch = len(self._sequences.now.lengths if held is None else held)
        if counts.shape != (batch,):
            raise ValueError(f"counts: expected shape ({batch},), got {counts.shape}")
        for b in np.flatnonzero((counts < 0) | (counts > n)):
            raise ValueError(f"counts: expected 0..{n}, got {counts[b]}")
        for b in () if held is None else np.flatnonzero(counts > held):
            raise ValueError(
                f"counts: expected at most the {held[b]} tokens of sequence {b}, got {counts[b]}"
            )
        return counts


def _by_field(stored) -> list:
    """The numbers of what is stored, keys and maybe values, then their scales if there are some."""
    return [field for fields in zip(*stored, strict=True) for field in fields]
