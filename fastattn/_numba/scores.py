"""The scores of a block of keys: the product and the options."""

from __future__ import annotations

from math import inf

import numpy as np

from .exponential import tanh
from .hooks import POSITIVE, for_rows
from .measures import measure_keys
from .memory import (
    ahead,
    doubles,
    flags,
    floats,
    ints,
    load,
    load_flags,
    own_vector,
    reals,
    rows_to_columns,
    store,
)
from .numbers import REAL, finite_most, read, rounded, widen
from .tile import (
    BEGUN,
    FIRST,
    LAST,
    LIVE,
    PANEL_FIELDS,
    SEE_ALL,
    SEE_NONE,
    SEE_SOME,
    STRIPS,
    VECS,
    in_block,
    inlined,
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
    splat,
    with_sign_of,
)
from .visibility import see, trim


@inlined
def score_block(t, begin, scale, measure, score_mod, mask_mod):
    """The scores of the block of keys that begins at `begin`, -inf where unseen."""
    size = TILE_VECS * lanes(scale)
    for i in range(t.panels * size):
        reals(t.top, scale)[i] = -inf
    for p in range(t.panels):
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        panel[LIVE] = panel[BEGUN] = 0
    for strip in range(STRIPS):
        first, last = strip_of(begin, strip, t.first, t.last)
        k = t.k_head + first * t.k_row
        k_row, k_dim = t.k_row, t.k_dim
        if t.kv_format != REAL and first < last:
            widen(k, k_row, k_dim, last - first, t.head_dim, t.kv_format,
                  floats(t.k_scale + 4 * first), reals(t.widened, scale))  # fmt: skip
            k_dim = VECTOR_BYTES // lanes(scale)
            k, k_row = t.widened, t.head_dim * k_dim
        for p in range(t.panels):
            panel = ints(t.panel + 8 * PANEL_FIELDS * p)
            key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            state = see(t, p, key, stop - key, begin, scale, mask_mod)
            if state == SEE_SOME:
                state = trim(t, p, key, stop - key, begin, scale)
                key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            if state != SEE_NONE:
                at = k + (key - first) * k_row
                state = score(t, p, key, stop - key, begin, at, k_row, k_dim, state, scale,
                              measure, score_mod)  # fmt: skip
            ints(t.strip)[p * STRIPS + strip] = state
            if state != SEE_NONE:
                panel[LIVE] = 1


