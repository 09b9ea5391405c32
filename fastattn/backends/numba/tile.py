"""The kernel of a tile: the queries that share one pass over the keys.

As in ``csrc/tile.c``, queries lie in the lanes of vectors: keys and values are read as they stand,
one element broadcast to all queries at a time, and softmax has no horizontal step. A micropanel is
the queries of one register tile. Within a block of keys S^T = K Q^T, the weights
P^T = exp(S^T - max) and O^T = V^T P^T follow each other as in FlashAttention (Dao et al. 2022,
algorithm 1), except that the maximum is that of the whole block and O^T is rescaled once per block.

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

# Queries in a tile, as bytes of one row: a whole number of micropanels for every instruction set.
# Twice as many as fill the widest registers, because each tile reads all of K and V.
TILE_BYTES = 384
MICROPANEL_BYTES = TILE_VECS * VECTOR_BYTES

# Keys whose scores are summed from zero before they join the running sum. One run over all keys
# would have 3 to 25 times NumPy's rounding error; blocks of 128 make too many partial sums.
BLOCK_K = 512
# Keys whose weights stay in the first-level cache between the softmax and the second product.
SUB_BLOCK_K = block_mask.BLOCK_KEYS
SUB_BLOCKS = BLOCK_K // SUB_BLOCK_K

# Head dims whose products are summed from zero before they are added to the score, at least. NumPy
# gives few queries a matmul that keeps many partial sums, and one vector of queries has the time
# for as many.
BLOCK_D_ONE_VECTOR, BLOCK_D = 16, 32

# How much of a sub-block the queries of a micropanel see, or of a block of a block mask, which has
# the keys of a sub-block.
EMPTY, PARTIAL, FULL = block_mask.NONE, block_mask.SOME, block_mask.ALL
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
    # The tile, set by `open_tile`: its rows, micropanels, batch entry and the visible keys.
    "tile_rows", "tiles", "rows", "micropanels", "batch", "first", "last",
    "retry",  # how a tile is solved a second time, see below
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
    # A word per lane of the current micropanel: the keys of a sub-block as bits, or addresses.
    "words",
    # MICROPANEL_FIELDS integers of each micropanel, and its subs of each sub-block of the block.
    "micropanel", "subs",
    # The scratch, [micropanel][row][lane] throughout, so that a micropanel is contiguous.
    "row_max", "row_sum", "max_score", "top", "rescale", "block_sum", "row_state", "special",
    "queries", "total", "block_total", "scores", "bias_tile", "visible", "widened",
)  # fmt: skip
TILE = np.dtype(
    [(name, np.int64) for name in NUMBERS]
    + [(name + part, np.int64) for name in ARRAYS for part in ("", "_row", "_dim")]
    + [(name, np.float64) for name in ("scale", "softcap", "function_scale", "unit", "keep_factor")]
)
tile_at = record_of(from_dtype(TILE))

# The steps of a tile.
ATTEND, RETRY, WEIGH, DONE = range(4)
# Why a tile is solved a second time: finite numbers gave sums that are not finite. Its weights are
# then small when they meet the values, or the scores of special rows, which see a score that is not
# finite, are summed in float64. All other scores and weights keep their bits, and so do results
# that are finite.
SMALL_WEIGHTS, FAR_SCORES = 1, 2
# The state of a row: it has seen no key (0), some key, or, found when retrying, a NaN among scores.
ROW_VISIBLE, ROW_NAN = 1, 2

# Some row of a micropanel sees first <= j < last, every row inner_first <= j < inner_last.
FIRST, LAST, INNER_FIRST, INNER_LAST, VECS, HAS_OUTPUT, ANY_VISIBLE = range(7)
MICROPANEL_FIELDS = 7
# A sub is the part of a sub-block that is computed at once: some vectors of a micropanel, or none,
# and the keys first <= j < last; its visibility is FULL if all its rows see all of them. There is
# one for the whole micropanel, or one for each vector.
SUB_VECS, SUB_FIRST, SUB_LAST, SUB_VISIBILITY = range(4)
SUB_FIELDS = 4

narrow_tile, whole_tile = register_tile(1), register_tile(TILE_VECS)

# Numba optimises a function and all that it calls once for every caller: a function that has one
# caller and calls many is inlined in it.
inlined = njit(error_model="numpy", inline="always")


def scratch(itemsize: int, head_dim: int, value_dim: int) -> dict[str, int]:
    """The bytes of each part of a tile's scratch."""
    rows = TILE_BYTES // itemsize
    micropanels = TILE_BYTES // MICROPANEL_BYTES
    whole = {"row_query": rows, "row_head": rows, "row_start": rows, "row_stop": rows,
             "drop_rows": 4 * rows, "drop_words": 4 * rows,
             "words": rows, "micropanel": micropanels * MICROPANEL_FIELDS,
             "subs": micropanels * SUB_BLOCKS * TILE_VECS * SUB_FIELDS}  # fmt: skip
    per_row = {"row_max": 1, "row_sum": 1, "max_score": 1, "top": 1, "rescale": 1,
               "block_sum": 1, "special": 1,
               "queries": head_dim, "total": value_dim, "block_total": value_dim,
               "scores": BLOCK_K, "bias_tile": SUB_BLOCK_K}  # fmt: skip
    sizes = {name: 8 * n for name, n in whole.items()}
    sizes |= {name: TILE_BYTES * n for name, n in per_row.items()}
    sizes["row_state"] = rows
    sizes["visible"] = rows * BLOCK_K
    sizes["widened"] = itemsize * SUB_BLOCK_K * max(head_dim, value_dim)
    return sizes


