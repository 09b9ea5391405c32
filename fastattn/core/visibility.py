"""Which keys a query may see: an interval, however it was described."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["KeyRange", "key_range"]


_new = tuple.__new__


class KeyRange(NamedTuple):
    """The keys that the structured masks of a call show.

    Causal masks, windows, lengths and spans each show a query an interval of keys, and so does any
    combination of them: query ``i`` sees the keys ``j`` with

    ``max(i + offset - left, start[i]) <= j < min(i + offset + right + 1, lengths, stop[i])``.

    What hides nothing is None.
    """

    n_queries: int
    n_keys: int
    offset: int | np.ndarray  # (batch, queries), int64
    left: int | None
    right: int | None  # 0 under a causal mask
    lengths: np.ndarray | None  # (batch), int64, within 0..n_keys
    spans: tuple[np.ndarray, np.ndarray] | None  # (batch, heads, queries), int64, in 0..n_keys

    @property
    def hides_nothing(self) -> bool:
        """Does every query see every key?"""
        return self.left is self.right is self.lengths is self.spans is None

    def bounds(self) -> tuple[np.ndarray, np.ndarray] | None:
        """``(start, stop)``, int64, broadcastable to ``(batch, heads, queries)``, of two axes at
        least, within ``0..n_keys``, empty where ``stop <= start``. None if nothing is hidden.
        """
        if self.hides_nothing:
            return None
        start = np.zeros((1, 1), np.int64)
        stop = np.full((1, 1), self.n_keys, np.int64)
        if self.left is not None or self.right is not None:
            offset = self.offset
            if isinstance(offset, np.ndarray):
                offset = offset[..., None, :]
            position = np.arange(self.n_queries)[None] + offset
            if self.left is not None:
                start = np.maximum(position - self.left, 0)
            if self.right is not None:
                stop = np.minimum(position + (self.right + 1), self.n_keys)
        if self.lengths is not None:
            stop = np.minimum(stop, self.lengths[..., None, None])
        if self.spans is not None:
            start = np.maximum(start, self.spans[0])
            stop = np.minimum(stop, self.spans[1])
        return np.minimum(start, self.n_keys), np.maximum(stop, 0)

    def longest_first(self, batch: tuple[int, ...]) -> np.ndarray | None:
        """The flattened batch entries in the order of how many keys their queries see at most, or
        None where that is the same for all: threads that share out a ragged batch finish together.
        """
        if self.lengths is None and self.spans is None and type(self.offset) is int:
            return None
        if max(batch, default=1) < 2:
            return None
        bounds = self.bounds()
        if bounds is None or max(x.ndim for x in bounds) < 3:
            return None
        width = (bounds[1] - bounds[0]).max(axis=(-2, -1), initial=0)
        return np.argsort(-np.broadcast_to(width, batch).ravel(), kind="stable")


def key_range(
    n_queries: int, n_keys: int, offset, causal: bool, window, lengths, spans
) -> KeyRange:
    """The `KeyRange` of validated options. Sides that hide nothing are left out where that can be
    told without looking at an array.
    """
    left, right = window
    if causal:
        right = 0  # a window's right side is never negative, so causal is the tighter
    if type(offset) is int:
        if left is not None and offset + n_queries - 1 <= left:
            left = None
        if right is not None and offset + right >= n_keys - 1:
            right = None
    # As KeyRange(...) does, in half its time.
    return _new(KeyRange, (n_queries, n_keys, offset, left, right, lengths, spans))
