"""Spans of visible keys for documents laid end to end in one sequence."""

from __future__ import annotations

import numpy as np

from .core.arguments import FAR, integers

__all__ = ["document_lengths", "document_spans"]


def document_spans(lengths_q, lengths_k=None, causal=False) -> tuple[np.ndarray, np.ndarray]:
    """The spans of packed documents: each query sees the keys of its own document.

    Parameters
    ----------
    lengths_q : array_like of int, (documents,)
        How many queries each document has; ``np.diff(cu_seqlens)`` where those are at hand.
    lengths_k : array_like of int, (documents,), optional
        How many keys; as many as queries by default.
    causal : bool, default False
        Hide the future within each document; its last query sees its last key.

    Returns
    -------
    start : ndarray of int64, (sum of lengths_q,)
        The first key that each query sees.
    stop : ndarray of int64, (sum of lengths_q,)
        The key behind the last; for ``scaled_dot(..., spans=(start, stop))``.

    Raises
    ------
    TypeError, ValueError
        If the lengths are not integers, negative, of different numbers of documents, or 2**61 and
        more together.

    Examples
    --------
    >>> import fastattn
    >>> start, stop = fastattn.document_spans([2, 3], causal=True)
    >>> start, stop
    (array([0, 0, 2, 2, 2]), array([1, 2, 3, 4, 5]))
    """
    queries = document_lengths("lengths_q", lengths_q)
    keys = queries if lengths_k is None else document_lengths("lengths_k", lengths_k)
    if keys.shape != queries.shape:
        raise ValueError(f"lengths_k: expected {queries.size} documents, got {keys.size}")
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal: expected bool, got {type(causal).__name__}")
    end = np.cumsum(keys)
    start, stop = np.repeat(end - keys, queries), np.repeat(end, queries)
    if causal:
        from_last = np.repeat(np.cumsum(queries), queries) - np.arange(queries.sum())
        stop = np.maximum(stop - from_last + 1, start)
    return start, stop


def document_lengths(name, value) -> np.ndarray:
    """The lengths of documents as int64, or an error that names the argument."""
    lengths = integers(name, value)
    if lengths.ndim != 1:
        raise ValueError(f"{name}: expected 1 axis, got {lengths.ndim}")
    if lengths.size and lengths.min() < 0:
        raise ValueError(f"{name}: expected lengths of at least 0, got {lengths.min()}")
    total = sum(lengths.tolist())
    if total >= FAR:
        raise ValueError(f"{name}: expected lengths of less than 2**61 together, got more")
    return lengths