@compiled
def score(t, p, key, keys, begin, k, k_row, k_dim, state, scale, measure, score_mod):
    """One panel's scores for `keys` keys from `key` on, of which it sees what `state` tells.
    Returns what it sees of them.
    """
    size = TILE_VECS * lanes(scale)
    vecs = ints(t.panel + 8 * PANEL_FIELDS * p)[VECS]
    scores, seen = (
        in_block(t.scores, scale, p, key - begin),
        seen_in_block(t, scale, p, key - begin),
    )
    bias = reals(t.bias_tile, scale)
    if t.bias != 0:
        load_bias(t, p, key, keys, bias, scale)
        if hides_all(bias, vecs, keys, scale):
            return SEE_NONE
    queries = ahead(reals(t.queries, scale), p * size * t.head_dim)
    if measure is not None:
        measure_keys(t, measure, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    else:
        product(vecs, k, k_row, k_dim, keys, t.head_dim, queries, scores, 0)
    if t.softcap > 0:
        cap(t.softcap, vecs, keys, scores, scale)
    if t.bias != 0:
        state = exclude(bias, vecs, keys, seen, state, scale)
        add_bias(bias, vecs, keys, scores, scale)
    if t.alibi != 0:
        subtract_alibi(t, p, key, keys, scores, scale)
    if score_mod is not None:
        call_score_mod(t, p, key, keys, vecs, scores, scale, score_mod)
        state = exclude(scores, vecs, keys, seen, state, scale)
    tops, saw = ahead(reals(t.top, scale), p * size), ahead(flags(t.saw), p * size)
    if state == SEE_SOME:
        hide(vecs, keys, seen, scores, scale)
        for j in range(keys):
            for i in range(size):
                saw[i] |= seen[j * size + i]
    else:
        for i in range(size):
            saw[i] = 1
    take_max(vecs, keys, scores, tops, scale)
    return state


@compiled
def call_score_mod(t, p, key, keys, vecs, scores, scale, score_mod):
    """Let the function change the scores."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    batch, head = t.batch, ints(t.row_head)[p * size] % t.heads
    one = own_vector(scale)
    for n in range(0, vecs * width, width):
        query = ints(t.row_query)[p * size] + n
        rows = min(width, t.rows - p * size - n)
        for j in range(keys):
            at = ahead(scores, j * size + n)
            store(one, load(at))
            j_key = (key + j) & POSITIVE
            for_rows(change, query, rows, scale, one, batch, head, j_key, score_mod)
            store(at, load(one))


@compiled
def change(lane, i, scores, batch, head, j, score_mod):
    scores[lane] = score_mod(scores[lane], batch, head, i, j)


@compiled
def cap(softcap, vecs, keys, scores, scale):
    size = TILE_VECS * lanes(scale)
    most, inverse = splat(constant(softcap, scale)), splat(constant(1 / softcap, scale))
    for j in range(keys):
        for n in range(vecs):
            at = ahead(scores, j * size + n * lanes(scale))
            store(at, most * tanh(load(at) * inverse))


@compiled
def load_bias(t, p, key, keys, tile, scale):
    """tile[key][lane] = the bias, whatever its type."""
    size = TILE_VECS * lanes(scale)
    rows = ints(t.words)
    for i in range(size):
        rows[i] = row_of(t, t.bias, t.bias_row, p * size + i) + key * t.bias_dim
    done = 0
    if t.bias_format == REAL and t.bias_dim * lanes(scale) == VECTOR_BYTES:
        done = keys // lanes(scale) * lanes(scale)
        for n in range(0, size, lanes(scale)):
            for j in range(0, done, lanes(scale)):
                rows_to_columns(ahead(rows, n), j * t.bias_dim, ahead(tile, j * size + n))
    for i in range(size):
        for j in range(done, keys):
            at = rows[i] + j * t.bias_dim
            if t.bias_format == REAL:
                tile[j * size + i] = reals(at, scale)[0]
            else:
                bias = read(at, t.bias_format, t.bias_swapped)
                tile[j * size + i] = rounded(bias, scale)


@compiled
def exclude(values, vecs, keys, seen, state, scale):
    """Take the keys whose value is -inf out of `seen`. Returns what the panel sees then."""
    size = TILE_VECS * lanes(scale)
    lowest = splat(constant(-inf, scale))
    found = lowest < lowest
    for j in range(keys):
        for n in range(vecs):
            found = found | (load(ahead(values, j * size + n * lanes(scale))) == lowest)
    if not any_lane(found):
        return state
    for x in range(keys * size):
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
    """Add; a sum of finite numbers that overflows is the largest number still."""
    size = TILE_VECS * lanes(scale)
    most = splat(finite_most(scale))
    for j in range(keys):
        for n in range(vecs):
            at = j * size + n * lanes(scale)
            a, b = load(ahead(scores, at)), load(ahead(bias, at))
            total = a + b
            finite = (magnitude(a) <= most) & (magnitude(b) <= most)
            bound = choose(magnitude(total) > most, with_sign_of(most, total), total)
            store(ahead(scores, at), choose(finite, bound, total))


@compiled
def subtract_alibi(t, p, key, keys, scores, scale):
    size = TILE_VECS * lanes(scale)
    for i in range(size):
        slope = constant(doubles(t.alibi)[ints(t.row_head)[p * size + i] % t.heads], scale)
        place = ints(t.row_query)[p * size + i] + ints(t.q_offset)[t.batch]
        for j in range(keys):
            distance = constant(np.float64(abs(place - key - j)), scale)
            scores[j * size + i] -= slope * distance


@compiled
def hide(vecs, keys, seen, scores, scale):
    size = TILE_VECS * lanes(scale)
    nothing = splat(constant(-inf, scale))
    for j in range(keys):
        for n in range(vecs):
            at = j * size + n * lanes(scale)
            s = load(ahead(scores, at))
            store(ahead(scores, at), choose(load_flags(ahead(seen, at), s), s, nothing))


@compiled
def take_max(vecs, keys, scores, tops, scale):
    size = TILE_VECS * lanes(scale)
    for n in range(vecs):
        top = load(ahead(tops, n * lanes(scale)))
        column = ahead(scores, n * lanes(scale))
        # In pairs of pairs, or the latency of one chain would be the time of the loop.
        for j in range(0, keys, 4):
            a, b = load(ahead(column, j * size)), load(ahead(column, min(j + 1, keys - 1) * size))
            c = load(ahead(column, min(j + 2, keys - 1) * size))
            d = load(ahead(column, min(j + 3, keys - 1) * size))
            top = larger(larger(larger(a, b), larger(c, d)), top)
        store(ahead(tops, n * lanes(scale)), top)