@compiled
def begin_tile(t, item, scale, mask_mod):
    """Point the tile at its rows and at the keys that they read."""
    # The last queries first: under a causal mask they have the most work, and threads that end with
    # small tiles do not wait for each other.
    first = (t.tiles - 1 - item % t.tiles) * t.tile_rows
    head = item // t.tiles * t.fold
    t.batch = head // t.heads
    t.retry, t.unit = 0, 1.0
    t.rows = min(t.tile_rows, t.fold * t.n_queries - first)
    key_head = t.batch * t.kv_heads + head % t.heads // t.group
    t.k_head = ints(t.k)[key_head]
    t.v_head = ints(t.v)[key_head]
    if t.k_scales != 0:
        t.k_scale, t.v_scale = ints(t.k_scales)[key_head], ints(t.v_scales)[key_head]
    if t.block_table != 0:
        t.own_pages = t.block_table + 8 * t.batch * t.table_pages
    size = TILE_VECS * lanes(scale)
    t.micropanels = (t.rows + size - 1) // size
    queries, heads = ints(t.row_query), ints(t.row_head)
    starts, stops = ints(t.row_start), ints(t.row_stop)
    for i in range(t.micropanels * size):
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
    bound_micropanels(t, scale, mask_mod)


@compiled
def row_of(t, table, stride, i):
    """The address of row `i` of the tile in an array, by its table and the stride of its rows."""
    return ints(table)[ints(t.row_head)[i]] + ints(t.row_query)[i] * stride


@compiled
def bound_micropanels(t, scale, mask_mod):
    """Find the keys that some row, and that every row, of each micropanel sees."""
    starts, stops = ints(t.row_start), ints(t.row_stop)
    size = TILE_VECS * lanes(scale)
    t.first, t.last = t.n_keys, 0
    for p in range(t.micropanels):
        first, last, inner_first, inner_last = t.n_keys, 0, 0, t.n_keys
        for i in range(p * size, (p + 1) * size):
            if starts[i] < stops[i]:
                first = min(first, starts[i])
                last = max(last, stops[i])
            inner_first = max(inner_first, starts[i])
            inner_last = min(inner_last, stops[i])
        if mask_mod is not None and t.blocks != 0:
            first, last = narrowed(t, p, first, last, scale)
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        micropanel[FIRST], micropanel[LAST] = first, last
        micropanel[INNER_FIRST], micropanel[INNER_LAST] = inner_first, inner_last
        # One vector for the few queries of a decoding step, else all: other numbers of them would
        # be more code to compile.
        micropanel[VECS] = 1 if t.rows - p * size <= lanes(scale) else TILE_VECS
        t.first = min(t.first, first)
        t.last = max(t.last, last)


@compiled
def narrowed(t, p, first, last, scale):
    """Cut first <= j < last to the blocks of the block mask that a micropanel sees."""
    begin, end = mask_rows(t, p, scale)
    table = ints(t.blocks)[ints(t.row_head)[p * TILE_VECS * lanes(scale)]]
    left, right = last, first
    for row in range(begin, end):
        blocks = flags(table + row * t.blocks_row)
        for column in range(first // SUB_BLOCK_K, (last + SUB_BLOCK_K - 1) // SUB_BLOCK_K):
            if blocks[column] != EMPTY:
                left = min(left, column * SUB_BLOCK_K)
                right = max(right, (column + 1) * SUB_BLOCK_K)
    return max(first, left), min(last, right)


@compiled
def mask_rows(t, p, scale):
    """The rows of the block mask that hold a micropanel's queries: begin, end."""
    size = TILE_VECS * lanes(scale)
    query, rows = ints(t.row_query)[p * size], min(size, t.rows - p * size)
    return query // MASK_QUERIES, (query + rows - 1) // MASK_QUERIES + 1


@compiled
def begin_rows(t, scale):
    """Load the queries. A row begins with its sink, a score without a value, if it has one."""
    size = TILE_VECS * lanes(scale)
    tops, sums, row_state = reals(t.row_max, scale), reals(t.row_sum, scale), flags(t.row_state)
    special = reals(t.special, scale)
    for i in range(t.micropanels * size):
        sink = -inf
        if t.sinks != 0:
            sink = doubles(t.sinks)[ints(t.row_head)[i] % t.heads]
        tops[i], row_state[i] = sink, 0
        reals(t.max_score, scale)[i] = -inf
        sums[i] = 0.0 if sink == -inf else 1.0 if sink == inf else WEIGHT_UNIT + 0.0 * sink
        if t.retry == 0:
            special[i] = 0.0
    for p in range(t.micropanels):
        ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)[HAS_OUTPUT] = 0
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
        if t.retry == FAR_SCORES:
            special = load(ahead(reals(t.special, scale), p * size + n))
            factor = choose(special == special, factor, one)
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
def sub_block_of(begin, sub_block, first, last):
    """The keys of a sub-block of the block that lie in first <= j < last."""
    key = begin + sub_block * SUB_BLOCK_K
    return max(key, first), min(key + SUB_BLOCK_K, last)


@compiled
def subs_of(t, p, sub_block):
    """The subs of a micropanel and a sub-block, by the vector at which they begin."""
    return ints(t.subs + 8 * SUB_FIELDS * TILE_VECS * (p * SUB_BLOCKS + sub_block))


@compiled
def in_block(address, like, p, row):
    """Row `row` of micropanel `p` in an array of [micropanel][BLOCK_K][lane]."""
    return ahead(reals(address, like), (p * BLOCK_K + row) * TILE_VECS * lanes(like))


@compiled
def visible_in_block(t, like, p, row):
    return ahead(flags(t.visible), (p * BLOCK_K + row) * TILE_VECS * lanes(like))


@compiled
def matmul(vecs, a, a_row, a_step, rows, steps, block, b, c, accumulate):
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
