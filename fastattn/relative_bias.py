"""Biases of distances as models store them."""

from __future__ import annotations

import math

import numpy as np

from .core.arguments import count, flag, plain
from .core.dtypes import is_real

__all__ = ["t5_relative_bias"]


def t5_relative_bias(table, *, bidirectional=True, max_distance=128) -> np.ndarray:
    """The `relative_bias` of `fastattn.scaled_dot` from the table of buckets that T5 learns.

    Parameters
    ----------
    table : array_like of real numbers, (buckets, Hq)
        A bias for each bucket of distances and head: ``relative_attention_bias.weight`` of a T5
        layer of Hugging Face Transformers.
    bidirectional : bool, default True
        Half of the buckets are for keys behind the query, as in T5's encoder. False, as in its
        decoder, gives all of them to the keys before it, and those behind it the first.
    max_distance : int, default 128
        From this distance on all are in the last bucket: T5's ``relative_attention_max_distance``.

    Returns
    -------
    ndarray, (Hq, 2 * max_distance + 1)
        Of the dtype of `table`.

    Raises
    ------
    TypeError, ValueError
        The message begins with the argument's name.

    Notes
    -----
    Half of the buckets of a side hold one distance each, the others runs whose lengths grow as a
    geometric series: Raffel et al. (2020), "Exploring the Limits of Transfer Learning with a
    Unified Text-to-Text Transformer", section 2.1. As there the logarithms are taken in float32. T5
    does not scale its scores: pass ``scale=1.0`` too.

    It is linear in the table. Of a table that numbers its buckets it makes that of each distance,
    by which the gradient of the relative bias sums to the table's.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> table = np.arange(8.0)[:, None]  # of one head
    >>> fastattn.t5_relative_bias(table, max_distance=8)
    array([[3., 3., 3., 3., 3., 2., 2., 1., 0., 5., 6., 6., 7., 7., 7., 7.,
            7.]])
    """
    x = plain("table", table)
    if not is_real(x.dtype):
        raise TypeError(f"table: expected real numbers, got {x.dtype}")
    bidirectional, reach = flag("bidirectional", bidirectional), count("max_distance", max_distance)
    fewest = 4 if bidirectional else 2
    if x.ndim != 2 or x.shape[0] < fewest:
        raise ValueError(
            f"table: expected shape (buckets, heads) with at least {fewest} buckets, got {x.shape}"
        )
    of_side = x.shape[0] // 2 if bidirectional else x.shape[0]
    exact = of_side // 2  # the buckets of one distance
    if reach <= exact:
        raise ValueError(
            f"max_distance: expected more than the {exact} distances that have buckets of their "
            f"own, got {reach}"
        )
    distance = np.arange(-reach, reach + 1)
    away = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    bucket = np.where(away < exact, away, _runs(np.maximum(away, 1), exact, of_side, reach))
    if bidirectional:
        bucket += of_side * (distance > 0)
    return np.ascontiguousarray(x[bucket].T)


def _runs(away, exact: int, of_side: int, reach: int) -> np.ndarray:
    """The buckets of distances of `exact` and more, which lie on a logarithmic scale."""
    real = np.float32
    # Rounded once: NumPy's own float32 logarithm errs by more, and a bucket may begin right here.
    logarithm = np.log((away.astype(real) / real(exact)).astype(np.float64)).astype(real)
    place = logarithm / real(math.log(reach / exact)) * real(of_side - exact)
    return np.minimum(exact + place.astype(np.int64), of_side - 1)
