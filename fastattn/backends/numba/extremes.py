"""Sums that left the range of their type although they were made of finite numbers."""

from __future__ import annotations

from math import frexp, inf, ldexp

import numpy as np

from .exponential import WEIGHT_UNIT
from .key_rows import key_rows, value_rows
from .memory import ahead, doubles, floats, ints, load, load_unaligned, own_vector, reals, store
from .numbers import REAL, finite_most, widen
from .tile import (
    FAR_SCORES,
    HAS_OUTPUT,
    MICROPANEL_FIELDS,
    ROW_NAN,
    SMALL_WEIGHTS,
    SUB_BLOCK_K,
    VECS,
    row_of,
)
from .vectors import (
    TILE_VECS,
    VECTOR_BYTES,
    any_lane,
    choose,
    compiled,
    constant,
    lanes,
    larger,
    magnitude,
    per_type,
    splat,
)

__all__ = ["far_scores", "find_nans", "retry_for"]

# What makes the products of doubles small enough to be summed: 2 to this power, on both sides.
shrink_power = per_type(0.0, -520.0)


@compiled
def retry_for(t, scale):
    """Why the tile must be solved a second time, or 0.

    NaN and Inf stand as they are where the inputs explain them: no finite number of theirs is large
    enough for a sum to have left the range of its type.
    """
    special, infinite = False, False
    for i in range(t.rows):
        if reals(t.special, scale)[i] != 0:
            special = True
            infinite |= reals(t.row_max, scale)[i] == inf  # beside a NaN?
            total = reals(t.row_sum, scale)[i]
            infinite |= t.max_result != 0 and total != total  # because of a score, or a sink?
    if special and scores_may_overflow(t, scale):
        return FAR_SCORES
    if infinite or (overflowed(t, scale) and values_may_overflow(t, scale)):
        return SMALL_WEIGHTS
    return 0


@compiled
def overflowed(t, scale):
    """Is some sum of values not finite although the sum of its weights is?"""
    size = TILE_VECS * lanes(scale)
    most, zero = splat(finite_most(scale)), splat(constant(0.0, scale))
    wrong = zero < zero
    for p in range(t.micropanels):
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        for n in range(micropanel[VECS] if micropanel[HAS_OUTPUT] else 0):
            at = p * size + n * lanes(scale)
            column = ahead(reals(t.total, scale), p * size * t.value_dim + n * lanes(scale))
            some = zero  # x * 0 is a NaN where x is not finite, and so is every sum with it
            for d in range(t.value_dim):
                some = some + load(ahead(column, d * size)) * zero
            finite = magnitude(load(ahead(reals(t.row_sum, scale), at))) <= most
            wrong = wrong | (finite & (some != zero))
    return any_lane(wrong)


@compiled
def scores_may_overflow(t, scale):
    of_q, of_k = 0.0, 0.0
    for i in range(t.rows):
        q = row_of(t, t.q, t.q_row, i)
        of_q = max(of_q, largest(t, q, 0, t.q_dim, 1, t.head_dim, t.q_format, 0, scale))
    for key in range(t.first, t.last, SUB_BLOCK_K):
        last = min(key + SUB_BLOCK_K, t.last)
        at, row, dim = key_rows(t, key, last, scale)
        of_k = max(of_k, largest(t, at, row, dim, last - key, t.head_dim, REAL, 0, scale))
    return abs(t.scale) * of_q * max(1.0, of_k * t.head_dim) > 0.5 * finite_most(scale)


@compiled
def values_may_overflow(t, scale):
    of_v = 0.0
    for key in range(t.first, t.last, SUB_BLOCK_K):
        last = min(key + SUB_BLOCK_K, t.last)
        at, row, dim = value_rows(t, key, last, scale)
        of_v = max(of_v, largest(t, at, row, dim, last - key, t.value_dim, REAL, 0, scale))
    return WEIGHT_UNIT * t.n_keys * of_v > 0.5 * finite_most(scale)


@compiled
def largest(t, at, row, dim, rows, dims, format, scales, scale):
    """The largest finite magnitude in some rows of numbers."""
    if format != REAL:
        widen(
            at, row, dim, rows, dims, format, floats(scales), np.int64(0), reals(t.widened, scale)
        )
        at, dim = t.widened, VECTOR_BYTES // lanes(scale)
        row = dims * dim
    limit, zero = splat(finite_most(scale)), splat(constant(0.0, scale))
    done, best, most = 0, zero, 0.0
    if dim * lanes(scale) == VECTOR_BYTES:
        done = dims // lanes(scale) * lanes(scale)
    for j in range(rows):
        for d in range(0, done, lanes(scale)):
            x = magnitude(load_unaligned(reals(at + j * row + d * dim, scale)))
            best = larger(choose(x <= limit, x, zero), best)
        for d in range(done, dims):
            x = np.float64(abs(reals(at + j * row + d * dim, scale)[0]))
            most = max(most, x if x <= finite_most(scale) else 0.0)
    lanes_of = own_vector(scale)
    store(lanes_of, best)
    for i in range(lanes(scale)):
        most = max(most, np.float64(lanes_of[i]))
    return most


@compiled
def far_scores(t, row, vecs, k, k_row, k_dim, keys, queries, scores, scale):
    """scores[key][lane] of special rows, summed in float64.

    Those of finite numbers are clipped to the range of scores.
    """
    size, power = TILE_VECS * lanes(scale), np.int64(shrink_power(scale))
    small = ldexp(1.0, power)
    most = np.float64(finite_most(scale))
    for i in range(vecs * lanes(scale)):
        if reals(t.special, scale)[row + i] == 0:
            continue
        own = t.scale
        if t.scales != 0:
            own = doubles(t.scales)[ints(t.row_head)[row + i] % t.heads]
        fraction, exponent = frexp(own)
        for j in range(keys):
            total = 0.0
            for d in range(t.head_dim):
                x = np.float64(reals(k + j * k_row + d * k_dim, scale)[0])
                total += np.float64(queries[d * size + i]) * small * (x * small)
            total *= fraction
            score = ldexp(total, exponent - 2 * power)
            if total - total == 0:
                score = min(max(score, -most), most)
            scores[j * size + i] = score


@compiled
def find_nans(vecs, keys, scores, row_state, scale):
    """Mark the rows that see a score of NaN, which a maximum ignores."""
    size = TILE_VECS * lanes(scale)
    for j in range(keys):
        for i in range(vecs * lanes(scale)):
            if scores[j * size + i] != scores[j * size + i]:
                row_state[i] |= ROW_NAN
