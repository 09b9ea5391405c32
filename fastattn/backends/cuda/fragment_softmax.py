"""The online softmax on fragments, and the results of their rows."""

from __future__ import annotations

import math

import numpy as np

from .elements import writer
from .instructions import exp2, shuffle_xor
from .layout import Fields
from .tensor_tile import TensorBlocks, key_of
from .toolkit import cuda, device_function

__all__ = ["LOG2_E", "finish_maker", "results_writer", "weigh_maker"]

LOG2_E = np.float32(math.log2(math.e))


def weigh_maker(b: TensorBlocks):
    """A device function that raises the maxima, makes scores weights and sums them."""
    ROWS, COLS, SUMS = b.rows, b.cols, b.sums
    ZERO, INF = np.float32(0), np.float32(math.inf)

    def weigh(s, seen, top, total, any_visible, unit, acc):
        for r in range(ROWS):
            now = top[r]
            for c in range(COLS):
                now = max(now, s[r, c])
            now = max(now, shuffle_xor(now, 1))
            now = max(now, shuffle_xor(now, 2))
            shift = now if now != -INF else ZERO
            rescale = exp2((top[r] - shift) * unit[r])
            top[r] = now
            row_sum = ZERO
            for c in range(COLS):
                s[r, c] = exp2((s[r, c] - shift) * unit[r])
                row_sum += s[r, c]
            total[r] = total[r] * rescale + row_sum
            if seen >> r * COLS & (1 << COLS) - 1:
                any_visible[r] = 1
            for n in range(SUMS):
                acc[r, n] *= rescale

    return device_function(weigh)


def finish_maker(b: TensorBlocks):
    """A device function that writes a tile of the result, and returns as bits the rows of which
    something is not finite.
    """
    ROWS, SUMS, SINKS, SCALES = b.rows, b.sums, b.spec.sinks, b.scales
    ZERO, ONE, INF = np.float32(0), np.float32(1), np.float32(math.inf)
    MOST = np.finfo(np.float32).max
    write_out, column = writer("o" in b.spec.bfloat16), device_function(key_of)

    def finish(acc, top, total, any_visible, base, options, rows, out, out_at, out_strides, n_rows,
               n_cols, ty, tx):  # fmt: skip
        lost = 0
        out_head, out_row, out_dim = out_strides
        for r in range(ROWS):
            row = ty + 8 * r
            for mask in (1, 2):
                total[r] += shuffle_xor(total[r], mask)
                any_visible[r] |= shuffle_xor(any_visible[r], mask)
            if row < n_rows and not SCALES:
                top[r] *= rows.scale[row]
            not_finite = ZERO
            for n in range(SUMS):
                not_finite += ZERO * acc[r, n]
            if not (
                total[r] <= MOST and (total[r] > ZERO or any_visible[r] == 0) and not_finite == ZERO
            ):
                lost |= 1 << r
            base[r], kept = top[r], ONE
            if SINKS and row < n_rows:
                h = options.first_head + rows.head[row]
                sink = options.per_head[2 * options.heads + h]
                base[r] = max(top[r], sink)
                if sink == INF:
                    kept, total[r] = ZERO, ONE
                elif sink != -INF:
                    kept = exp2((top[r] - base[r]) * LOG2_E)
                    total[r] = total[r] * kept + exp2((sink - base[r]) * LOG2_E)
            share = kept / total[r] if total[r] != ZERO else ZERO
            if row < n_rows:
                at = out_at + rows.query[row] * out_row + rows.head[row] * out_head
                for n in range(SUMS):
                    d = column(n, tx)
                    if d < n_cols:
                        write_out(out, at + d * out_dim, acc[r, n] * share)
        for mask in (1, 2):
            lost |= shuffle_xor(lost, mask)
        return lost

    return device_function(finish)


def results_writer(b: TensorBlocks):
    """A device function that writes the flags of a tile's rows, their lse and largest scores."""
    ROWS, LSE, ROW_MAX, PARTIAL = b.rows, b.spec.lse, b.spec.row_max, b.spec.partial
    ZERO, INF = np.float32(0), np.float32(math.inf)

    def write_results(flags, lse, row_max, top, total, base, lost, rows, at, layout, n_rows, ty,
                      tx):  # fmt: skip
        for r in range(ROWS):
            row = ty + 8 * r
            if row < n_rows and tx == 0:
                to = at + rows.head[row] * layout[Fields.N_QUERIES] + rows.query[row]
                all_rows = layout[Fields.ROW_PART] * layout[Fields.PARTS]
                flags[to + cuda.blockIdx.y * all_rows] = lost >> r & 1
                if PARTIAL:
                    lse[2 * to], lse[2 * to + 1] = base[r], total[r]
                elif LSE:
                    lse[to] = -INF if total[r] == ZERO else base[r] + math.log(total[r])
                if ROW_MAX:
                    row_max[to] = top[r]

    return device_function(write_results)
