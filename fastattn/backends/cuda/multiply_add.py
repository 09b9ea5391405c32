"""The kernel of multiply-adds: a tile of queries per thread block, in any dtype on any device.

One pass over the keys with an online softmax, as FlashAttention does it (Dao et al. 2022,
algorithm 1; Dao 2023, section 3). A block of threads is a grid of ``TY`` x ``TX``: thread (ty, tx)
holds the scores of the queries ``ty, ty + TY, ...`` and the keys ``tx, tx + TX, ...`` of a tile,
and the sums of the same queries for its own columns of v, all in registers. Neighbours in a warp
read neighbouring rows of shared memory, whose length is an odd multiple of four words: so each
reads four words at once and none waits for a bank.

Nothing here may depend on what the simulator does differently: all loops that index local arrays
have constant bounds (they are registers only if unrolled), `syncthreads` stands only where the
whole block goes, and no literal makes a float32 a float64.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .elements import query_loader, reader, tile_loader
from .layout import Fields, Operands, place_of, strides_of
from .scores import Options, Rows, look_maker, options_maker, score_maker
from .softmax import (
    accumulate_maker,
    finish_maker,
    fold_maker,
    raise_maker,
    row_sum_maker,
    weigh_maker,
    weights_maker,
)
from .tile import Blocks, Spec
from .toolkit import SIMULATED, cuda, device_function, kernel
from .visibility import key_limits, row_describer

__all__ = ["compiled"]

N_QUERIES, N_KEYS, HEADS, GROUP = Fields.N_QUERIES, Fields.N_KEYS, Fields.HEADS, Fields.GROUP
SHARE, PARTS = Fields.SHARE, Fields.PARTS
Q, K, V, OUT, MASK, BIAS = (
    Operands.Q, Operands.K, Operands.V, Operands.OUT, Operands.MASK, Operands.BIAS
)  # fmt: skip


@cache
def compiled(spec: Spec):
    """The kernel of `spec`, to be launched with ``[(tiles, slices, parts), threads]``; blocks of
    threads beyond the last part along the third axis do nothing.
    """
    b = Blocks(spec)
    TY, TX, ROWS, COLS = b.tile.ty, b.tile.tx, b.rows, b.cols
    BLOCK_Q, BLOCK_K, SLICE, SUMS, FOLD = b.queries, b.keys, b.slice, b.sums, b.fold
    # A warp covers WY x WX of the grid: fewest different rows to read.
    WY, WX, THREADS = min(4, TY), min(8, TX), b.threads
    QS, KV, PS = b.shared
    ALIGNMENT = None if SIMULATED else 16
    RESIDENT, Q_DIMS, HEAD_DIM = b.resident, b.q_dims, b.head_dim
    ROW_RESULTS, WEIGHTS = spec.lse or spec.row_max or spec.partial, spec.weights
    WITH_SINKS, REDO = spec.sinks, spec.redo
    HIDES = spec.mask or spec.bias or spec.relative_bias
    real = b.real
    ZERO, INF = real(0), real(math.inf)

    read_q = reader("q" in spec.bfloat16, False, real)
    load_queries = query_loader(read_q, BLOCK_Q, Q_DIMS, b.q_row, THREADS, real)
    look, score_tile, load_values = look_maker(b), scorer(b), value_loader(b)
    apply_options, raise_top, weigh = options_maker(b), raise_maker(b), weigh_maker(b)
    accumulate, fold, sum_rows = accumulate_maker(b), fold_maker(b), row_sum_maker(b)
    finish, write_weights = finish_maker(b), weights_maker(b)
    describe_rows = row_describer(b)
    find_lost, write_lse = loss_finder(b), lse_writer(b)
    V_KEYS = b.v_keys

    def attend(
        q, k, v, out, mask, bias, start, stop, lse, row_max, weights, positions, per_head, layout,
        flags, softcap, wide_margin, first_tile,
    ):  # fmt: skip
        part = cuda.blockIdx.z
        if part >= layout[PARTS]:
            return
        qs = cuda.shared.array(QS, real, ALIGNMENT)
        kv = cuda.shared.array(KV, real, ALIGNMENT)  # a chunk of k, then some keys of v
        ps = cuda.shared.array(PS, real, ALIGNMENT)  # the weights of the tile
        row_query = cuda.shared.array(BLOCK_Q, np.int64)
        row_head = cuda.shared.array(BLOCK_Q, np.int64)
        row_place = cuda.shared.array(BLOCK_Q, np.int64)
        row_scale = cuda.shared.array(BLOCK_Q, real)
        row_start = cuda.shared.array(BLOCK_Q, np.int64)
        row_stop = cuda.shared.array(BLOCK_Q, np.int64)
        row_saw = cuda.shared.array(BLOCK_Q, np.int32)
        row_top = cuda.shared.array(BLOCK_Q, real)
        row_high = cuda.shared.array(BLOCK_Q, real)
        row_rescale = cuda.shared.array(BLOCK_Q, real)
        row_factor = cuda.shared.array(BLOCK_Q, real)
        row_wanted = cuda.shared.array(BLOCK_Q, np.int32)
        bounds = cuda.shared.array(4, np.int64)
        s = cuda.local.array((ROWS, COLS), real)
        acc = cuda.local.array((ROWS, SUMS), real)  # of at most FOLD tiles
        total = cuda.local.array((ROWS, SUMS), real)
        acc_sum = cuda.local.array(ROWS, real)
        total_sum = cuda.local.array(ROWS, real)
        rows = Rows(
            row_query, row_head, row_place, row_scale, row_start, row_stop, row_saw, row_top,
            row_high, row_rescale, row_factor, row_wanted,
        )  # fmt: skip

        t = cuda.threadIdx.x & (THREADS - 1)  # tells the compiler that it is not negative
        tx = t % WX + t // (WX * WY) % (TX // WX) * WX
        ty = t // WX % WY + t // (WX * WY) // (TX // WX) * WY
        share, heads, n_keys = layout[SHARE], layout[HEADS], layout[N_KEYS]
        n_all = layout[N_QUERIES] * share
        tiles = (n_all + BLOCK_Q - 1) // BLOCK_Q
        place = first_tile + cuda.blockIdx.x
        first_row = (tiles - 1 - place % tiles) * BLOCK_Q  # with a causal mask, longest first
        entry, first_head = place // tiles // (heads // share), place // tiles % (heads // share)
        first_head *= share
        kv_head = first_head // layout[GROUP]
        first_dim = cuda.blockIdx.y * SLICE
        n_rows = min(BLOCK_Q, n_all - first_row)
        n_cols = min(SLICE, layout[Fields.VALUE_DIM] - first_dim)
        options = Options(
            mask, place_of(layout, MASK, entry, first_head), strides_of(layout, MASK),
            bias, place_of(layout, BIAS, entry, first_head), strides_of(layout, BIAS),
            per_head, softcap, positions[entry * layout[Fields.OF_ENTRY]], heads, first_head,
            layout[Fields.REACH],
        )  # fmt: skip
        describe_rows(rows, layout, positions, start, stop, per_head, entry, first_head,
                      first_row, n_rows, bounds, t)  # fmt: skip
        at = (entry * heads + first_head) * layout[N_QUERIES] + part * layout[Fields.ROW_PART]
        if REDO:
            if t < n_rows:
                row_wanted[t] = 0
                for n in range(layout[Fields.FLAGS]):
                    from_ = at + row_head[t] * layout[N_QUERIES] + row_query[t]
                    row_wanted[t] |= flags[from_ + n * layout[Fields.ROW_PART] * layout[PARTS]]
            if not cuda.syncthreads_or(np.int32(t < n_rows and row_wanted[t] != 0)):
                return
        first, last, inner_first, inner_last = key_limits(bounds, layout, part)
        _, _, q_dim = strides_of(layout, Q)
        _, v_row, v_dim = strides_of(layout, V)
        k_at = place_of(layout, K, entry, kv_head)
        v_at = place_of(layout, V, entry, kv_head) + first_dim * v_dim
        out_strides = strides_of(layout, OUT)
        out_at = place_of(layout, OUT, entry, first_head) + first_dim * out_strides[2]
        out_at += part * layout[Fields.OUT_PART]
        grid_at = (at + first_row) * n_keys
        if RESIDENT:
            load_queries(q, row_place, 0, q_dim, n_rows, HEAD_DIM, row_scale, qs, t)

        margin = ZERO
        again = False  # for those sums that overflow, with smaller weights
        lost = 0  # the bits of this thread's
        weighing = False  # another pass over the keys, if the weights are asked for
        while True:
            if not weighing:
                for r in range(ROWS):
                    acc_sum[r] = ZERO
                    total_sum[r] = ZERO
                    for n in range(SUMS):
                        acc[r, n] = ZERO
                        total[r, n] = ZERO
                if t < BLOCK_Q:
                    row_top[t] = -INF
                    row_high[t] = -INF
                    if WITH_SINKS:
                        row_top[t] = per_head[2 * heads + first_head + row_head[t]] + margin
                    row_saw[t] = 0
            since_fold = 0
            key_from = first // BLOCK_K * BLOCK_K
            key_to = last
            if weighing:
                key_from, key_to = 0, n_keys
            for begin in range(key_from, key_to, BLOCK_K):
                partial = HIDES or begin < inner_first or begin + BLOCK_K > inner_last
                seen = (1 << ROWS * COLS) - 1
                if partial:
                    seen = look(rows, options, begin, tx, ty)
                    if not cuda.syncthreads_or(np.int32(seen != 0)):
                        if WEIGHTS and weighing and first_dim == 0:
                            write_weights(
                                s, seen, weights, grid_at, rows, n_rows, begin, n_keys, tx, ty
                            )
                        continue
                score_tile(s, q, k, k_at, layout, rows, n_rows, begin, qs, kv, tx, ty, t)
                seen = apply_options(s, seen, partial, rows, options, begin, tx, ty)
                if WEIGHTS and weighing:
                    if first_dim == 0:
                        write_weights(
                            s, seen, weights, grid_at, rows, n_rows, begin, n_keys, tx, ty
                        )
                    continue
                raise_top(s, seen, rows, ps, margin, since_fold, tx, ty, t)
                weigh(s, seen, partial, acc, acc_sum, rows, ps, tx, ty)
                for first_key in range(0, BLOCK_K, V_KEYS):
                    cuda.syncthreads()
                    x_at = v_at + (begin + first_key) * v_row
                    n_here = n_keys - begin - first_key
                    wild = load_values(v, x_at, v_row, v_dim, n_here, n_cols, kv, t)
                    skip_hidden = False
                    if partial:
                        skip_hidden = cuda.syncthreads_or(np.int32(wild)) != 0
                    else:
                        cuda.syncthreads()
                    accumulate(acc, ps, kv, first_key, skip_hidden, tx, ty)
                since_fold += 1
                if since_fold == FOLD:
                    since_fold = 0
                    fold(acc, acc_sum, total, total_sum, rows, ty)

            if weighing:
                if not again:
                    break
                weighing = False
                margin = wide_margin
                cuda.syncthreads()  # before shared memory that others still read is overwritten
                continue
            sum_rows(acc, acc_sum, total, total_sum, since_fold == 0, rows, ps, options, tx, ty, t)
            # Sums of huge values: smaller weights keep them finite, unless it was v that was not.
            if margin == ZERO:
                lost = find_lost(acc, rows, ty)
                again = cuda.syncthreads_or(np.int32(lost != 0)) != 0
            finish(
                acc, lost, margin != ZERO, out, out_at, out_strides, rows, n_rows, n_cols, tx, ty
            )
            mine = t < n_rows and (not REDO or row_wanted[t] != 0)
            if ROW_RESULTS and mine and first_dim == 0 and margin == ZERO:
                to = at + row_head[t] * layout[N_QUERIES] + row_query[t]
                write_lse(lse, row_max, to, rows, t)
            if margin != ZERO:
                break
            if WEIGHTS:
                weighing = True
            elif again:
                margin = wide_margin
                cuda.syncthreads()
            else:
                break

    return kernel(attend, b.tile.registers)


def scorer(b: Blocks):
    """A device function that makes the products of a tile of queries and one of keys."""
    spec, real = b.spec, b.real
    ROWS, COLS, CHUNKS, CHUNK = b.rows, b.cols, b.chunks, b.chunk
    HEAD_DIM, RESIDENT, BLOCK_K, ZERO = b.head_dim, b.resident, b.keys, real(0)
    read_q = reader("q" in spec.bfloat16, False, real)
    read_k = reader("k" in spec.bfloat16, False, real)
    load_queries = query_loader(read_q, b.queries, b.q_dims, b.q_row, b.threads, real)
    load_keys = tile_loader(read_k, BLOCK_K, CHUNK, b.k_row, b.threads, real)
    score = score_maker(b)

    def score_tile(s, q, k, k_at, layout, rows, n_rows, begin, qs, kv, tx, ty, t):
        for r in range(ROWS):
            for c in range(COLS):
                s[r, c] = ZERO
        _, _, q_dim = strides_of(layout, Q)
        _, k_row, k_dim = strides_of(layout, K)
        n_here = min(BLOCK_K, layout[N_KEYS] - begin)
        for chunk in range(CHUNKS):
            cuda.syncthreads()
            done = chunk * CHUNK
            left = HEAD_DIM - done
            load_keys(k, k_at + begin * k_row + done * k_dim, k_row, k_dim, n_here, left, kv, t)
            if not RESIDENT:
                load_queries(q, rows.place, done * q_dim, q_dim, n_rows, left, rows.scale, qs, t)
            cuda.syncthreads()
            score(s, qs, kv, done if RESIDENT else 0, tx, ty)

    return device_function(score_tile)


def value_loader(b: Blocks):
    """A device function that loads some rows of v."""
    read_v = reader("v" in b.spec.bfloat16, False, b.real)
    return tile_loader(read_v, b.v_keys, b.v_cols, b.v_row, b.threads, b.real)


def loss_finder(b: Blocks):
    """A device function: the bits of the sums that overflow although their weights did not."""
    ROWS, SUMS, TY, MOST = b.rows, b.sums, b.tile.ty, np.finfo(b.real).max

    def find_lost(acc, rows, ty):
        lost = 0
        for r in range(ROWS):
            row_sum = rows.rescale[r * TY + ty]
            for n in range(SUMS):
                if row_sum <= MOST and not abs(acc[r, n]) <= MOST:
                    lost |= 1 << r * SUMS + n
        return lost

    return device_function(find_lost)


def lse_writer(b: Blocks):
    """A device function that writes the logarithm of a row's sum, and its largest score."""
    LSE, ROW_MAX, PARTIAL = b.spec.lse, b.spec.row_max, b.spec.partial
    INF, ZERO = b.real(math.inf), b.real(0)

    def write_lse(lse, row_max, to, rows, t):
        if PARTIAL:  # apart: beside a large maximum the logarithm of the sum is lost
            lse[2 * to], lse[2 * to + 1] = rows.top[t], rows.rescale[t]
        elif LSE:
            row_lse = np.float64(rows.top[t])
            if rows.rescale[t] == ZERO:
                row_lse = -math.inf
            elif rows.top[t] != INF:
                row_lse += math.log(np.float64(rows.rescale[t]))
            lse[to] = row_lse
        if ROW_MAX:
            row_max[to] = rows.high[t]

    return device_function(write_lse)
