"""The second half of the multiply-add kernel: the online softmax, the sums and the results."""

from __future__ import annotations

import math

import numpy as np

from .elements import writer
from .tile import Blocks
from .toolkit import cuda, device_function

__all__ = [
    "accumulate_maker", "finish_maker", "fold_maker", "raise_maker", "row_sum_maker",
    "weigh_maker", "weights_maker",
]  # fmt: skip


def raise_maker(b: Blocks):
    """A device function that raises the maxima of the rows to those of the tile."""
    ROWS, COLS, TY, TX, P_ROW = b.rows, b.cols, b.tile.ty, b.tile.tx, b.p_row
    BLOCK_Q, real, ROW_MAX = b.queries, b.real, b.spec.row_max
    INF, ONE = real(math.inf), real(1)

    def raise_top(s, seen, rows, ps, margin, since_fold, tx, ty, t):
        for r in range(ROWS):
            top = -INF
            for c in range(COLS):
                if s[r, c] > top or (ROW_MAX and s[r, c] != s[r, c]):
                    top = s[r, c]
            ps[(r * TY + ty) * P_ROW + tx] = top
            if seen >> r * COLS & (1 << COLS) - 1:
                rows.any_visible[r * TY + ty] = 1
        cuda.syncthreads()
        if t < BLOCK_Q:
            top = ps[t * P_ROW]
            for n in range(1, TX):
                top = max(top, ps[t * P_ROW + n])
            if ROW_MAX:
                for n in range(TX):
                    x = ps[t * P_ROW + n]
                    if x > rows.high[t] or x != x:
                        rows.high[t] = x
            before = rows.top[t]
            now = max(before, top + margin)
            rows.top[t] = now
            rescale = ONE  # an unchanged maximum may be an infinite sink
            if now != before:
                rescale = real(math.exp(before - now))
            rows.rescale[t] = rescale
            rows.factor[t] = rescale if since_fold == 0 else rows.factor[t] * rescale
        cuda.syncthreads()

    return device_function(raise_top)


def weigh_maker(b: Blocks):
    """A device function that makes scores weights, in shared memory, and sums them."""
    ROWS, COLS, TY, TX, P_ROW = b.rows, b.cols, b.tile.ty, b.tile.tx, b.p_row
    SUMS, real = b.sums, b.real
    INF, ZERO, HIDDEN = real(math.inf), real(0), real(-0.0)

    def weigh(s, seen, partial, acc, acc_sum, rows, ps, tx, ty):
        for r in range(ROWS):
            row = r * TY + ty
            shift, rescale = rows.top[row], rows.rescale[row]
            if shift == -INF:  # any finite number will do
                shift = ZERO
            tile_sum = ZERO
            for c in range(COLS):
                x = real(math.exp(s[r, c] - shift))
                # A negative zero adds nothing, and marks a hidden key for `accumulate`.
                if partial and seen >> r * COLS + c & 1 == 0:
                    x = HIDDEN
                tile_sum += x
                ps[row * P_ROW + c * TX + tx] = x
            acc_sum[r] = acc_sum[r] * rescale + tile_sum
            for n in range(SUMS):
                acc[r, n] *= rescale

    return device_function(weigh)


def accumulate_maker(b: Blocks):
    """A device function that adds weights times some rows of v to a thread's sums."""
    ROWS, TY, TX, P_ROW, V_ROW = b.rows, b.tile.ty, b.tile.tx, b.p_row, b.v_row
    PARTS, DIMS, V_KEYS, real = b.parts, b.dims, b.v_keys, b.real
    FOURS, COLUMNS = 0x10000 - 4, b.columns
    ZERO, ONE = real(0), real(1)

    def accumulate(acc, ps, vs, first_key, skip_hidden, tx, ty):
        a = cuda.local.array((ROWS, 4), real)
        x = cuda.local.array(DIMS, real)
        if skip_hidden:  # 0 * NaN is a NaN: leave out hidden keys
            for key in range(V_KEYS):
                for r in range(ROWS):
                    p = ps[(r * TY + ty) * P_ROW + first_key + key]
                    if math.copysign(ONE, p) > ZERO:
                        for part in range(PARTS):
                            for n in range(DIMS):
                                d = (part * TX + tx) * DIMS + n
                                acc[r, part * DIMS + n] += p * vs[key * V_ROW + d]
            return
        for key in range(0, V_KEYS, 4):
            from_p = ty * P_ROW + first_key + key & FOURS
            from_v = key * V_ROW + tx * DIMS & COLUMNS
            for r in range(ROWS):
                for u in range(4):
                    a[r, u] = ps[from_p + r * TY * P_ROW + u]
            for u in range(4):
                for part in range(PARTS):
                    for n in range(DIMS):
                        x[n] = vs[from_v + u * V_ROW + part * TX * DIMS + n]
                    for r in range(ROWS):
                        for n in range(DIMS):
                            acc[r, part * DIMS + n] += a[r, u] * x[n]

    return device_function(accumulate)


