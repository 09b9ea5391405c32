"""The kernel of a tile: the queries that share one pass over the keys.

As in ``csrc/tile.c``, queries lie in the lanes of vectors: keys and values are read as they stand,
one element broadcast to all queries at a time, and softmax has no horizontal step. A panel is what
one register tile holds. Within a block of keys S^T = K Q^T, the weights P^T = exp(S^T - max) and
O^T = V^T P^T follow each other as in FlashAttention (Dao et al. 2022, algorithm 1), except that the
maximum is that of the whole block and O^T is rescaled once per block.

A tile is one record, `TILE`: plain numbers and addresses, so that one compilation serves arrays of
any layout. The functions take it as `t`; `scale` comes with it because its type is that of the
numbers. `score_mod` and `mask_mod` are the functions of `fastattn.flex`, or None.
"""

from __future__ import annotations

from math import inf, log, nan

import numpy as np
from numba import from_dtype, njit

from .. import blockmask
from .exponential import WEIGHT_UNIT, exp, tanh, weight_of
from .numbers import REAL, finite_most, read, rounded, widen
from .vectors import (
    TILE_ROWS,
    TILE_VECS,
    VECTOR_BYTES,
    ahead,
    any_lane,
    choose,
    compiled,
    columns_to_rows,
    constant,
    doubles,
    flags,
    ints,
    lanes,
    larger,
    load,
    load_flags,
    load_unaligned,
    magnitude,
    multiply_add,
    nonzero_bytes,
    reals,
    record_of,
    register_tile,
    rows_to_columns,
    splat,
    store,
    uint64s,
    widest_vectors,
    with_sign_of,
)

__all__ = ["BLOCK_KEYS", "TILE", "TILE_BYTES", "attend", "scratch"]

# Queries in a tile, as bytes of one row: a whole number of panels for every instruction set. Twice
# as many as fill the widest registers, because each tile reads all of K and V.
TILE_BYTES = 384
PANEL_BYTES = TILE_VECS * VECTOR_BYTES

# Keys whose scores are summed from zero before they join the running sum. One run over all keys
# would have 3 to 25 times NumPy's rounding error; blocks of 128 make too many partial sums.
BLOCK_KEYS = 512
# Keys whose weights stay in the first-level cache between the softmax and the second product.
STRIP_KEYS = blockmask.BLOCK_KEYS
STRIPS = BLOCK_KEYS // STRIP_KEYS

# What a panel sees of a strip, and anybody of a block of a block mask, whose keys are a strip.
SEE_NONE, SEE_SOME, SEE_ALL = blockmask.NONE, blockmask.SOME, blockmask.ALL
MASK_QUERIES = blockmask.BLOCK_QUERIES

# Arrays, by the address of a table of where each head's rows begin and by strides in bytes; a table
# of 0 stands for an array that was not given.
ARRAYS = ("q", "k", "v", "out", "start", "stop", "bias", "mask", "weights", "lse", "blocks")
NUMBERS = (
    # The problem. A tile holds the rows of `fold` query heads that read one key head.
    "heads", "kv_heads", "group", "fold", "n_queries", "n_keys", "head_dim", "value_dim",
    "format",  # of q, k and v: see `numbers`
    "bias_format", "bias_swapped", "alibi", "sinks", "q_offset",
    # The tile, set by `open_tile`: its rows, panels, batch entry and the keys that somebody sees.
    "tile_rows", "tiles", "rows", "panels", "batch", "k_head", "v_head", "first", "last",
    # Per row: its query, the index of its head in the tables, and the keys start <= j < stop.
    "row_query", "row_head", "row_start", "row_stop",
    # Of the panel at hand, a word per lane: the keys of a strip as bits, or addresses.
    "words",
    # Per panel PANEL_FIELDS integers, and what it sees of each strip of the block.
    "panel", "strip",
    # The scratch, [panel][row][lane] throughout, so that a panel is contiguous.
    "row_max", "row_sum", "top", "rescale", "block_sum", "saw",
    "queries", "total", "block_total", "scores", "bias_tile", "seen", "widened",
)  # fmt: skip
TILE = np.dtype(
    [(name, np.int64) for name in NUMBERS]
    + [(name + part, np.int64) for name in ARRAYS for part in ("", "_row", "_dim")]
    + [("softcap", np.float64), ("margin", np.float64)]
)
tile_at = record_of(from_dtype(TILE))

