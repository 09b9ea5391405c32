"""The options of the ranking: what `fastattn.scaled_dot` is given beside its arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .cases import Case

__all__ = [
    "NEIGHBOURS",
    "OPTIONS",
    "RATE",
    "REACH",
    "biases",
    "neighbours",
    "on_grid",
    "relative_biases",
    "sequence_bounds",
]

RATE = 0.1  # of the weights that dropout drops
REACH = 128  # farther keys have the bias of this distance
NEIGHBOURS = 16  # of each node of a graph
SHORTEST, LONGEST = 16, 512  # tokens of a sequence of those that are packed


def dropout(case: Case, rows: slice) -> dict[str, Any]:
    """A share of the weights is dropped."""
    return {"dropout": (RATE, 0), "dropout_offset": (0, 0, rows.start, 0)}


def relative_bias(case: Case, rows: slice) -> dict[str, Any]:
    """A number per head and distance."""
    offset = rows.start + case.n_keys - case.n_queries
    return {"relative_bias": relative_biases(case), "q_offset": offset}


def return_max(case: Case, rows: slice) -> dict[str, Any]:
    """The largest score of each query, as QK-clip watches it."""
    return {"return_max": True}


def graph(case: Case, rows: slice) -> dict[str, Any]:
    """A node sees its neighbours, as a sparse mask lists them."""
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    keys = neighbours(case)[rows]
    starts = np.arange(len(keys) + 1) * keys.shape[1]
    seen = np.ones(keys.size, bool)
    return {"mask": csr_array((seen, keys.ravel(), starts), (len(keys), case.n_keys))}


def packed(case: Case, rows: slice) -> dict[str, Any]:
    """Sequences end to end, which `fastattn.varlen` is given by where they begin."""
    return {}


def relative_biases(case: Case) -> np.ndarray:
    """``(heads, 2 * REACH + 1)``."""
    return np.random.default_rng(0).standard_normal((case.heads, 2 * REACH + 1), np.float32)


def on_grid(case: Case) -> np.ndarray:
    """Where each query and key, ``(n_queries, n_keys)``, find their relative bias."""
    i = np.arange(case.n_queries)[:, None] + case.n_keys - case.n_queries
    return np.clip(np.arange(case.n_keys) - i, -REACH, REACH) + REACH


def biases(case: Case) -> np.ndarray:
    """The same for each query and key, ``(heads, n_queries, n_keys)``."""
    return np.ascontiguousarray(relative_biases(case)[:, on_grid(case)])


def neighbours(case: Case) -> np.ndarray:
    """The keys of each query, ``(n_queries, NEIGHBOURS)``, ascending and far apart: one of each
    stretch of the keys, so that none is listed twice.
    """
    n = min(NEIGHBOURS, case.n_keys)
    bounds = np.linspace(0, case.n_keys, n + 1).astype(np.int32)
    rng = np.random.default_rng(0)
    return rng.integers(bounds[:-1], bounds[1:], (case.n_queries, n), np.int32)


def sequence_bounds(n: int) -> np.ndarray:
    """Where sequences begin, and the last one ends, of `n` tokens in all."""
    lengths = np.random.default_rng(0).integers(SHORTEST, LONGEST + 1, n // SHORTEST + 1)
    bounds = np.cumsum(lengths)
    return np.concatenate([[0], bounds[bounds < n], [n]])


# ``OPTIONS[name](case, rows)``: the options of a call on these queries of `case` alone.
OPTIONS = {f.__name__: f for f in (dropout, relative_bias, return_max, graph, packed)}
