"""The scores of a block of keys: the product and the options."""

from __future__ import annotations

from math import inf

import numpy as np

from .exponential import tanh
from .extremes import far_scores, find_nans
from .hooks import POSITIVE, as_score, for_rows
from .key_rows import key_rows
from .memory import (
    ahead,
    doubles,
    flags,
    ints,
    load,
    load_flags,
    own_vector,
    reals,
    rows_to_columns,
    store,
)
from .numbers import FLOAT64, REAL, bounded, is_finite, read, rounded
from .score_functions import score_keys
from .tile import (
    ANY_VISIBLE,
    BLOCK_D,
    BLOCK_D_ONE_VECTOR,
    FAR_SCORES,
    FIRST,
    FULL,
    LAST,
    MICROPANEL_FIELDS,
    PARTIAL,
    ROW_VISIBLE,
    SUB_BLOCKS,
    SUB_FIELDS,
    SUB_FIRST,
    SUB_LAST,
    SUB_VECS,
    SUB_VISIBILITY,
    VECS,
    in_block,
    inlined,
    matmul,
    row_of,
    sub_block_of,
    subs_of,
    visible_in_block,
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
    multiply_add,
    per_type,
    splat,
)
from .visibility import split_by_visibility

# Nothing less than this changes the largest numbers.
far_enough = per_type(2.0**100, 2.0**960)


@inlined
def score_block(t, begin, scale, score_function, bias, score_mod, mask_mod):
    """The scores of the block of keys that begins at `begin`, -inf where hidden."""
    size = TILE_VECS * lanes(scale)
    for i in range(t.micropanels * size):
        reals(t.top, scale)[i] = -inf
    for p in range(t.micropanels):
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        micropanel[ANY_VISIBLE] = 0
    for sub_block in range(SUB_BLOCKS):
        first, last = sub_block_of(begin, sub_block, t.first, t.last)
        k, k_row, k_dim = key_rows(t, first, last, scale)
        for p in range(t.micropanels):
            micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
            key, stop = sub_block_of(begin, sub_block, micropanel[FIRST], micropanel[LAST])
            split_by_visibility(t, p, sub_block, key, stop - key, begin, scale, mask_mod)
            for n in range(micropanel[VECS]):
                sub = ahead(subs_of(t, p, sub_block), n * SUB_FIELDS)
                if sub[SUB_VECS] > 0:
                    at = k + (sub[SUB_FIRST] - first) * k_row
                    score(
                        t,
                        p,
                        n,
                        sub,
                        begin,
                        at,
                        k_row,
                        k_dim,
                        scale,
                        score_function,
                        bias,
                        score_mod,
                    )
                    micropanel[ANY_VISIBLE] |= sub[SUB_VECS]


