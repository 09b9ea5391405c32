"""The user's functions of the ranking: their words mean the same to Numba and to PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["FUNCTIONS", "document_starts"]

DOCUMENTS = 8


def alibi(heads: int, n: int, array: Callable) -> dict[str, Callable]:
    """Distance times a slope per head."""
    slopes = array(2.0 ** -np.arange(1, heads + 1).astype(np.float32))

    def score_mod(score, batch, head, i, j):
        return score - slopes[head] * abs(i - j)

    return {"score_mod": score_mod}


def table(heads: int, n: int, array: Callable) -> dict[str, Callable]:
    """A number per head and relative position."""
    numbers = array(np.random.default_rng(0).standard_normal((heads, 2 * n - 1), np.float32))
    last = n - 1

    def score_mod(score, batch, head, i, j):
        return score + numbers[head, i - j + last]

    return {"score_mod": score_mod}


def documents(heads: int, n: int, array: Callable) -> dict[str, Callable]:
    """Documents end to end, each of which sees itself."""
    document = array(np.searchsorted(document_starts(n), np.arange(n), side="right"))

    def mask_mod(batch, head, i, j):
        return document[i] == document[j]

    return {"mask_mod": mask_mod}


def document_starts(n: int) -> np.ndarray:
    """Where the documents begin, of lengths as they come."""
    begins = np.random.default_rng(0).choice(np.arange(1, n), DOCUMENTS - 1, replace=False)
    return np.sort(np.append(begins, 0))


# ``FUNCTIONS[name](heads, n, array)``: what `fastattn.flex` is given, for n queries and n keys;
# `array` makes NumPy's arrays a library's own.
FUNCTIONS = {"alibi": alibi, "table": table, "documents": documents}
