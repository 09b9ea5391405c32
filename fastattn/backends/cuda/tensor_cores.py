"""The kernel of tensor cores, for float16 and bfloat16 from compute capability 8.0 on.

The algorithm is that of `multiply_add`, FlashAttention-2 (Dao 2023, section 3): each warp has 16
queries, whose scores and sums lie in its registers as `fragments` tells, so that the weights are
made where the second product wants them. K and V come by asynchronous copies while the other one
is at work. Rows that meet what this kernel does not weigh as the formula says (a NaN or an Inf in a
score, a hidden one in v, sums that overflow) are flagged, for `multiply_add` to make anew.

It has been compiled for devices and run in Numba's simulator, where `simulated_instructions` stand
for those of the hardware; it has never run on a device. `trial` decides there whether it may.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from .elements import writer
from .fragments import key_address, row_chunks, value_address
from .instructions import (
    commit,
    copy16,
    exp2,
    load_matrices,
    mma_maker,
    pack_maker,
    shuffle_xor,
    wait_all,
)
from .layout import Fields, Operands, place_of, strides_of
from .multiply_add import key_limits, row_describer
from .scores import Options, Rows, look_maker, options_maker
from .tile import Geometry, Spec
from .toolkit import SIMULATED, cuda, device_function, kernel

__all__ = ["MOST_DIMS", "TensorBlocks", "TensorSpec", "compiled"]

MOST_DIMS = 256
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))


class TensorSpec(NamedTuple):
    """What a kernel is compiled for."""

    spec: Spec
    dtype: str  # float16 or bfloat16
    vectors: bool  # k and v can be copied 16 bytes at a time

    @property
    def slices(self) -> int:
        return -(-self.spec.value_dim // TensorBlocks(self).slice)


class TensorBlocks(Geometry):
    """The sizes of the kernel's loops, and of its arrays in shared memory and registers."""

    real = np.float32

    def __init__(self, kind: TensorSpec):
        spec = self.spec = kind.spec
        wide = spec.head_dim > 128
        self.keys = 16 if SIMULATED else 32 if wide else 64
        self.warps = 1 if SIMULATED or spec.few else 8 if spec.head_dim <= 64 else 4
        # So that two or three blocks of threads are under way at once on a multiprocessor.
        self.registers = 255 if wide or spec.few else 128 if spec.head_dim <= 64 else 168
        self.queries, self.threads = 16 * self.warps, 32 * self.warps
        self.slice = min(spec.value_dim, 16 if SIMULATED else 128)
        self.k_steps, self.key_tiles = -(-spec.head_dim // 16), self.keys // 8
        self.dim_tiles = 2 * -(-self.slice // 16)
        self.rows, self.cols, self.sums = 2, 2 * self.key_tiles, 2 * self.dim_tiles
        self.k_row, self.v_row = 8 * row_chunks(spec.head_dim), 8 * row_chunks(self.slice)
        self.v_from = self.keys * self.k_row
        self.shared = self.v_from + self.keys * self.v_row  # numbers of 16 bits
        # Scores are scaled where something is added to them, else in the exponent.
        self.scales = spec.softcap or spec.bias or spec.relative_bias or spec.alibi
        self.row_of = device_function(row_of)
        self.key_of = device_function(key_of)


def row_of(r, ty):
    """The row of a tile that the scores ``s[r]`` of a thread are of."""
    return ty + 8 * r


def key_of(c, tx):
    """The key of a tile that its scores ``s[:, c]`` are of."""
    return c // 2 * 8 + 2 * tx + c % 2


@cache
def compiled(kind: TensorSpec):
    """The kernel, to be launched with ``[(tiles, slices, parts), threads]``; blocks of threads
    beyond the last part along the third axis do nothing.
    """
    b, spec = TensorBlocks(kind), kind.spec
    ROWS, COLS, SUMS, SHARED = b.rows, b.cols, b.sums, b.shared
    BLOCK_Q, BLOCK_K, SLICE, THREADS = b.queries, b.keys, b.slice, b.threads
    Q_REGISTERS = 4 * b.k_steps
    MASKED, ALIGNMENT = spec.mask, None if SIMULATED else 16
    HIDES = spec.mask or spec.bias or spec.relative_bias
    SCALES, ZERO, INF = b.scales, np.float32(0), np.float32(math.inf)
    describe_rows = row_describer(b)
    load_queries, load_keys, load_values = query_loader(b), loader(b, kind, 0), loader(b, kind, 1)
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
        saw = cuda.local.array(ROWS, np.int32)
        base = cuda.local.array(ROWS, np.float32)  # what sums are relative to in the end
        rows = Rows(
            row_query, row_head, row_place, row_scale, row_start, row_stop, saw, top, top, total,
            total, saw,
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
            top[r], total[r], saw[r] = -INF, ZERO, 0
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
            wait_all()
            cuda.syncthreads()
            load_values(shared, v, v_at, v_row, v_dim, begin, first, last, n_cols, t)
            commit()
            score(s, q_registers, shared, lane)
            wait_all()
            cuda.syncthreads()
            if not MASKED and begin + BLOCK_K < last:  # while the softmax is at work
                load_keys(shared, k, k_at, k_row, k_dim, begin + BLOCK_K, first, last, n_cols, t)
                commit()
                ready = True
            if SCALES or partial:
                seen = apply_options(s, seen, partial, rows, options, begin, tx, ty)
            weigh(s, seen, top, total, saw, unit, acc)
            accumulate(acc, s, shared, lane)

        out_strides = strides_of(layout, Operands.OUT)
        out_at = place_of(layout, Operands.OUT, entry, first_head) + first_dim * out_strides[2]
        out_at += part * layout[Fields.OUT_PART]
        at = (entry * heads + first_head) * layout[Fields.N_QUERIES]
        at += part * layout[Fields.ROW_PART]
        lost = finish(acc, top, total, saw, base, options, rows, out, out_at, out_strides, n_rows,
                      n_cols, ty, tx)  # fmt: skip
        write_results(flags, lse, row_max, top, total, base, lost, rows, at, layout, n_rows, ty, tx)

    return kernel(attend, b.registers)


def query_loader(b: TensorBlocks):
    """A device function that reads the left sides of the first product, 0 beyond the end."""
    K_STEPS, HEAD_DIM = b.k_steps, b.spec.head_dim

    def load_queries(fragment, q, rows, n_rows, dim_stride, ty, tx):
        for step in range(K_STEPS):
            for register in range(4):
                row, bits = ty + register % 2 * 8, 0
                for half in range(2):
                    d = 16 * step + register // 2 * 8 + 2 * tx + half
                    if row < n_rows and d < HEAD_DIM:
                        bits |= np.int64(q[rows.place[row] + d * dim_stride]) << 16 * half
                fragment[4 * step + register] = np.uint32(bits)

    return device_function(load_queries)


def loader(b: TensorBlocks, kind: TensorSpec, operand: int):
    """A device function that begins to copy a tile of k, or of v for `operand` 1, to shared memory;
    rows outside ``[first, last)``, which no query sees, and columns beyond the end are 0.
    """
    TO_ROW, TO = (b.v_row, b.v_from) if operand else (b.k_row, 0)
    WIDTH = 8 * b.dim_tiles if operand else 16 * b.k_steps
    HEAD_DIM, KEYS, THREADS = b.spec.head_dim, b.keys, b.threads
    CHUNKS = WIDTH // 8
    AT_ONCE = THREADS // CHUNKS  # rows; threads that are left over copy nothing
    ROUNDS, ACTIVE = -(-KEYS // AT_ONCE), AT_ONCE * CHUNKS

    def load_vectors(shared, x, at, row_stride, dim_stride, begin, first, last, n_cols, t):
        if t >= ACTIVE:
            return
        row, d = t // CHUNKS, t % CHUNKS * 8
        width = n_cols if operand else HEAD_DIM
        count = np.int32(min(max(width - d, 0), 8))
        from_ = at + (begin + row) * row_stride + d
        to = TO + row * TO_ROW + d
        for n in range(ROUNDS):
            key = begin + row + n * AT_ONCE
            here = count if first <= key and key < last else np.int32(0)
            if ROUNDS * AT_ONCE == KEYS or row + n * AT_ONCE < KEYS:
                copy16(shared, to, x, from_ if here > 0 else np.int64(0), here)
            from_ += AT_ONCE * row_stride
            to += AT_ONCE * TO_ROW

    def load_elements(shared, x, at, row_stride, dim_stride, begin, first, last, n_cols, t):
        width = n_cols if operand else HEAD_DIM
        for n in range(t, KEYS * WIDTH, THREADS):
            row, d = n // WIDTH, n % WIDTH
            key, bits = begin + row, np.uint16(0)
            if first <= key and key < last and d < width:
                bits = x[at + key * row_stride + d * dim_stride]
            shared[TO + row * TO_ROW + d] = bits

    return device_function(load_vectors if kind.vectors else load_elements)


def score_maker(b: TensorBlocks, kind: TensorSpec):
    """A device function that multiplies queries by a tile of k."""
    ROWS, COLS, K_STEPS, PAIRS, K_ROW = b.rows, b.cols, b.k_steps, b.key_tiles // 2, b.k_row
    mma, load, address = mma_maker(kind.dtype), load_matrices(False), device_function(key_address)
    ZERO = np.float32(0)

    def score(s, q_registers, shared, lane):
        keys = cuda.local.array(4, np.uint32)
        key, dim = address(lane)
        at = key * K_ROW + dim
        for r in range(ROWS):
            for c in range(COLS):
                s[r, c] = ZERO
        for step in range(K_STEPS):
            for pair in range(PAIRS):
                load(keys, shared, at + 16 * (pair * K_ROW + step))
                mma(s, 4 * pair, q_registers, 4 * step, keys, 0)
                mma(s, 4 * pair + 2, q_registers, 4 * step, keys, 2)

    return device_function(score)


def accumulate_maker(b: TensorBlocks, kind: TensorSpec):
    """A device function that adds weights times a tile of v: as the scores lie, weights are the
    left sides of the second product.
    """
    STEPS, PAIRS, V_ROW, V_FROM = b.keys // 16, b.dim_tiles // 2, b.v_row, b.v_from
    mma, load, pack = mma_maker(kind.dtype), load_matrices(True), pack_maker(kind.dtype)
    address = device_function(value_address)

    def accumulate(acc, s, shared, lane):
        weights = cuda.local.array(4, np.uint32)
        values = cuda.local.array(4, np.uint32)
        key, dim = address(lane)
        at = V_FROM + key * V_ROW + dim
        for step in range(STEPS):
            for register in range(4):
                r, c = register % 2, 4 * step + register // 2 * 2
                weights[register] = pack(s[r, c], s[r, c + 1])
            for pair in range(PAIRS):
                load(values, shared, at + 16 * (step * V_ROW + pair))
                mma(acc, 4 * pair, weights, 0, values, 0)
                mma(acc, 4 * pair + 2, weights, 0, values, 2)

    return device_function(accumulate)


def weigh_maker(b: TensorBlocks):
    """A device function that raises the maxima, makes scores weights and sums them."""
    ROWS, COLS, SUMS = b.rows, b.cols, b.sums
    ZERO, INF = np.float32(0), np.float32(math.inf)

    def weigh(s, seen, top, total, saw, unit, acc):
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
                saw[r] = 1
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

    def finish(acc, top, total, saw, base, options, rows, out, out_at, out_strides, n_rows, n_cols,
               ty, tx):  # fmt: skip
        lost = 0
        out_head, out_row, out_dim = out_strides
        for r in range(ROWS):
            row = ty + 8 * r
            for mask in (1, 2):
                total[r] += shuffle_xor(total[r], mask)
                saw[r] |= shuffle_xor(saw[r], mask)
            if row < n_rows and not SCALES:
                top[r] *= rows.scale[row]
            not_finite = ZERO
            for n in range(SUMS):
                not_finite += ZERO * acc[r, n]
            if not (total[r] <= MOST and (total[r] > ZERO or saw[r] == 0) and not_finite == ZERO):
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
