"""What was attended to: maps of the softmax weights, without the array of all of them."""

from __future__ import annotations

import numpy as np

from .core.arguments import count, integers, plain
from .core.bins import bin_starts
from .core.option_table import check
from .core.problem import Problem, make_problem
from .dispatch import select, unsupported_map

__all__ = ["attention_map", "key_importance", "top_keys"]


def key_importance(q, k, *, backend=None, **options) -> np.ndarray:
    """How much attention each key gets: the softmax weights summed over the queries.

    Parameters
    ----------
    q : array_like, (..., Hq, Sq, D)
        Queries.
    k : array_like, (..., Hkv, Sk, D)
        Keys; both as of `fastattn.scaled_dot`, in the host's memory.
    backend, **options
        As of `fastattn.scaled_dot`: ``scale``, ``softcap``, ``bias``, ``relative_bias``,
        ``alibi``, ``sinks``, ``causal``, ``window``, ``q_offset``, ``kv_lengths``, ``spans``,
        ``mask``, ``threads`` and ``precision``. A backend that makes no maps is passed over, or an
        error if it is named.

    Returns
    -------
    ndarray, (..., Hq, Sk)
        Float32, or float64 where `q` or `k` is (or holds integers). Its sum is the number of
        queries that see a key, less what sinks take.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.
    MemoryError
        If the result or the scratch, a few times as much as the result of one head, cannot be had.

    Notes
    -----
    Memory is O(Sq + Sk), and the time about that of `scaled_dot`: the scores are made twice, once
    for the softmax's denominators and once for the sums, which are kept in float64. The sums depend
    on the shape alone, not on the number of threads (`cython`).

    Examples
    --------
    >>> import fastattn
    >>> fastattn.key_importance([[1, 0], [1, 0]], [[1, 0], [0, 1]]).round(3)
    array([1.34, 0.66])
    """
    p = _pose("key_importance", q, k, options)
    sums = select(p, backend, unsupported_map).run_map(p, min(1, p.n_queries), p.n_keys)
    return _deliver(p, sums.sum(axis=-2))


def attention_map(q, k, shape, *, backend=None, **options) -> np.ndarray:
    """A small picture of the weights: summed over the keys of a cell, averaged over its queries.

    Parameters
    ----------
    q, k : array_like
        As of `key_importance`.
    shape : int or (int, int)
        The picture's rows and columns; an int stands for both. From 1 to `Sq` rows and from 1 to
        `Sk` columns, but 0 where there is nothing to split. Row ``r`` has the queries from
        ``r * Sq // rows`` to before ``(r + 1) * Sq // rows``, column ``c`` the keys from
        ``c * Sk // columns`` to before ``(c + 1) * Sk // columns``: runs whose lengths differ by at
        most one.
    backend, **options
        As of `key_importance`.

    Returns
    -------
    ndarray, (..., Hq, rows, columns)
        Float32, or float64 as of `key_importance`. A row sums to 1 if each of its queries sees a
        key and there are no sinks; a query that sees none counts as one of weights 0.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As of `key_importance`.

    Notes
    -----
    Memory and time are those of `key_importance`, apart from the result.

    Examples
    --------
    A causal attention to equal keys, and what each half of the queries makes of each half of them:

    >>> import numpy as np
    >>> import fastattn
    >>> q = k = np.zeros((1000, 8))
    >>> fastattn.attention_map(q, k, 2, causal=True).round(3)
    array([[1.   , 0.   ],
           [0.693, 0.307]])
    """
    p = _pose("attention_map", q, k, options)
    rows, columns = _cells(shape, p)
    sums = select(p, backend, unsupported_map).run_map(p, rows, columns)
    queries = np.diff(bin_starts(p.n_queries, rows), append=p.n_queries)
    return _deliver(p, sums / queries[:, None])


def top_keys(q, k, n, *, backend=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """The `n` keys to which each query attends most, and their weights.

    Parameters
    ----------
    q, k : array_like
        As of `key_importance`.
    n : int
        At least 1.
    backend, **options
        As of `key_importance`.

    Returns
    -------
    indices : ndarray of int64, (..., Hq, Sq, n)
        Of keys, strongest first; of equal scores the lower index comes first. -1 where a query sees
        fewer than `n` keys, and in all of a row whose weights are NaN.
    weights : ndarray, (..., Hq, Sq, n)
        Theirs among all keys that are seen; float32, or float64 as of `key_importance`. 0 where the
        index is -1, but NaN in a row of NaN.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As of `key_importance`.

    Notes
    -----
    Memory is O(n * Sq + Sk). The scores are made twice, as in `key_importance`, and ranked as they
    are: they tell more keys apart than weights do. Scores that differ by no more than rounding may
    change places from one backend or instruction set to another. A score of ``-inf`` is never among
    the strongest. The time grows with `n` where that is not small beside ``Sk / 64``: 100 of 4096
    keys take five times as long as 10 (`cython`).

    Examples
    --------
    >>> import fastattn
    >>> indices, weights = fastattn.top_keys([[1, 0]], [[0, 1], [5, 0], [0, 2]], 2)
    >>> indices
    array([[1, 0]])
    >>> weights.round(3)
    array([[0.945, 0.028]])
    """
    n = count("n", n)
    p = _pose("top_keys", q, k, options)
    indices, weights = select(p, backend, unsupported_map).run_top(p, n)
    # A row that is not a number has no order, nor 0 behind its last key.
    weights[np.isnan(weights[..., 0]) & (indices[..., 0] < 0)] = np.nan
    return (indices[0], weights[0]) if p.one_head else (indices, weights)


def _pose(function: str, q, k, options) -> Problem:
    check(function, options)
    q, k = plain("q", q), plain("k", k)
    return make_problem(q, k, k[..., :0] if k.ndim else k, **options)


def _cells(shape, p: Problem) -> tuple[int, int]:
    """``(rows, columns)`` of a picture, or an error."""
    sides = integers("shape", shape)
    if sides.shape not in ((), (2,)):
        raise ValueError(f"shape: expected one number or (rows, columns), got {shape!r}")
    rows, columns = map(int, np.broadcast_to(sides, 2))
    for cells, n, what in ((rows, p.n_queries, "rows"), (columns, p.n_keys, "columns")):
        if not min(1, n) <= cells <= n:
            raise ValueError(f"shape: expected {min(1, n)}..{n} {what}, got {cells}")
    return rows, columns


def _deliver(p: Problem, x):
    x = x.astype(p.accumulator, copy=False)
    return x[0] if p.one_head else x