@compiled
def score(t, p, n, sub, begin, k, k_row, k_dim, scale, score_function, bias, score_mod):
    """The scores of the sub of micropanel `p` that begins at vector `n`.

    A bias or a function may hide some of its keys, or all, which leaves it no vectors.
    """
    size, lane = TILE_VECS * lanes(scale), n * lanes(scale)
    vecs, visibility, row = sub[SUB_VECS], sub[SUB_VISIBILITY], p * size + lane
    key, keys = sub[SUB_FIRST], sub[SUB_LAST] - sub[SUB_FIRST]
    scores = ahead(in_block(t.scores, scale, p, key - begin), lane)
    visible = ahead(visible_in_block(t, scale, p, key - begin), lane)
    biases = reals(t.bias_tile, scale)
    if bias is not None:
        load_bias(t, bias, row, key, vecs, keys, biases, scale)
        if hides_all(biases, vecs, keys, scale):
            sub[SUB_VECS] = 0
            return
    queries = ahead(reals(t.queries, scale), p * size * t.head_dim + lane)
    if score_function is not None:
        score_keys(t, score_function, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    else:
        block = block_d(vecs, t.head_dim)
        matmul(vecs, k, k_row, k_dim, keys, t.head_dim, block, queries, scores, np.int64(0))
        if t.retry == FAR_SCORES:
            far_scores(t, row, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    if bias is not None:
        visibility = exclude(biases, vecs, keys, visible, visibility, scale)
    special = ahead(reals(t.special, scale), row)
    if t.softcap > 0 or score_mod is not None:  # which may make a number of what is not finite
        find_special(vecs, keys, visible, visibility, scores, special, scale)
    if t.softcap > 0:
        cap(t.softcap, vecs, keys, scores, scale)
    if bias is not None:
        add_bias(biases, vecs, keys, scores, scale)
    if t.alibi != 0:
        subtract_alibi(t, row, key, vecs, keys, scores, scale)
    if score_mod is not None:
        call_score_mod(t, row, key, vecs, keys, scores, scale, score_mod)
        visibility = exclude(scores, vecs, keys, visible, visibility, scale)
    row_state, tops = ahead(flags(t.row_state), row), ahead(reals(t.top, scale), row)
    if visibility == PARTIAL:
        for j in range(keys):
            for i in range(vecs * lanes(scale)):
                row_state[i] |= visible[j * size + i]
        hide(vecs, keys, visible, scores, special, scale)
        take_max(vecs, keys, scores, tops, None, scale)
    else:
        for i in range(vecs * lanes(scale)):
            row_state[i] |= ROW_VISIBLE
        take_max(vecs, keys, scores, tops, special, scale)
    if t.retry != 0:
        find_nans(vecs, keys, scores, row_state, scale)
    sub[SUB_VISIBILITY] = visibility


@compiled
def block_d(vecs, head_dim):
    """Head dims of a sum that begins at zero; runs of sqrt(head_dim) have the least error."""
    block = BLOCK_D_ONE_VECTOR if vecs == 1 else BLOCK_D
    while block * block < head_dim:
        block *= 2
    return block


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
def exclude(values, vecs, keys, visible, visibility, scale):
    """Hide the keys whose value is -inf. Returns the visibility of the sub."""
    size = TILE_VECS * lanes(scale)
    lowest = splat(constant(-inf, scale))
    found = lowest < lowest
    for j in range(keys):
        for n in range(vecs):
            found = found | (load(ahead(values, j * size + n * lanes(scale))) == lowest)
    if not any_lane(found):
        return visibility
    for j in range(keys):
        for x in range(j * size, j * size + vecs * lanes(scale)):
            visible[x] = (visibility == FULL or visible[x] != 0) & (values[x] != -inf)
    return PARTIAL


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
def find_special(vecs, keys, visible, visibility, scores, special, scale):
    """Make `special` NaN where a row sees a score that is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(special, n))
        for j in range(keys):
            s = load(ahead(scores, j * size + n))
            if visibility == PARTIAL:
                s = choose(load_flags(ahead(visible, j * size + n), s), s, zero)
            some = multiply_add(s, zero, some)
        store(ahead(special, n), some)


@compiled
def hide(vecs, keys, visible, scores, special, scale):
    """Make hidden scores -inf, and `special` NaN where a row sees one that is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    nothing = splat(constant(-inf, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(special, n))
        for j in range(keys):
            at = ahead(scores, j * size + n)
            s = load(at)
            shown = load_flags(ahead(visible, j * size + n), s)
            some = multiply_add(choose(shown, s, zero), zero, some)
            store(at, choose(shown, s, nothing))
        store(ahead(special, n), some)


@compiled
def take_max(vecs, keys, scores, tops, special, scale):
    """The maximum, and, unless `special` is None, NaN there where a score is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        top, some = load(ahead(tops, n)), zero
        column = ahead(scores, n)
        # In pairs of pairs, or the latency of one chain would be the time of the loop.
        for j in range(0, keys, 4):
            a, b = load(ahead(column, j * size)), load(ahead(column, min(j + 1, keys - 1) * size))
            c = load(ahead(column, min(j + 2, keys - 1) * size))
            d = load(ahead(column, min(j + 3, keys - 1) * size))
            top = larger(larger(larger(a, b), larger(c, d)), top)
            if special is not None:
                some = some + ((a * zero + b * zero) + (c * zero + d * zero))
        store(ahead(tops, n), top)
        if special is not None:
            store(ahead(special, n), load(ahead(special, n)) + some)
