"""What maps of the weights have in common: cells of queries or keys, and a ranking of nothing."""

from __future__ import annotations

import numpy as np

from .problem import Problem

__all__ = ["bin_starts", "covered", "no_top_keys"]


def bin_starts(n: int, cells: int) -> np.ndarray:
    """Where each of `cells` runs of nearly equal length begins that split `n` elements."""
    return np.arange(cells) * n // max(1, cells)


def covered(part: slice, n: int, cells: int) -> tuple[slice, np.ndarray]:
    """The cells that a part of the elements is in, and where in the part each of them begins."""
    first, last = (((i + 1) * cells - 1) // n for i in (part.start, part.stop - 1))
    touched = slice(first, last + 1)
    return touched, np.maximum(bin_starts(n, cells)[touched] - part.start, 0)


def no_top_keys(p: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of the `n` strongest keys of queries that see none."""
    return np.full(p.rows(n), -1), np.zeros(p.rows(n), p.accumulator)