# What is to be done with a tile. A margin is added to the maximum that weights are relative to where
# the weighted sum of huge values would overflow; without, the largest weight is exact.
ATTEND, ATTEND_WITH_MARGIN, WEIGH, DONE = range(4)

# Some row of the panel sees first <= j < last, every row inner_first <= j < inner_last.
FIRST, LAST, INNER_FIRST, INNER_LAST, VECS, STARTED, LIVE, BEGUN = range(8)
PANEL_FIELDS = 8

narrow_tile, whole_tile = register_tile(1), register_tile(TILE_VECS)

# Numba optimises a function anew, with all that it calls, for every function that calls it: what has
# one caller and calls much is made part of that.
inlined = njit(error_model="numpy", inline="always")


def scratch(itemsize: int, head_dim: int, value_dim: int) -> dict[str, int]:
    """The bytes that each part of a tile's scratch takes."""
    rows = TILE_BYTES // itemsize
    panels = TILE_BYTES // PANEL_BYTES
    whole = {"row_query": rows, "row_head": rows, "row_start": rows, "row_stop": rows,
             "words": rows, "panel": panels * PANEL_FIELDS, "strip": panels * STRIPS}  # fmt: skip
    per_row = {"row_max": 1, "row_sum": 1, "top": 1, "rescale": 1, "block_sum": 1,
               "queries": head_dim, "total": value_dim, "block_total": value_dim,
               "scores": BLOCK_KEYS, "bias_tile": STRIP_KEYS}  # fmt: skip
    sizes = {name: 8 * n for name, n in whole.items()}
    sizes |= {name: TILE_BYTES * n for name, n in per_row.items()}
    sizes["saw"] = rows
    sizes["seen"] = rows * BLOCK_KEYS
    sizes["widened"] = 4 * STRIP_KEYS * max(head_dim, value_dim)
    return sizes


# ------------------------------------------------------------------------------- the walk


