"""Maps of the weights, and what they are measured against."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem
from fastattn.dispatch import named, unsupported_map
from helpers.oracles import assert_exact_enough, definition, judging_dtype, plain_numpy


def problem_of(q, k, **options):
    q, k = np.asarray(q), np.asarray(k)
    return make_problem(q, k, k[..., :0], **options)


def call(target, name, q, k, *args, **options):
    """``fastattn.<name>`` on this backend; skips the test where that makes no maps."""
    reason = unsupported_map(named(target.backend), problem_of(q, k, **options))
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    return getattr(fastattn, name)(q, k, *args, backend=target.backend, **options)


def oracles(p):
    """The weights in more than the dtype of sums, and plain NumPy's in that dtype."""
    return definition(p, judging_dtype(p))[2], plain_numpy(p, p.accumulator)[2]


def cells(weights, rows, columns):
    """The definition in a user's words: the mean over queries of the sums over keys."""
    n_queries, n_keys = weights.shape[-2:]
    map_ = np.empty((*weights.shape[:-2], rows, columns), weights.dtype)
    with np.errstate(all="ignore"):
        for r, c in np.ndindex(rows, columns):
            queries = slice(r * n_queries // rows, (r + 1) * n_queries // rows)
            keys = slice(c * n_keys // columns, (c + 1) * n_keys // columns)
            map_[..., r, c] = weights[..., queries, keys].sum(axis=-1).mean(axis=-1)
    return map_


def check_maps(target, q, k, shape, **options):
    """Hold the importance of keys and a map of `shape` to promise 1."""
    p = problem_of(q, k, **options)
    exact, plain = oracles(p)
    with np.errstate(all="ignore"):
        wanted, yardstick = exact.sum(axis=-2), plain.sum(axis=-2)
    got = call(target, "key_importance", q, k, **options)
    assert_exact_enough(got, wanted, yardstick, p.accumulator, "key_importance")
    got = call(target, "attention_map", q, k, shape, **options)
    wanted, yardstick = cells(exact, *shape), cells(plain, *shape)
    assert_exact_enough(got, wanted, yardstick, p.accumulator, "attention_map")


def check_top(target, q, k, n, **options):
    """Hold the strongest keys to promise 1. Keys whose weights differ by as much as plain NumPy
    errs may change places.
    """
    p = problem_of(q, k, **options)
    (exact, plain), seen = oracles(p), reference.visible(p)
    indices, weights = call(target, "top_keys", q, k, n, **options)
    assert indices.dtype == np.int64
    assert indices.shape == weights.shape == p.rows(n)
    found, kept = indices >= 0, np.arange(n) < seen.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(found, kept)
    np.testing.assert_array_equal(weights[~found], 0)
    chosen = np.zeros(seen.shape, int)
    np.add.at(chosen, (*np.nonzero(found)[:-1], indices[found]), 1)
    assert (chosen <= seen).all()  # each once, and none that is hidden

    def strongest(weights):
        padded = np.concatenate((weights, np.zeros(indices.shape, weights.dtype)), axis=-1)
        return -np.sort(-padded, axis=-1)[..., :n]

    wanted, yardstick = strongest(exact), strongest(plain)
    assert_exact_enough(weights, wanted, yardstick, p.accumulator, "weights")
    theirs = np.take_along_axis(exact, np.maximum(indices, 0), axis=-1) if p.n_keys else wanted
    theirs = np.where(found, theirs, 0).astype(p.accumulator)
    assert_exact_enough(theirs, wanted, yardstick, p.accumulator, "weights of the indices")
    return indices, weights
