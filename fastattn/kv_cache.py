"""Keys and values that grow token by token, in the precision that memory allows."""

from __future__ import annotations

import numpy as np

from .cache_attention import attend
from .core import cache_arguments
from .core.arguments import count, plain
from .core.option_table import check
from .core.page_pool import PAGE
from .core.sequences import Sequences
from .core.signatures import attention
from .core.token_layout import token_layout

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
        With a `window`, all queries of a sequence also see its first `keep_first` tokens, under a
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
        self._layout = token_layout(head_dim, value_dim, values_in_keys, dtype)
        capacity, self._max_tokens = cache_arguments.most_tokens(capacity, max_tokens)
        window, keep_first = cache_arguments.kept_window(window, keep_first)
        pool = self._layout.new_pool(self._kv_heads, batch * -(-capacity // PAGE))
        self._sequences = Sequences(pool, batch, window, keep_first)

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
        return self._layout.storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, in use or not."""
        return self._sequences.pool.nbytes

    @property
    def pages_in_use(self) -> int:
        """How many pages of 64 tokens hold some; one that sequences share counts once."""
        return self._sequences.pool.pages - self._sequences.pool.free

    def __repr__(self) -> str:
        layout, state = self._layout, self._sequences.now
        (head_dim, value_dim), lengths = layout.dims, state.lengths
        pool, window = self._sequences.pool, self._sequences.window
        tokens = f"{lengths.min()}..{lengths.max()}" if state.ragged else f"{lengths[0]}"
        return (
            f"KVCache({layout.storage.name}, batch {len(lengths)}, kv_heads {self._kv_heads}, "
            f"head_dim {head_dim}, "
            + f"value_dim {value_dim}, " * (value_dim != head_dim)
            + "values_in_keys, " * layout.values_in_keys
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
        self._sequences = Sequences.unpacked(
            lambda pages: self._layout.new_pool(self._kv_heads, pages), packed
        )

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
            than `max_tokens`, or int8 or int4 is to hold a NaN, an Inf or more than float32 can.
            Nothing has been stored then.
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
        state = self._sequences.now
        batch = len(state.lengths)
        tokens = cache_arguments.token_arrays(k, v, batch, self._kv_heads, self._layout)
        n = tokens[0].shape[2]
        if counts is not None:
            counts = cache_arguments.token_counts(counts, batch, n)
        if self._max_tokens is not None:
            cache_arguments.check_room(state, n, counts, self._max_tokens)
        fields = self._layout.rounded(tokens, counts)
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
            are the cache's own. Arrays of queries by keys have ``lengths.max()`` keys. The cache's
            own window applies too.

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
        if q.shape[3] != self._layout.dims[0]:
            raise ValueError(f"q: expected head_dim {self._layout.dims[0]}, got {q.shape[3]}")
        if counts is not None:
            counts = cache_arguments.query_counts(counts, q.shape[2], state.lengths)
        if self._layout.values_in_keys:
            state = state._replace(views=self._layout.operands(state.views))
        return attend(
            self._sequences, state, self._layout, q, counts, causal, backend, out, options
        )

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
        layout, state = self._layout, self._sequences.now
        b = cache_arguments.slot(b, len(state.lengths))
        views = layout.operands(state.views)[kind::2]
        rows = [self._sequences.rows(state, b, view) for view in views]
        return layout.widened(rows, layout.dims[kind])

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
        state, window = self._sequences.now, self._sequences.window
        self._sequences.truncate(cache_arguments.kept_lengths(n, state, window))

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
        self._sequences.reorder(cache_arguments.slots(indices, len(self._sequences.now.lengths)))

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
        self._sequences.replace(cache_arguments.slot(b, len(self._sequences.now.lengths)), None)

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
        lengths = self._sequences.now.lengths
        b = cache_arguments.slot(b, len(lengths))
        for other in np.flatnonzero(lengths == 0):
            if other != b:
                self._sequences.replace(int(other), b)
                return int(other)
        raise ValueError(f"b: expected an empty slot for a copy of sequence {b}, got none")
