"""The kernel that merges parts: attention over some of the keys each, to one over all of them.

As `fastattn.merge` does it: a part counts with ``exp(lse of the part - lse)``, where the lse of a
part comes as the pair of its largest score and of the sum of exponentials relative to it.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .elements import writer
from .layout import Fields, Operands, place_of, strides_of
from .tile import Spec
from .toolkit import SIMULATED, cuda, kernel

__all__ = ["THREADS", "compiled"]

THREADS = 4 if SIMULATED else 64  # of a block, which makes one row


@cache
def compiled(spec: Spec):
    """The kernel of the calls that `spec` is for, to be launched with ``[(rows, idle), THREADS]``;
    blocks of threads beyond the first along the second axis do nothing.
    """
    real = np.dtype(spec.real).type
    SINKS, LSE, ROW_MAX = spec.sinks, spec.lse, spec.row_max
    ZERO, ONE, INF, MOST = real(0), real(1), real(math.inf), np.finfo(real).max
    write_out = writer("o" in spec.bfloat16)

    def merge(part_out, part_lse, part_max, out, lse, row_max, per_head, layout):
        if cuda.blockIdx.y != 0:
            return
        row, n_queries, heads = cuda.blockIdx.x, layout[Fields.N_QUERIES], layout[Fields.HEADS]
        parts, row_part = layout[Fields.PARTS], layout[Fields.ROW_PART]
        i, head, entry = row % n_queries, row // n_queries % heads, row // n_queries // heads
        top = -INF
        for part in range(parts):
            top = max(top, part_lse[2 * (row + part * row_part)])
        sink = -INF
        if SINKS:
            sink = per_head[2 * heads + head]
        top = max(top, sink)
        shift = top if top != -INF else ZERO
        row_sum = ZERO
        for part in range(parts):
            at = 2 * (row + part * row_part)
            if part_lse[at + 1] != ZERO:
                row_sum += part_lse[at + 1] * real(math.exp(part_lse[at] - shift))
        if SINKS:
            row_sum += ONE if sink == INF else real(math.exp(sink - shift))
        _, out_row, out_dim = strides_of(layout, Operands.RESULT)
        to = place_of(layout, Operands.RESULT, entry, head) + i * out_row
        for d in range(cuda.threadIdx.x, layout[Fields.VALUE_DIM], THREADS):
            x, finite = ZERO, True
            for part in range(parts):
                part_row = row + part * row_part
                y = part_out[part_row * layout[Fields.VALUE_DIM] + d]
                weight = part_lse[2 * part_row + 1]
                if row_sum == ZERO:  # of nothing seen a part is 0, of scores of -inf a NaN
                    x += y
                elif weight != ZERO:
                    weight *= real(math.exp(part_lse[2 * part_row] - shift)) / row_sum
                    finite &= abs(y) <= MOST and weight == weight
                    x += weight * y
            if finite and not abs(x) <= MOST:
                x = real(math.copysign(MOST, x))  # a mean of such may be rounded up
            write_out(out, to + d * out_dim, x)
        if LSE and cuda.threadIdx.x == 0:
            row_lse = np.float64(top)
            if row_sum == ZERO:
                row_lse = -math.inf
            elif top != INF:
                row_lse += math.log(np.float64(row_sum))
            lse[row] = row_lse
        if ROW_MAX and cuda.threadIdx.x == 0:
            high = part_max[row]
            for part in range(1, parts):
                x = part_max[row + part * row_part]
                if x > high or x != x:
                    high = x
            row_max[row] = high

    return kernel(merge)