@inlined
def attend(address, begin, end, scale, score_mod, mask_mod):
    """Attend from the queries of the tiles begin <= item < end."""
    t = tile_at(address)
    for item in range(begin, end):
        open_tile(t, item, scale)
        step = ATTEND
        while step != DONE:
            if step != WEIGH:
                start_rows(t, scale)
            for block in range(t.first // BLOCK_KEYS * BLOCK_KEYS, t.last, BLOCK_KEYS):
                score_block(t, block, scale, score_mod, mask_mod)
                if step == WEIGH:
                    store_weights(t, block, scale)
                else:
                    attend_block(t, block, scale)
            step = finish(t, step, scale)


@compiled
def open_tile(t, item, scale):
    """Point the tile at its rows and at the keys that they read."""
    # The last queries first: under a causal mask they have the most to do, and a run that ends in
    # small pieces leaves no thread waiting for another.
    first = (t.tiles - 1 - item % t.tiles) * t.tile_rows
    head = item // t.tiles * t.fold
    t.batch = head // t.heads
    t.margin = 0.0
    t.rows = min(t.tile_rows, t.fold * t.n_queries - first)
    key_head = t.batch * t.kv_heads + head % t.heads // t.group
    t.k_head = ints(t.k)[key_head]
    t.v_head = ints(t.v)[key_head]
    size = TILE_VECS * lanes(scale)
    t.panels = (t.rows + size - 1) // size
    queries, heads = ints(t.row_query), ints(t.row_head)
    starts, stops = ints(t.row_start), ints(t.row_stop)
    for i in range(t.panels * size):
        # The heads of a group lie side by side, so that a tile's queries are neighbours in
        # position. A lane without a row repeats the last one.
        row = first + min(i, t.rows - 1)
        queries[i] = row // t.fold
        heads[i] = head + row % t.fold
        starts[i] = 0
        stops[i] = t.n_keys
        if t.start != 0:
            starts[i] = ints(row_of(t, t.start, t.start_row, i))[0]
            stops[i] = ints(row_of(t, t.stop, t.stop_row, i))[0]
    bound_panels(t, scale)


@compiled
def row_of(t, table, stride, i):
    """Where row `i` of the tile begins in an array, by its table and the stride of its rows."""
    return ints(table)[ints(t.row_head)[i]] + ints(t.row_query)[i] * stride


@compiled
def bound_panels(t, scale):
    """Find the keys that some row and that every row of each panel sees."""
    starts, stops = ints(t.row_start), ints(t.row_stop)
    size = TILE_VECS * lanes(scale)
    t.first, t.last = t.n_keys, 0
    for p in range(t.panels):
        first, last, inner_first, inner_last = t.n_keys, 0, 0, t.n_keys
        for i in range(p * size, (p + 1) * size):
            if starts[i] < stops[i]:
                first = min(first, starts[i])
                last = max(last, stops[i])
            inner_first = max(inner_first, starts[i])
            inner_last = min(inner_last, stops[i])
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        panel[FIRST], panel[LAST] = first, last
        panel[INNER_FIRST], panel[INNER_LAST] = inner_first, inner_last
        # One vector for the few queries of a decoding step, else all: other numbers of them would
        # be more code to compile.
        panel[VECS] = 1 if t.rows - p * size <= lanes(scale) else TILE_VECS
        t.first = min(t.first, first)
        t.last = max(t.last, last)


@compiled
def start_rows(t, scale):
    """Load the queries; a row starts with its sink, a score without a value, or with nothing."""
    size = TILE_VECS * lanes(scale)
    tops, sums, saw = reals(t.row_max, scale), reals(t.row_sum, scale), flags(t.saw)
    for i in range(t.panels * size):
        sink = -inf
        if t.sinks != 0:
            sink = doubles(t.sinks)[ints(t.row_head)[i] % t.heads]
        tops[i] = sink + t.margin
        sums[i] = 0.0
        if sink == inf:
            sums[i] = 1.0
        elif sink != -inf:
            sums[i] = WEIGHT_UNIT * exp(sink - (sink + t.margin))
        saw[i] = 0
    for p in range(t.panels):
        ints(t.panel + 8 * PANEL_FIELDS * p)[STARTED] = 0
        load_queries(t, p, ahead(reals(t.queries, scale), p * size * t.head_dim), scale)


@compiled
def load_queries(t, p, columns, scale):
    """columns[d][lane] = scale * q."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    rows, done = ints(t.words), 0
    for i in range(size):
        rows[i] = row_of(t, t.q, t.q_row, p * size + i)
    if t.format == REAL and t.q_dim * width == VECTOR_BYTES:
        done = t.head_dim // width * width
        for n in range(0, size, width):
            for d in range(0, done, width):
                rows_to_columns(ahead(rows, n), d * t.q_dim, ahead(columns, d * size + n))
    for i in range(size):
        q, step = rows[i], t.q_dim
        if t.format != REAL:
            widen(q, 0, step, 1, t.head_dim, t.format, reals(t.widened, scale))
            q, step = t.widened, 4
        for d in range(done, t.head_dim):
            columns[d * size + i] = reals(q + d * step, scale)[0]
    for x in range(0, t.head_dim * size, width):
        store(ahead(columns, x), load(ahead(columns, x)) * splat(scale))


# ------------------------------------------------------------------------------ the scores


@inlined
def score_block(t, begin, scale, score_mod, mask_mod):
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
        if t.format != REAL and first < last:
            widen(k, k_row, k_dim, last - first, t.head_dim, t.format, reals(t.widened, scale))
            k, k_row, k_dim = t.widened, 4 * t.head_dim, 4
        for p in range(t.panels):
            panel = ints(t.panel + 8 * PANEL_FIELDS * p)
            key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            state = SEE_NONE
            if key < stop:
                at = k + (key - first) * k_row
                state = score(t, p, key, stop - key, begin, at, k_row, k_dim, scale, score_mod,
                              mask_mod)  # fmt: skip
            ints(t.strip)[p * STRIPS + strip] = state
            if state != SEE_NONE:
                panel[LIVE] = 1


@compiled
def strip_of(begin, strip, first, last):
    """The keys of a strip of the block that lie in first <= j < last."""
    key = begin + strip * STRIP_KEYS
    return max(key, first), min(key + STRIP_KEYS, last)


@compiled
def in_block(address, like, p, row):
    """Row `row` of panel `p` in an array of [panel][BLOCK_KEYS][lane]."""
    return ahead(reals(address, like), (p * BLOCK_KEYS + row) * TILE_VECS * lanes(like))


@compiled
def seen_in_block(t, like, p, row):
    return ahead(flags(t.seen), (p * BLOCK_KEYS + row) * TILE_VECS * lanes(like))


@compiled
def score(t, p, key, keys, begin, k, k_row, k_dim, scale, score_mod, mask_mod):
    """One panel's scores for `keys` keys from `key` on. Returns what it sees of them."""
    size = TILE_VECS * lanes(scale)
    panel = ints(t.panel + 8 * PANEL_FIELDS * p)
    vecs = panel[VECS]
    scores, seen = in_block(t.scores, scale, p, key - begin), seen_in_block(t, scale, p, key - begin)
    state = SEE_ALL
    inside = panel[INNER_FIRST] <= key and key + keys <= panel[INNER_LAST]
    if not inside or t.mask != 0:
        state = look(t, p, key, keys, seen, scale)
    if mask_mod is not None and state != SEE_NONE:
        state = call_mask_mod(t, p, key, keys, seen, state, scale, mask_mod)
    if state == SEE_NONE:
        return state
    queries = ahead(reals(t.queries, scale), p * size * t.head_dim)
    product(vecs, k, k_row, k_dim, keys, t.head_dim, queries, scores, 0)
    if t.softcap > 0:
        cap(t.softcap, vecs, keys, scores, scale)
    if t.bias != 0:
        tile = reals(t.bias_tile, scale)
        load_bias(t, p, key, keys, tile, scale)
        state = exclude(tile, vecs, keys, seen, state, scale)
        add_bias(tile, vecs, keys, scores, scale)
    if t.alibi != 0:
        subtract_alibi(t, p, key, keys, scores, scale)
    if score_mod is not None:
        head, query = ints(t.row_head)[p * size] % t.heads, ints(t.row_query)[p * size]
        rows = min(size, t.rows - p * size)
        widest_vectors()
        for j in range(keys):
            row = ahead(scores, j * size)
            for i in range(rows):
                row[i] = score_mod(row[i], t.batch, head, query + i, key + j)
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
def product(vecs, a, a_row, a_step, rows, steps, b, c, accumulate):
    """The register tile over any number of rows."""
    size = TILE_VECS * lanes(c[0])
    accumulate = accumulate != 0
    for row in range(0, rows, TILE_ROWS):
        count, to = min(rows - row, TILE_ROWS), ahead(c, row * size)
        at = a + row * a_row
        if vecs == 1:
            narrow_tile(at, a_row, a_step, count, steps, b, to, accumulate)
        else:
            whole_tile(at, a_row, a_step, count, steps, b, to, accumulate)


@compiled
def look(t, p, key, keys, seen, scale):
    """What the panel sees by intervals and mask; where that is some keys, set seen[key][lane]."""
    size = TILE_VECS * lanes(scale)
    words = uint64s(t.words)
    every, any_bit = first_bits(keys), np.uint64(0)
    common, masked, masked_row = every, every, 0
    for i in range(size):
        row = p * size + i
        start, stop = ints(t.row_start)[row] - key, ints(t.row_stop)[row] - key
        bits = first_bits(stop) & ~first_bits(start) & every
        if t.mask != 0:
            at = row_of(t, t.mask, t.mask_row, row) + key * t.mask_dim
            if at != masked_row:
                masked_row, masked = at, mask_bits(at, t.mask_dim, keys)
            bits &= masked
        words[i] = bits
        any_bit |= bits
        common &= bits
    if any_bit == 0:
        return SEE_NONE
    if common == every:
        return SEE_ALL
    for j in range(keys):
        for i in range(size):
            seen[j * size + i] = (words[i] >> np.uint64(j)) & np.uint64(1)
    return SEE_SOME


@compiled
def first_bits(count):
    if count <= 0:
        return np.uint64(0)
    return ~np.uint64(0) if count >= 64 else (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@compiled
def mask_bits(at, stride, keys):
    """Bit j: does a row of the mask show key j?"""
    if stride == 1 and keys == 64:
        return nonzero_bytes(at)
    bits = np.uint64(0)
    for j in range(keys):
        bits |= np.uint64(flags(at)[j * stride] != 0) << np.uint64(j)
    return bits


@compiled
def call_mask_mod(t, p, key, keys, seen, state, scale, mask_mod):
    """Take the keys that the function hides out of `seen`. Returns what the panel sees then."""
    size = TILE_VECS * lanes(scale)
    head, query = ints(t.row_head)[p * size] % t.heads, ints(t.row_query)[p * size]
    rows = min(size, t.rows - p * size)
    widest_vectors()
    some = t.blocks == 0  # is there a block to ask about?
    none, every = not some, not some
    first, last = query // MASK_QUERIES, (query + rows - 1) // MASK_QUERIES
    column = 0
    if t.blocks != 0:
        column = ints(t.blocks)[ints(t.row_head)[p * size]] + key // STRIP_KEYS * t.blocks_dim
        for row in range(first, last + 1):
            block = flags(column + row * t.blocks_row)[0]
            none &= block == SEE_NONE
            every &= block == SEE_ALL
    if none or every:
        return SEE_NONE if none else state
    if state == SEE_ALL:
        for x in range(keys * size):
            seen[x] = 1
    for row in range(first, last + 1):
        begin = max(row * MASK_QUERIES - query, 0)
        end = min((row + 1) * MASK_QUERIES - query, rows)
        block = SEE_SOME if some else flags(column + row * t.blocks_row)[0]
        for j in range(keys):
            at = ahead(seen, j * size)
            if block == SEE_NONE:
                for i in range(begin, end):
                    at[i] = 0
            elif block == SEE_SOME:
                for i in range(begin, end):
                    at[i] &= np.uint8(bool(mask_mod(t.batch, head, query + i, key + j)))
    count = 0
    for j in range(keys):
        for i in range(rows):
            count += seen[j * size + i]
    return SEE_NONE if count == 0 else SEE_ALL if count == keys * rows else SEE_SOME


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


# ----------------------------------------------------------------------------- the values


@inlined
def attend_block(t, begin, scale):
    """Weigh the scores of the block and add its values to the rows' totals."""
    size = TILE_VECS * lanes(scale)
    for p in range(t.panels):
        if ints(t.panel + 8 * PANEL_FIELDS * p)[LIVE]:
            raise_max(t, p, scale)
    for strip in range(STRIPS):
        first, last = strip_of(begin, strip, t.first, t.last)
        v = t.v_head + first * t.v_row
        v_row, v_dim = t.v_row, t.v_dim
        if t.format != REAL and first < last:
            widen(v, v_row, v_dim, last - first, t.value_dim, t.format, reals(t.widened, scale))
            v, v_row, v_dim = t.widened, 4 * t.value_dim, 4
        for p in range(t.panels):
            state = ints(t.strip)[p * STRIPS + strip]
            if state == SEE_NONE:
                continue
            panel = ints(t.panel + 8 * PANEL_FIELDS * p)
            key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            weights = in_block(t.scores, scale, p, key - begin)
            weigh(t, p, panel[VECS], stop - key, weights, scale)
            total = reals(t.block_total if panel[STARTED] else t.total, scale)
            seen = seen_in_block(t, scale, p, key - begin)
            at, total = v + (key - first) * v_row, ahead(total, p * size * t.value_dim)
            begun = panel[BEGUN]
            panel[BEGUN] = 1
            if state == SEE_SOME and not all_finite(t, at, v_row, v_dim, stop - key, scale):
                add_seen(t, at, v_row, v_dim, stop - key, seen, weights, total, begun, scale)
            else:
                product(panel[VECS], at, v_dim, v_row, t.value_dim, stop - key, weights, total,
                        begun)  # fmt: skip
    for p in range(t.panels):
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        if panel[LIVE]:
            join_block(t, p, panel[VECS], panel[STARTED], scale)
            panel[STARTED] = 1


@compiled
def raise_max(t, p, scale):
    """Take the block's maximum into that of the rows; how much smaller old weights become."""
    size = TILE_VECS * lanes(scale)
    one, zero = splat(constant(1.0, scale)), splat(constant(0.0, scale))
    nothing, margin = splat(constant(-inf, scale)), splat(constant(t.margin, scale))
    unit = splat(constant(1 / WEIGHT_UNIT, scale))
    for n in range(TILE_VECS):
        at = p * size + n * lanes(scale)
        top, row_max = ahead(reals(t.top, scale), at), ahead(reals(t.row_max, scale), at)
        before = load(row_max)
        now = larger(before, load(top) + margin)
        store(row_max, now)
        # While a row has seen nothing its maximum is -inf; any finite one will do.
        shift = choose(now == nothing, zero, now)
        store(top, shift)
        # An unchanged maximum may be an infinite sink.
        rescale = choose(before == now, one, weight_of(before - shift) * unit)
        store(ahead(reals(t.rescale, scale), at), rescale)
        store(ahead(reals(t.block_sum, scale), at), zero)


@compiled
def weigh(t, p, vecs, keys, scores, scale):
    """Scores to weights relative to the maximum. Subtracting before scaling by log2(e) keeps the
    largest weight exact and every finite score from overflowing.
    """
    size = TILE_VECS * lanes(scale)
    for n in range(vecs):
        at = p * size + n * lanes(scale)
        top, total = load(ahead(reals(t.top, scale), at)), load(ahead(reals(t.block_sum, scale), at))
        for j in range(keys):
            s = ahead(scores, j * size + n * lanes(scale))
            weight = weight_of(load(s) - top)
            store(s, weight)
            total = total + weight
        store(ahead(reals(t.block_sum, scale), at), total)


@compiled
def all_finite(t, v, v_row, v_dim, keys, scale):
    """Is each value of these keys finite? x - x is a NaN where x is not."""
    zero, done, rest = splat(constant(0.0, scale)), 0, False
    wild = zero < zero
    if v_dim * lanes(scale) == VECTOR_BYTES:
        done = t.value_dim // lanes(scale) * lanes(scale)
    for j in range(keys):
        row = v + j * v_row
        for d in range(0, done, lanes(scale)):
            x = load_unaligned(reals(row + d * v_dim, scale))
            wild = wild | (x - x != zero)
        for d in range(done, t.value_dim):
            x = reals(row + d * v_dim, scale)[0]
            rest |= x - x != 0
    return not (rest or any_lane(wild))


@compiled
def add_seen(t, v, v_row, v_dim, keys, seen, weights, total, begun, scale):
    """The second product where some row must not meet a NaN or an Inf in some v that it does not
    see: 0 * NaN is a NaN, so unseen keys are left out lane by lane.
    """
    size = TILE_VECS * lanes(scale)
    for d in range(t.value_dim):
        out = ahead(total, d * size)
        for i in range(size):
            value = out[i] if begun else constant(0.0, scale)
            for j in range(keys):
                if seen[j * size + i]:
                    x = reals(v + j * v_row + d * v_dim, scale)[0]
                    value = multiply_add(x, weights[j * size + i], value)
            out[i] = value


@compiled
def join_block(t, p, vecs, started, scale):
    """Add the block's sums to the rows'."""
    size = TILE_VECS * lanes(scale)
    for n in range(vecs):
        at = p * size + n * lanes(scale)
        rescale = load(ahead(reals(t.rescale, scale), at))
        row_sum = ahead(reals(t.row_sum, scale), at)
        store(row_sum, load(row_sum) * rescale + load(ahead(reals(t.block_sum, scale), at)))
        if started:  # or the block's total is the total already
            at = p * size * t.value_dim + n * lanes(scale)
            total, block = reals(t.total, scale), reals(t.block_total, scale)
            for d in range(at, at + t.value_dim * size, size):
                sums = load(ahead(total, d)) * rescale + load(ahead(block, d))
                store(ahead(total, d), sums)


# ---------------------------------------------------------------------------- the results


@compiled
def finish(t, step, scale):
    """Deliver the rows' results. Returns the step to take next."""
    if step == WEIGH:
        return DONE
    if step == ATTEND and overflowed(t, scale):
        t.margin = log(2 * t.n_keys * WEIGHT_UNIT)
        return ATTEND_WITH_MARGIN
    store_rows(t, scale)
    return WEIGH if t.weights != 0 else DONE


@compiled
def overflowed(t, scale):
    """Is some sum of values not finite although the sum of its weights is?"""
    size = TILE_VECS * lanes(scale)
    most, zero = splat(finite_most(scale)), splat(constant(0.0, scale))
    wrong = zero < zero
    for p in range(t.panels):
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        for n in range(panel[VECS] if panel[STARTED] else 0):
            at = p * size + n * lanes(scale)
            column = ahead(reals(t.total, scale), p * size * t.value_dim + n * lanes(scale))
            some = zero  # x * 0 is a NaN where x is not finite, and so is every sum with it
            for d in range(t.value_dim):
                some = some + load(ahead(column, d * size)) * zero
            finite = magnitude(load(ahead(reals(t.row_sum, scale), at))) <= most
            wrong = wrong | (finite & (some != zero))
    return any_lane(wrong)


@compiled
def store_rows(t, scale):
    """Write the rows' results."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    tops, sums = reals(t.row_max, scale), reals(t.row_sum, scale)
    for p in range(t.panels):
        for n in range(0, size, width):
            divide(t, p, n, scale)
        store_panel(t, p, ahead(reals(t.total, scale), p * size * t.value_dim), scale)
    for i in range(t.rows if t.lse != 0 else 0):
        # log(NaN) where the top is Inf: Inf - Inf was weighed
        top = np.float64(tops[i])
        lse = top if top == inf else top + log(np.float64(sums[i]) / WEIGHT_UNIT)
        doubles(row_of(t, t.lse, t.lse_row, i))[0] = lse


@compiled
def divide(t, p, n, scale):
    """Weighted sums to means; 0 where a row saw nothing, whatever is in its column."""
    size = TILE_VECS * lanes(scale)
    zero, one = splat(constant(0.0, scale)), splat(constant(1.0, scale))
    sums = load(ahead(reals(t.row_sum, scale), p * size + n))
    # A sum of 0 with a key in sight: all scores are -inf, 0 / 0 as the formula says.
    share = choose(sums == zero, splat(constant(nan, scale)), one / sums)
    saw = load_flags(ahead(flags(t.saw), p * size + n), sums)
    column = ahead(reals(t.total, scale), p * size * t.value_dim + n)
    for d in range(t.value_dim):
        at = ahead(column, d * size)
        store(at, choose(saw, load(at) * share, zero))


@compiled
def store_panel(t, p, columns, scale):
    """out = columns[d][lane]."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    rows, done = ints(t.words), 0
    for i in range(size):
        rows[i] = row_of(t, t.out, t.out_row, p * size + i)
    if t.out_dim * width == VECTOR_BYTES and t.rows >= (p + 1) * size:
        done = t.value_dim // width * width
        for n in range(0, size, width):
            for d in range(0, done, width):
                columns_to_rows(ahead(rows, n), d * t.out_dim, ahead(columns, d * size + n))
    for i in range(min(size, t.rows - p * size)):
        for d in range(done, t.value_dim):
            reals(rows[i] + d * t.out_dim, scale)[0] = columns[d * size + i]


@compiled
def store_weights(t, begin, scale):
    """The weights of a block, from its scores and the rows' sums; unseen ones are 0 already."""
    size = TILE_VECS * lanes(scale)
    tops, sums = reals(t.row_max, scale), reals(t.row_sum, scale)
    for i in range(t.rows):
        p, lane = i // size, i % size
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        top = constant(0.0, scale) if tops[i] == -inf else tops[i]
        target = row_of(t, t.weights, t.weights_row, i)
        for strip in range(STRIPS):
            state = ints(t.strip)[p * STRIPS + strip]
            key, stop = strip_of(begin, strip, panel[FIRST], panel[LAST])
            if state == SEE_NONE:
                continue
            scores = ahead(in_block(t.scores, scale, p, key - begin), lane)
            seen = ahead(seen_in_block(t, scale, p, key - begin), lane)
            for j in range(stop - key):
                if state == SEE_ALL or seen[j * size]:
                    weight = weight_of(scores[j * size] - top) / sums[i]
                    reals(target + (key + j) * t.weights_dim, scale)[0] = weight
