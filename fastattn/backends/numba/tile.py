"""The kernel of a tile: the queries that share one pass over the keys.

As in ``csrc/tile.c``, queries lie in the lanes of vectors: keys and values are read as they stand,
one element broadcast to all queries at a time, and softmax has no horizontal step. A panel is what
one register tile holds. Within a block of keys S^T = K Q^T, the weights P^T = exp(S^T - max) and
O^T = V^T P^T follow each other as in FlashAttention (Dao et al. 2022, algorithm 1), except that the
maximum is that of the whole block and O^T is rescaled once per block.

A tile is one record, `TILE`: plain numbers and addresses, so that one compilation serves arrays of
any layout. The functions take it as `t`; `scale` comes with it because its type is that of the
numbers. `score_function` is None or its number, `bias` None or the format of the bias, and
`score_mod` and `mask_mod` are the functions of `fastattn.flex`, or None: what is None in all calls
of a process is never compiled. A literal argument is a type of its own, and would be another
version of a function to compile: hence ``np.int64(0)``.
"""

from __future__ import annotations

from math import inf

import numpy as np
from numba import from_dtype, njit

from ...core import block_mask
from .exponential import WEIGHT_UNIT
from .memory import (
    ahead,
    doubles,
    flags,
    floats,
    ints,
    load,
    own_vector,
    reals,
    record_of,
    rows_to_columns,
    store,
)
from .numbers import REAL, widen
from .register_tile import register_tile
from .vectors import TILE_ROWS, TILE_VECS, VECTOR_BYTES, choose, compiled, constant, lanes, splat

# Queries in a tile, as bytes of one row: a whole number of panels for every instruction set. Twice
# as many as fill the widest registers, because each tile reads all of K and V.
TILE_BYTES = 384
PANEL_BYTES = TILE_VECS * VECTOR_BYTES

# Keys whose scores are summed from zero before they join the running sum. One run over all keys
# would have 3 to 25 times NumPy's rounding error; blocks of 128 make too many partial sums.
BLOCK_KEYS = 512
# Keys whose weights stay in the first-level cache between the softmax and the second product.
STRIP_KEYS = block_mask.BLOCK_KEYS
STRIPS = BLOCK_KEYS // STRIP_KEYS

# Head dims whose products are summed from zero before they are added to the score, at least. NumPy
# gives few queries a matmul that keeps many partial sums, and one vector of queries has the time
# for as many.
BLOCK_D_ONE_VECTOR, BLOCK_D = 16, 32

# What a panel sees of a strip, and anybody of a block of a block mask, whose keys are a strip.
SEE_NONE, SEE_SOME, SEE_ALL = block_mask.NONE, block_mask.SOME, block_mask.ALL
MASK_QUERIES = block_mask.BLOCK_QUERIES

# Arrays, by the address of a table of where each head's rows begin and by strides in bytes; a table
# of 0 stands for an array that was not given.
ARRAYS = ("q", "k", "v", "k_scales", "v_scales", "out", "start", "stop", "position", "bias",
          "mask", "weights", "lse", "max_result", "blocks")  # fmt: skip
NUMBERS = (
    # The problem. A tile holds the rows of `fold` query heads that read one key head.
    "heads", "kv_heads", "group", "fold", "n_queries", "n_keys", "head_dim", "value_dim",
    "q_format", "k_format", "v_format", "out_format",  # see `numbers`
    "bias_swapped", "scales", "alibi", "sinks",
    "reach",  # of a relative bias, -1 without one
    "additive_weights",  # see `score_functions`
    # The tile, set by `open_tile`: its rows, panels, batch entry and the visible keys.
    "tile_rows", "tiles", "rows", "panels", "batch", "first", "last",
    "again",  # how a tile is solved another time, see below
    # Where the keys, the values and the scales of int8 ones begin.
    "k_head", "v_head", "k_scale", "v_scale",
    # Of keys in pages the table, (batch, table_pages), that of the tile's batch entry, the keys of
    # a page, and how many bytes apart pages are; a table of 0 stands for no pages.
    "block_table", "table_pages", "own_pages", "page",
    "k_page", "v_page", "k_scales_page", "v_scales_page",
    # Dropout: its seed, where in a whole the call starts, and the number below which one drops its
    # weight; per row the key of its head and its query, as words, and room for words.
    "drop_seed", "drop_entry", "drop_head", "drop_query", "drop_key", "drop_threshold",
    "drop_rows", "drop_words",
    # Per row: its query, the index of its head in the tables, and the keys start <= j < stop.
    "row_query", "row_head", "row_start", "row_stop",
    # Of the panel at hand, a word per lane: the keys of a strip as bits, or addresses.
    "words",
    # Per panel PANEL_FIELDS integers, and its pieces of each strip of the block.
    "panel", "pieces",
    # The scratch, [panel][row][lane] throughout, so that a panel is contiguous.
    "row_max", "row_sum", "max_score", "top", "rescale", "block_sum", "saw", "wild",
    "queries", "total", "block_total", "scores", "bias_tile", "seen", "widened",
)  # fmt: skip
TILE = np.dtype(
    [(name, np.int64) for name in NUMBERS]
    + [(name + part, np.int64) for name in ARRAYS for part in ("", "_row", "_dim")]
    + [(name, np.float64) for name in ("scale", "softcap", "measure_scale", "unit", "keep_factor")]
)
tile_at = record_of(from_dtype(TILE))

