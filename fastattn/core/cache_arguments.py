"""The arguments of a cache's methods: each as it is used, or an error that names it."""

from __future__ import annotations

import numpy as np

from .arguments import FAR, count, integer, integers, plain
from .dtypes import FLOATS, is_float
from .sequences import Snapshot
from .token_layout import TokenLayout

__all__ = [
    "check_room", "kept_lengths", "kept_window", "most_tokens", "query_counts", "slot", "slots",
    "token_arrays", "token_counts",
]  # fmt: skip


def most_tokens(capacity, max_tokens) -> tuple[int, int | None]:
    """``(capacity, max_tokens)``."""
    capacity = count("capacity", capacity)
    max_tokens = None if max_tokens is None else count("max_tokens", max_tokens)
    if max_tokens is not None and capacity > max_tokens:
        raise ValueError(f"capacity: expected at most max_tokens {max_tokens}, got {capacity}")
    return capacity, max_tokens


def kept_window(window, keep_first) -> tuple[int | None, int]:
    """``(window, keep_first)``."""
    window = None if window is None else count("window", window)
    keep_first = integer("keep_first", keep_first)
    if keep_first < 0 or (keep_first and window is None):
        least = "0 without a window" if window is None else "at least 0"
        raise ValueError(f"keep_first: expected {least}, got {keep_first}")
    return window, keep_first


def token_arrays(k, v, batch: int, kv_heads: int, layout: TokenLayout) -> list[np.ndarray]:
    """The keys of new tokens, then their values unless these are in the keys."""
    k = _token_array("k", k, batch, kv_heads, layout.dims[0])
    if layout.values_in_keys:
        if v is not None:
            raise TypeError(f"v: expected None with values_in_keys, got {type(v).__name__}")
        return [k]
    v = _token_array("v", v, batch, kv_heads, layout.dims[1])
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v: expected {k.shape[2]} tokens as in k, got {v.shape[2]}")
    return [k, v]


def _token_array(name: str, value, batch: int, kv_heads: int, dim: int) -> np.ndarray:
    x = plain(name, value)
    if not is_float(x.dtype):
        raise TypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {x.dtype}")
    shape = x.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] != kv_heads or shape[3] != dim:
        raise ValueError(f"{name}: expected shape ({batch}, {kv_heads}, n, {dim}), got {shape}")
    return x


def token_counts(counts, batch: int, n: int) -> np.ndarray | None:
    """How many of `n` tokens each sequence gets, or None for all of them."""
    counts = _counts(counts, batch, n)
    return None if (counts == n).all() else counts


def query_counts(counts, n: int, lengths: np.ndarray) -> np.ndarray | None:
    """How many of `n` rows are queries of each sequence, which has one for each of its tokens at
    most; None for all of them.
    """
    counts = _counts(counts, len(lengths), n)
    for b in np.flatnonzero(counts > lengths):
        raise ValueError(
            f"counts: expected at most the {lengths[b]} tokens of sequence {b}, got {counts[b]}"
        )
    return None if (counts == n).all() else counts


def _counts(value, batch: int, n: int) -> np.ndarray:
    counts = integers("counts", value)
    if counts.shape != (batch,):
        raise ValueError(f"counts: expected shape ({batch},), got {counts.shape}")
    for b in np.flatnonzero((counts < 0) | (counts > n)):
        raise ValueError(f"counts: expected 0..{n}, got {counts[b]}")
    return counts


def check_room(state: Snapshot, n: int, counts: np.ndarray | None, max_tokens: int) -> None:
    """An error if a sequence would have more than `max_tokens`."""
    longest = state.longest + n if counts is None else int((state.lengths + counts).max())
    if longest > max_tokens:
        raise ValueError(
            f"k: expected at most max_tokens {max_tokens} in a sequence, got {n} for one that "
            f"would have {longest}"
        )


def kept_lengths(n, state: Snapshot, window: int | None) -> int | np.ndarray:
    """How many tokens are to stay in all sequences, or in each."""
    lengths, last = state.lengths, state.last
    if type(n) is not int:
        n = integers("n", n)
        if n.shape not in ((), lengths.shape):
            raise ValueError(f"n: expected shape () or {lengths.shape}, got {n.shape}")
    least = n if type(n) is int else n.min()
    if least < 0:
        raise ValueError(f"n: expected at least 0, got {least}")
    if window is not None:
        for b in np.flatnonzero(lengths - np.minimum(lengths, n) > last):
            raise ValueError(
                f"n: expected at least {lengths[b] - last[b]} of sequence {b}, as a window keeps "
                f"what its last append needs, got {np.broadcast_to(n, lengths.shape)[b]}"
            )
    return min(n, FAR) if type(n) is int else n


def slot(value, batch: int) -> int:
    """The index of a sequence."""
    b = integer("b", value)
    if not 0 <= b < batch:
        raise ValueError(f"b: expected 0..{batch - 1}, got {b}")
    return b


def slots(value, batch: int) -> np.ndarray:
    """The indices of at least one sequence."""
    indices = integers("indices", value)
    if indices.ndim != 1 or indices.size < 1:
        raise ValueError(f"indices: expected shape (n,) with n >= 1, got {indices.shape}")
    for b in indices[(indices < 0) | (indices >= batch)]:
        raise ValueError(f"indices: expected 0..{batch - 1}, got {b}")
    return indices
