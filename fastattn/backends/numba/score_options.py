"""What the options add to the scores of a block, in the order of `fastattn.reference.scores`."""

from __future__ import annotations

from math import inf

import numpy as np

from .exponential import tanh
from .hooks import POSITIVE, as_score, for_rows
from .memory import ahead, doubles, ints, load, own_vector, reals, rows_to_columns, store
from .numbers import FLOAT64, REAL, bounded, is_finite, read, rounded
from .tile import row_of
from .vectors import (
    TILE_VECS,
    VECTOR_BYTES,
    any_lane,
    compiled,
    constant,
    lanes,
    magnitude,
    per_type,
    splat,
)

# Nothing less than this changes the largest numbers.
far_enough = per_type(2.0**100, 2.0**960)


@compiled
def cap(softcap, vecs, keys, scores, scale):
    size = TILE_VECS * lanes(scale)
    most, inverse = splat(constant(softcap, scale)), splat(constant(1 / softcap, scale))
    for j in range(keys):
        for n in range(vecs):
            at = ahead(scores, j * size + n * lanes(scale))
            store(at, most * tanh(load(at) * inverse))


@compiled
def bias_row(t, i):
    """The address of the biases of row `i` of the tile.

    Those of a relative bias begin by the position of the row on the key axis, clipped to where it
    is out of reach of all keys.
    """
    if t.reach < 0:
        return row_of(t, t.bias, t.bias_row, i)
    place = ints(row_of(t, t.position, t.position_row, i))[0] + t.reach
    place = min(max(place, 0), t.n_keys + 2 * t.reach)
    return ints(t.bias)[ints(t.row_head)[i]] + place * t.bias_row


@compiled
def load_bias(t, format, row, key, vecs, keys, tile, scale):
    """tile[key][lane] = the bias, whatever its type."""
    size, count = TILE_VECS * lanes(scale), vecs * lanes(scale)
    rows = ints(t.words)
    for i in range(count):
        rows[i] = bias_row(t, row + i) + key * t.bias_dim
    done = 0
    if format == REAL and t.bias_dim * lanes(scale) == VECTOR_BYTES:
        done = keys // lanes(scale) * lanes(scale)
        for n in range(0, count, lanes(scale)):
            for j in range(0, done, lanes(scale)):
                rows_to_columns(ahead(rows, n), j * t.bias_dim, ahead(tile, j * size + n))
    for i in range(count):
        shared = i > 0 and rows[i] == rows[i - 1]
        for j in range(done, keys):
            at = rows[i] + j * t.bias_dim
            if shared:
                tile[j * size + i] = tile[j * size + i - 1]
            elif format == REAL:
                tile[j * size + i] = reals(at, scale)[0]
            elif format == FLOAT64 and not t.bias_swapped:
                tile[j * size + i] = rounded(doubles(at)[0], scale)
            else:
                bias = read(at, format, t.bias_swapped)
                tile[j * size + i] = rounded(bias, scale)


@compiled
def hides_all(bias, vecs, keys, scale):
    """Is every bias of the tile -inf?"""
    size = TILE_VECS * lanes(scale)
    for j in range(keys):
        for i in range(vecs * lanes(scale)):
            if bias[j * size + i] != -inf:
                return False
    return True


@compiled
def add_bias(bias, vecs, keys, scores, scale):
    size = TILE_VECS * lanes(scale)
    for j in range(keys):
        for n in range(vecs):
            at = j * size + n * lanes(scale)
            a, b = load(ahead(scores, at)), load(ahead(bias, at))
            finite = is_finite(a, scale) & is_finite(b, scale)
            store(ahead(scores, at), bounded(a + b, finite, scale))


@compiled
def subtract_alibi(t, row, key, vecs, keys, scores, scale):
    size, one = TILE_VECS * lanes(scale), splat(constant(1.0, scale))
    slopes, distances = own_vector(scale), own_vector(scale)
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        for i in range(lanes(scale)):
            at = row + n + i
            slope = doubles(t.alibi)[ints(t.row_head)[at] % t.heads]
            place = ints(row_of(t, t.position, t.position_row, at))[0]
            slopes[i] = constant(slope, scale)
            distances[i] = constant(np.float64(place - key), scale)
        slope, distance, step = load(slopes), load(distances), one - one
        reach = magnitude(slope) * (magnitude(distance) + splat(constant(float(keys), scale)))
        if any_lane(reach > splat(far_enough(scale))):
            subtract_far(slope, distance, keys, ahead(scores, n), scale)
            continue
        for j in range(keys):
            to = ahead(scores, j * size + n)
            store(to, load(to) - slope * magnitude(distance - step))
            step = step + one


@compiled
def subtract_far(slope, distance, keys, scores, scale):
    """The same where the difference may leave the range of scores."""
    size, one = TILE_VECS * lanes(scale), splat(constant(1.0, scale))
    sloping, step = is_finite(slope, scale), one - one
    for j in range(keys):
        to = ahead(scores, j * size)
        s, less = load(to), slope * magnitude(distance - step)
        finite = is_finite(s, scale) & sloping
        store(to, bounded(s - bounded(less, sloping, scale), finite, scale))
        step = step + one


@compiled
def call_score_mod(t, row, key, vecs, keys, scores, scale, score_mod):
    """Let the function change the scores."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    batch, head = t.batch, ints(t.row_head)[row] % t.heads
    one = own_vector(scale)
    for n in range(0, vecs * width, width):
        query = ints(t.row_query)[row] + n
        rows = min(width, t.rows - row - n)
        for j in range(keys):
            at = ahead(scores, j * size + n)
            store(one, load(at))
            j_key = (key + j) & POSITIVE
            for_rows(change, query, rows, scale, one, batch, head, j_key, score_mod)
            store(at, load(one))


@compiled
def change(lane, i, scores, batch, head, j, score_mod):
    scores[lane] = as_score(score_mod(scores[lane], batch, head, i, j), scores[lane])