# What is to be done with a tile.
ATTEND, ATTEND_AGAIN, WEIGH, DONE = range(4)
# A tile is solved another time where finite numbers gave sums that are not: its weights are small
# then when they meet the values, and, where that is needed, the scores of rows that are wild, which
# have seen one that is not finite, are sums of doubles. All other scores and weights stay the same
# to the bit, and so do results that are finite.
SMALL_WEIGHTS, FAR_SCORES = 1, 2
# A row has seen nothing (0), something, or, which is found then, a score that is a NaN.
SAW_SOME, SAW_NAN = 1, 2

# Some row of the panel sees first <= j < last, every row inner_first <= j < inner_last.
FIRST, LAST, INNER_FIRST, INNER_LAST, VECS, STARTED, LIVE = range(7)
PANEL_FIELDS = 7
# A piece is what is computed of a panel and a strip at once: so many vectors (0: nothing) and the
# keys first <= j < last; its state says whether all its rows see all of them. There is one piece
# for the whole panel, or one for each vector.
PIECE_VECS, PIECE_FIRST, PIECE_LAST, PIECE_STATE = range(4)
PIECE_FIELDS = 4

narrow_tile, whole_tile = register_tile(1), register_tile(TILE_VECS)

# Numba optimises a function anew, with all that it calls, for every function that calls it: what
# has one caller and calls much is made part of that.
inlined = njit(error_model="numpy", inline="always")


def scratch(itemsize: int, head_dim: int, value_dim: int) -> dict[str, int]:
    """The bytes that each part of a tile's scratch takes."""
    rows = TILE_BYTES // itemsize
    panels = TILE_BYTES // PANEL_BYTES
    whole = {"row_query": rows, "row_head": rows, "row_start": rows, "row_stop": rows,
             "drop_rows": 4 * rows, "drop_words": 4 * rows,
             "words": rows, "panel": panels * PANEL_FIELDS,
             "pieces": panels * STRIPS * TILE_VECS * PIECE_FIELDS}  # fmt: skip
    per_row = {"row_max": 1, "row_sum": 1, "max_score": 1, "top": 1, "rescale": 1,
               "block_sum": 1, "wild": 1,
               "queries": head_dim, "total": value_dim, "block_total": value_dim,
               "scores": BLOCK_KEYS, "bias_tile": STRIP_KEYS}  # fmt: skip
    sizes = {name: 8 * n for name, n in whole.items()}
    sizes |= {name: TILE_BYTES * n for name, n in per_row.items()}
    sizes["saw"] = rows
    sizes["seen"] = rows * BLOCK_KEYS
    sizes["widened"] = itemsize * STRIP_KEYS * max(head_dim, value_dim)
    return sizes


@compiled
def open_tile(t, item, scale, mask_mod):
    """Point the tile at its rows and at the keys that they read."""
    # The last queries first: under a causal mask they have the most to do, and a run that ends in
    # small pieces leaves no thread waiting for another.
    first = (t.tiles - 1 - item % t.tiles) * t.tile_rows
    head = item // t.tiles * t.fold
    t.batch = head // t.heads
    t.again, t.unit = 0, 1.0
    t.rows = min(t.tile_rows, t.fold * t.n_queries - first)
    key_head = t.batch * t.kv_heads + head % t.heads // t.group
    t.k_head = ints(t.k)[key_head]
    t.v_head = ints(t.v)[key_head]
    if t.k_scales != 0:
        t.k_scale, t.v_scale = ints(t.k_scales)[key_head], ints(t.v_scales)[key_head]
    if t.block_table != 0:
        t.own_pages = t.block_table + 8 * t.batch * t.table_pages
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
    bound_panels(t, scale, mask_mod)


@compiled
def row_of(t, table, stride, i):
    """Where row `i` of the tile begins in an array, by its table and the stride of its rows."""
    return ints(table)[ints(t.row_head)[i]] + ints(t.row_query)[i] * stride


@compiled
def bound_panels(t, scale, mask_mod):
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
        if mask_mod is not None and t.blocks != 0:
            first, last = narrowed(t, p, first, last, scale)
        panel = ints(t.panel + 8 * PANEL_FIELDS * p)
        panel[FIRST], panel[LAST] = first, last
        panel[INNER_FIRST], panel[INNER_LAST] = inner_first, inner_last
        # One vector for the few queries of a decoding step, else all: other numbers of them would
        # be more code to compile.
        panel[VECS] = 1 if t.rows - p * size <= lanes(scale) else TILE_VECS
        t.first = min(t.first, first)
        t.last = max(t.last, last)


