"""The kernel of tensor cores, for float16 and bfloat16: by ``mma.sync`` from compute capability 8.0
on, by ``wgmma`` on 9.0.

The algorithm is that of `multiply_add`, FlashAttention-2 (Dao 2023, section 3): each warp has 16
queries, whose scores and sums lie in its registers as `fragments` tells, so that the weights are
made where the second product wants them. K and V come by asynchronous copies while the other one
is at work. Rows that meet what this kernel does not weigh as the formula says (a NaN or an Inf in a
score, a hidden one in v, sums that overflow) are flagged, and `multiply_add` computes them again.

It has been compiled for devices and run in Numba's simulator, where `simulated_instructions` stand
for those of the hardware; it has never run on a device. `trial` decides there whether it may.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .fragment_softmax import LOG2_E, finish_maker, results_writer, weigh_maker
from .instructions import commit
from .layout import Fields, Operands, place_of, strides_of
from .products import accumulate_maker, arrival, loader, query_loader, score_maker
from .scores import Options, Rows, look_maker, options_maker
from .tensor_tile import TensorSpec, blocks_of
from .toolkit import SIMULATED, cuda, kernel
from .visibility import key_limits, row_describer

__all__ = ["compiled"]


@cache
def compiled(kind: TensorSpec):
    """The kernel, to be launched with ``[(tiles, slices, parts), threads]``; blocks of threads
    beyond the last part along the third axis do nothing.
    """
    b, spec = blocks_of(kind), kind.spec
    ROWS, COLS, SUMS, SHARED = b.rows, b.cols, b.sums, b.shared
    BLOCK_Q, BLOCK_K, SLICE, THREADS = b.queries, b.keys, b.slice, b.threads
    Q_REGISTERS = 4 * b.k_steps
    MASKED, ALIGNMENT = spec.mask, None if SIMULATED else b.alignment
    HIDES = spec.mask or spec.bias or spec.relative_bias
    SCALES, ZERO, INF = b.scales, np.float32(0), np.float32(math.inf)
    describe_rows = row_describer(b)
    load_queries, load_keys, load_values = query_loader(b), loader(b, kind, 0), loader(b, kind, 1)
    arrive = arrival(kind)
    look, score, apply_options = look_maker(b), score_maker(b, kind), options_maker(b)
    weigh, accumulate = weigh_maker(b), accumulate_maker(b, kind)
    finish, write_results = finish_maker(b), results_writer(b)

    def attend(
        q, k, v, out, mask, bias, start, stop, lse, row_max, positions, per_head, layout, flags,
        softcap, first_tile,
    ):  # fmt: skip
        part = cuda.blockIdx.z
        if part >= layout[Fields.PARTS]:
            return
        shared = cuda.shared.array(SHARED, np.uint16, ALIGNMENT)  # a tile of k, and one of v
        row_query = cuda.shared.array(BLOCK_Q, np.int64)
        row_head = cuda.shared.array(BLOCK_Q, np.int64)
        row_place = cuda.shared.array(BLOCK_Q, np.int64)
        row_scale = cuda.shared.array(BLOCK_Q, np.float32)
        row_start = cuda.shared.array(BLOCK_Q, np.int64)
        row_stop = cuda.shared.array(BLOCK_Q, np.int64)
        bounds = cuda.shared.array(4, np.int64)
        q_registers = cuda.local.array(Q_REGISTERS, np.uint32)
        s = cuda.local.array((ROWS, COLS), np.float32)
        acc = cuda.local.array((ROWS, SUMS), np.float32)
        top = cuda.local.array(ROWS, np.float32)
        total = cuda.local.array(ROWS, np.float32)
        unit = cuda.local.array(ROWS, np.float32)  # of a score, in powers of two
        any_visible = cuda.local.array(ROWS, np.int32)
        base = cuda.local.array(ROWS, np.float32)  # what sums are relative to in the end
        rows = Rows(
            row_query, row_head, row_place, row_scale, row_start, row_stop, any_visible, top, top,
            total, total, any_visible,
        )  # fmt: skip

        t = cuda.threadIdx.x & (THREADS - 1)
        lane = t % 32
        ty, tx = t // 32 * 16 + lane // 4, lane % 4
        share, heads = layout[Fields.SHARE], layout[Fields.HEADS]
        n_all = layout[Fields.N_QUERIES] * share
        tiles = (n_all + BLOCK_Q - 1) // BLOCK_Q
        place = first_tile + cuda.blockIdx.x
        first_row = (tiles - 1 - place % tiles) * BLOCK_Q  # with a causal mask, longest first
        entry, first_head = place // tiles // (heads // share), place // tiles % (heads // share)
        first_head *= share
        kv_head = first_head // layout[Fields.GROUP]
        first_dim = cuda.blockIdx.y * SLICE
        n_rows = min(BLOCK_Q, n_all - first_row)
        n_cols = min(SLICE, layout[Fields.VALUE_DIM] - first_dim)
        options = Options(
            mask, place_of(layout, Operands.MASK, entry, first_head),
            strides_of(layout, Operands.MASK),
            bias, place_of(layout, Operands.BIAS, entry, first_head),
            strides_of(layout, Operands.BIAS),
            per_head, softcap, positions[entry * layout[Fields.OF_ENTRY]], heads, first_head,
            layout[Fields.REACH],
        )  # fmt: skip
        describe_rows(rows, layout, positions, start, stop, per_head, entry, first_head,
                      first_row, n_rows, bounds, t)  # fmt: skip
        first, last, inner_first, inner_last = key_limits(bounds, layout, part)
        _, k_row, k_dim = strides_of(layout, Operands.K)
        _, v_row, v_dim = strides_of(layout, Operands.V)
        k_at = place_of(layout, Operands.K, entry, kv_head)
        v_at = place_of(layout, Operands.V, entry, kv_head) + first_dim * v_dim
        load_queries(q_registers, q, rows, n_rows, strides_of(layout, Operands.Q)[2], ty, tx)
        for r in range(ROWS):
            top[r], total[r], any_visible[r] = -INF, ZERO, 0
            unit[r] = LOG2_E
            if not SCALES:
                unit[r] *= row_scale[ty + 8 * r]
            for n in range(SUMS):
                acc[r, n] = ZERO

        ready = False  # is the tile of k on its way?
        for begin in range(first // BLOCK_K * BLOCK_K, last, BLOCK_K):
            partial = HIDES or begin < inner_first or begin + BLOCK_K > inner_last
            seen = (1 << ROWS * COLS) - 1
            if partial:
                seen = look(rows, options, begin, tx, ty)
                if MASKED and not cuda.syncthreads_or(np.int32(seen != 0)):
                    continue
            if MASKED or not ready:
                cuda.syncthreads()
                load_keys(shared, k, k_at, k_row, k_dim, begin, first, last, n_cols, t)
                commit()
            arrive()
            cuda.syncthreads()
            load_values(shared, v, v_at, v_row, v_dim, begin, first, last, n_cols, t)
            commit()
            score(s, q_registers, shared, lane)
            arrive()
            cuda.syncthreads()
            if not MASKED and begin + BLOCK_K < last:  # while the softmax is at work
                load_keys(shared, k, k_at, k_row, k_dim, begin + BLOCK_K, first, last, n_cols, t)
                commit()
                ready = True
            if SCALES or partial:
                seen = apply_options(s, seen, partial, rows, options, begin, tx, ty)
            weigh(s, seen, top, total, any_visible, unit, acc)
            accumulate(acc, s, shared, lane)

        out_strides = strides_of(layout, Operands.OUT)
        out_at = place_of(layout, Operands.OUT, entry, first_head) + first_dim * out_strides[2]
        out_at += part * layout[Fields.OUT_PART]
        at = (entry * heads + first_head) * layout[Fields.N_QUERIES]
        at += part * layout[Fields.ROW_PART]
        lost = finish(acc, top, total, any_visible, base, options, rows, out, out_at, out_strides,
                      n_rows, n_cols, ty, tx)  # fmt: skip
        write_results(flags, lse, row_max, top, total, base, lost, rows, at, layout, n_rows, ty, tx)

    return kernel(attend, b.registers)
