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
from .numbers import REAL, bounded, is_finite, read, rounded
from .score_functions import score_keys
from .tile import (
    BLOCK_D,
    BLOCK_D_ONE_VECTOR,
    FAR_SCORES,
    FIRST,
    LAST,
    LIVE,
    PANEL_FIELDS,
    PIECE_FIELDS,
    PIECE_FIRST,
    PIECE_LAST,
    PIECE_STATE,
    PIECE_VECS,
    SAW_SOME,
    SEE_ALL,
    SEE_SOME,
    STRIPS,
    VECS,
    in_block,
    inlined,
    pieces_of,
    product,
    row_of,
    seen_in_block,
    strip_of,
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
from .visibility import cut

# Nothing less than this changes the largest numbers.
far_enough = per_type(2.0**100, 2.0**960)


@inlined
def score_block(t, begin, scale, score_function, bias, score_mod, mask_mod):
    """The scores of the block of keys that begins at `begin`, -inf where hidden."""
    size = TILE_VECS * lanes(scale)
    for i in range(t.panels * size):
        reals(t.top, scale)[i] = -inf
    for p in range(t.panels):
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        panel[LIVE] = 0
    for strip in range(STRIPS):
        first, last = strip_of(begin, strip, t.first, t.last)
        k, k_row, k_dim = key_rows(t, first, last, scale)
        for p in range(t.panels):
            panel = ints(t.panel + 8 * PANEL_FIELDS * p)
            key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            cut(t, p, strip, key, stop - key, begin, scale, mask_mod)
            for n in range(panel[VECS]):
                piece = ahead(pieces_of(t, p, strip), n * PIECE_FIELDS)
                if piece[PIECE_VECS] > 0:
                    at = k + (piece[PIECE_FIRST] - first) * k_row
                    score(
                        t,
                        p,
                        n,
                        piece,
                        begin,
                        at,
                        k_row,
                        k_dim,
                        scale,
                        score_function,
                        bias,
                        score_mod,
                    )
                    panel[LIVE] |= piece[PIECE_VECS]


@compiled
def score(t, p, n, piece, begin, k, k_row, k_dim, scale, score_function, bias, score_mod):
    """The scores of the piece of panel `p` that begins at vector `n`. A bias or a function may hide
    some of its keys, or all: then it has no vectors left.
    """
    size, lane = TILE_VECS * lanes(scale), n * lanes(scale)
    vecs, state, row = piece[PIECE_VECS], piece[PIECE_STATE], p * size + lane
    key, keys = piece[PIECE_FIRST], piece[PIECE_LAST] - piece[PIECE_FIRST]
    scores = ahead(in_block(t.scores, scale, p, key - begin), lane)
    seen = ahead(seen_in_block(t, scale, p, key - begin), lane)
    biases = reals(t.bias_tile, scale)
    if bias is not None:
        load_bias(t, bias, row, key, vecs, keys, biases, scale)
        if hides_all(biases, vecs, keys, scale):
            piece[PIECE_VECS] = 0
            return
    queries = ahead(reals(t.queries, scale), p * size * t.head_dim + lane)
    if score_function is not None:
        score_keys(t, score_function, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    else:
        block = block_d(vecs, t.head_dim)
        product(vecs, k, k_row, k_dim, keys, t.head_dim, block, queries, scores, np.int64(0))
        if t.again == FAR_SCORES:
            far_scores(t, row, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    if bias is not None:
        state = exclude(biases, vecs, keys, seen, state, scale)
    wild = ahead(reals(t.wild, scale), row)
    if t.softcap > 0 or score_mod is not None:  # which may make a number of what is not finite
        find_wild(vecs, keys, seen, state, scores, wild, scale)
    if t.softcap > 0:
        cap(t.softcap, vecs, keys, scores, scale)
    if bias is not None:
        add_bias(biases, vecs, keys, scores, scale)
    if t.alibi != 0:
        subtract_alibi(t, row, key, vecs, keys, scores, scale)
    if score_mod is not None:
        call_score_mod(t, row, key, vecs, keys, scores, scale, score_mod)
        state = exclude(scores, vecs, keys, seen, state, scale)
    saw, tops = ahead(flags(t.saw), row), ahead(reals(t.top, scale), row)
    if state == SEE_SOME:
        for j in range(keys):
            for i in range(vecs * lanes(scale)):
                saw[i] |= seen[j * size + i]
        hide(vecs, keys, seen, scores, wild, scale)
        take_max(vecs, keys, scores, tops, None, scale)
    else:
        for i in range(vecs * lanes(scale)):
            saw[i] |= SAW_SOME
        take_max(vecs, keys, scores, tops, wild, scale)
    if t.again != 0:
        find_nans(vecs, keys, scores, saw, scale)
    piece[PIECE_STATE] = state


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
    """Where the biases of row `i` of the tile begin: of a relative bias by the place of the row on
    the key axis, which beyond its reach from all keys makes no difference.
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
        for j in range(done, keys):
            at = rows[i] + j * t.bias_dim
            if format == REAL:
                tile[j * size + i] = reals(at, scale)[0]
            else:
                bias = read(at, format, t.bias_swapped)
                tile[j * size + i] = rounded(bias, scale)


@compiled
def exclude(values, vecs, keys, seen, state, scale):
    """Take the keys whose value is -inf out of `seen`. Returns what the piece sees then."""
    size = TILE_VECS * lanes(scale)
    lowest = splat(constant(-inf, scale))
    found = lowest < lowest
    for j in range(keys):
        for n in range(vecs):
            found = found | (load(ahead(values, j * size + n * lanes(scale))) == lowest)
    if not any_lane(found):
        return state
    for j in range(keys):
        for x in range(j * size, j * size + vecs * lanes(scale)):
            seen[x] = (state == SEE_ALL or seen[x] != 0) & (values[x] != -inf)
    return SEE_SOME


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
def find_wild(vecs, keys, seen, state, scores, wild, scale):
    """Make the rows that see a score that is not finite NaN in `wild`."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(wild, n))
        for j in range(keys):
            s = load(ahead(scores, j * size + n))
            if state == SEE_SOME:
                s = choose(load_flags(ahead(seen, j * size + n), s), s, zero)
            some = multiply_add(s, zero, some)
        store(ahead(wild, n), some)


@compiled
def hide(vecs, keys, seen, scores, wild, scale):
    """Make scores that are not seen -inf; NaN for rows that are wild."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    nothing = splat(constant(-inf, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(wild, n))
        for j in range(keys):
            at = ahead(scores, j * size + n)
            s = load(at)
            shown = load_flags(ahead(seen, j * size + n), s)
            some = multiply_add(choose(shown, s, zero), zero, some)
            store(at, choose(shown, s, nothing))
        store(ahead(wild, n), some)


@compiled
def take_max(vecs, keys, scores, tops, wild, scale):
    """The maximum, and, unless `wild` is None, NaN for rows that are."""
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
            if wild is not None:
                some = some + ((a * zero + b * zero) + (c * zero + d * zero))
        store(ahead(tops, n), top)
        if wild is not None:
            store(ahead(wild, n), load(ahead(wild, n)) + some)