@compiled
def narrowed(t, p, first, last, scale):
    """The keys of first <= j < last between the first and the last block that the block mask leaves
    a panel.
    """
    begin, end = mask_rows(t, p, scale)
    table = ints(t.blocks)[ints(t.row_head)[p * TILE_VECS * lanes(scale)]]
    left, right = last, first
    for row in range(begin, end):
        blocks = flags(table + row * t.blocks_row)
        for column in range(first // STRIP_KEYS, (last + STRIP_KEYS - 1) // STRIP_KEYS):
            if blocks[column] != SEE_NONE:
                left = min(left, column * STRIP_KEYS)
                right = max(right, (column + 1) * STRIP_KEYS)
    return max(first, left), min(last, right)


@compiled
def mask_rows(t, p, scale):
    """The rows of the block mask in which a panel's queries lie: begin, end."""
    size = TILE_VECS * lanes(scale)
    query, rows = ints(t.row_query)[p * size], min(size, t.rows - p * size)
    return query // MASK_QUERIES, (query + rows - 1) // MASK_QUERIES + 1


@compiled
def start_rows(t, scale):
    """Load the queries; a row starts with its sink, a score without a value, or with nothing."""
    size = TILE_VECS * lanes(scale)
    tops, sums, saw = reals(t.row_max, scale), reals(t.row_sum, scale), flags(t.saw)
    wild = reals(t.wild, scale)
    for i in range(t.panels * size):
        sink = -inf
        if t.sinks != 0:
            sink = doubles(t.sinks)[ints(t.row_head)[i] % t.heads]
        tops[i], saw[i] = sink, 0
        reals(t.max_score, scale)[i] = -inf
        sums[i] = 0.0 if sink == -inf else 1.0 if sink == inf else WEIGHT_UNIT + 0.0 * sink
        if t.again == 0:
            wild[i] = 0.0
    for p in range(t.panels):
        ints(t.panel + 8 * PANEL_FIELDS * p)[STARTED] = 0
        load_queries(t, p, ahead(reals(t.queries, scale), p * size * t.head_dim), scale)


@compiled
def load_queries(t, p, columns, scale):
    """columns[d][lane] = scale * q, or q where the scale comes later."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    rows, done = ints(t.words), 0
    for i in range(size):
        rows[i] = row_of(t, t.q, t.q_row, p * size + i)
    if t.q_format == REAL and t.q_dim * width == VECTOR_BYTES:
        done = t.head_dim // width * width
        for n in range(0, size, width):
            for d in range(0, done, width):
                rows_to_columns(ahead(rows, n), d * t.q_dim, ahead(columns, d * size + n))
    for i in range(size):
        q, step = rows[i], t.q_dim
        if t.q_format != REAL:
            widen(q, np.int64(0), step, np.int64(1), t.head_dim, t.q_format, floats(0),
                  np.int64(0), reals(t.widened, scale))  # fmt: skip
            q, step = t.widened, VECTOR_BYTES // width
        for d in range(done, t.head_dim):
            columns[d * size + i] = reals(q + d * step, scale)[0]
    for n in range(0, size, width):
        factor, one = scales_of(t, p * size + n, scale), splat(constant(1.0, scale))
        if t.again == FAR_SCORES:
            wild = load(ahead(reals(t.wild, scale), p * size + n))
            factor = choose(wild == wild, factor, one)
        for x in range(n, t.head_dim * size, size):
            store(ahead(columns, x), load(ahead(columns, x)) * factor)


@compiled
def scales_of(t, row, scale):
    """The scales of the rows of a vector."""
    if t.scales == 0:
        return splat(scale)
    scales = own_vector(scale)
    for i in range(lanes(scale)):
        scales[i] = constant(doubles(t.scales)[ints(t.row_head)[row + i] % t.heads], scale)
    return load(scales)


@compiled
def strip_of(begin, strip, first, last):
    """The keys of a strip of the block that lie in first <= j < last."""
    key = begin + strip * STRIP_KEYS
    return max(key, first), min(key + STRIP_KEYS, last)


@compiled
def pieces_of(t, p, strip):
    """The pieces of a panel and a strip: that which begins at its first vector, and so on."""
    return ints(t.pieces + 8 * PIECE_FIELDS * TILE_VECS * (p * STRIPS + strip))


@compiled
def in_block(address, like, p, row):
    """Row `row` of panel `p` in an array of [panel][BLOCK_KEYS][lane]."""
    return ahead(reals(address, like), (p * BLOCK_KEYS + row) * TILE_VECS * lanes(like))


@compiled
def seen_in_block(t, like, p, row):
    return ahead(flags(t.seen), (p * BLOCK_KEYS + row) * TILE_VECS * lanes(like))


@compiled
def product(vecs, a, a_row, a_step, rows, steps, block, b, c, accumulate):
    """The register tile over any number of rows."""
    size = TILE_VECS * lanes(c[0])
    accumulate = accumulate != 0
    for row in range(0, rows, TILE_ROWS):
        count, to = min(rows - row, TILE_ROWS), ahead(c, row * size)
        at = a + row * a_row
        if vecs == 1:
            narrow_tile(at, a_row, a_step, count, steps, block, b, to, accumulate)
        else:
            whole_tile(at, a_row, a_step, count, steps, block, b, to, accumulate)