def fold_maker(b: Blocks):
    """A device function that adds the sums of some tiles to those of all before."""
    ROWS, SUMS, TY, ZERO = b.rows, b.sums, b.tile.ty, b.real(0)

    def fold(acc, acc_sum, total, total_sum, rows, ty):
        for r in range(ROWS):
            factor = rows.factor[r * TY + ty]
            total_sum[r] = total_sum[r] * factor + acc_sum[r]
            acc_sum[r] = ZERO
            for n in range(SUMS):
                total[r, n] = total[r, n] * factor + acc[r, n]
                acc[r, n] = ZERO

    return device_function(fold)


def row_sum_maker(b: Blocks):
    """A device function that sums the rows over all threads, sinks included."""
    ROWS, SUMS, TY, TX, P_ROW = b.rows, b.sums, b.tile.ty, b.tile.tx, b.p_row
    BLOCK_Q, SINKS, real = b.queries, b.spec.sinks, b.real
    INF, ZERO, ONE = real(math.inf), real(0), real(1)

    def sum_rows(acc, acc_sum, total, total_sum, folded, rows, ps, options, tx, ty, t):
        cuda.syncthreads()
        for r in range(ROWS):
            row = r * TY + ty
            factor = ONE if folded else rows.factor[row]
            ps[row * P_ROW + tx] = total_sum[r] * factor + acc_sum[r]
            for n in range(SUMS):
                acc[r, n] += total[r, n] * factor
        cuda.syncthreads()
        if t < BLOCK_Q:
            row_sum = ZERO
            for n in range(TX):
                row_sum += ps[t * P_ROW + n]
            if SINKS:
                h = options.first_head + rows.head[t]
                sink = options.per_head[2 * options.heads + h]
                if sink == INF:
                    row_sum += ONE
                elif sink != -INF:
                    row_sum += real(math.exp(sink - rows.top[t]))
            rows.rescale[t] = row_sum
        cuda.syncthreads()

    return device_function(sum_rows)


def finish_maker(b: Blocks):
    """A device function that writes a tile of the result; on a second pass, with smaller weights,
    only those that `lost` says.
    """
    ROWS, TY, TX, PARTS, DIMS, SUMS = (
        b.rows, b.tile.ty, b.tile.tx, b.parts, b.dims, b.sums
    )  # fmt: skip
    real, REDO = b.real, b.spec.redo
    ZERO, ONE, NAN, MOST = real(0), real(1), real(math.nan), np.finfo(real).max
    write_out = writer("o" in b.spec.bfloat16)

    def finish(acc, lost, again, out, out_at, out_strides, rows, n_rows, n_cols, tx, ty):
        out_head, out_row, out_dim = out_strides
        for r in range(ROWS):
            row = r * TY + ty
            row_sum = rows.rescale[row]
            share = NAN  # a key in sight and a sum of 0: scores of -inf, 0 / 0
            if row_sum != ZERO:
                share = ONE / row_sum
            if row < n_rows and (not REDO or rows.wanted[row] != 0):
                to = out_at + rows.query[row] * out_row + rows.head[row] * out_head
                for part in range(PARTS):
                    for n in range(DIMS):
                        d = (part * TX + tx) * DIMS + n
                        x = acc[r, part * DIMS + n] * share
                        if again and abs(acc[r, part * DIMS + n]) <= MOST:
                            x = min(max(x, -MOST), MOST)  # a mean of such may be rounded up
                        if rows.any_visible[row] == 0:
                            x = ZERO
                        own = not again or lost >> r * SUMS + part * DIMS + n & 1 != 0
                        if d < n_cols and own:
                            write_out(out, to + d * out_dim, x)

    return device_function(finish)


def weights_maker(b: Blocks):
    """A device function that writes the weights of a tile of keys."""
    ROWS, COLS, TY, TX, real = b.rows, b.cols, b.tile.ty, b.tile.tx, b.real
    INF, ZERO = real(math.inf), real(0)
    write_out = writer("o" in b.spec.bfloat16)

    def write_weights(s, seen, weights, at, rows, n_rows, begin, n_keys, tx, ty):
        for r in range(ROWS):
            row = r * TY + ty
            shift = rows.top[row]
            if shift == -INF:
                shift = ZERO
            for c in range(COLS):
                key = begin + c * TX + tx
                x = ZERO
                if seen >> r * COLS + c & 1:
                    x = real(math.exp(s[r, c] - shift))
                    if shift != INF:  # else 0, or a NaN beside which others are 0
                        x /= rows.rescale[row]
                if row < n_rows and key < n_keys:
                    write_out(weights, at + row * n_keys + key, x)

    return device_function(write_weights)
