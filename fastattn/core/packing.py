"""Sequences that lie end to end along the queries and the keys of one problem."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Packing"]


class Packing(NamedTuple):
    """Where the sequences are: a query sees no keys but those of its own sequence."""

    cu_q: np.ndarray  # (sequences + 1,), int64: from 0 to the number of queries
    cu_k: np.ndarray  # likewise of the keys
    offset: np.ndarray  # (sequences,), int64: the position of the first query among its keys

    def q_offset(self) -> np.ndarray:
        """That of each query of the problem, (queries,)."""
        return self._of_queries(self.offset - self.cu_q[:-1] + self.cu_k[:-1])

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """``(start, stop)`` of the keys of each query's sequence, (queries,)."""
        return self._of_queries(self.cu_k[:-1]), self._of_queries(self.cu_k[1:])

    def _of_queries(self, x) -> np.ndarray:
        return np.repeat(x, np.diff(self.cu_q))

    def longest_first(self) -> np.ndarray:
        """``(first query, queries, first key, keys)`` of each sequence, (sequences, 4), those with
        the most keys first: threads that share them out finish together.
        """
        n_queries, n_keys = np.diff(self.cu_q), np.diff(self.cu_k)
        table = np.stack((self.cu_q[:-1], n_queries, self.cu_k[:-1], n_keys), axis=1)
        return table[np.argsort(-n_keys, kind="stable")]

    def scores(self) -> int:
        """How many pairs of a query and a key there are in all."""
        return int(np.diff(self.cu_q) @ np.diff(self.cu_k))
