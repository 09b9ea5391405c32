"""The two products of a tile by tensor cores, and the copies to shared memory that feed them."""

from __future__ import annotations

import numpy as np

from .fragments import key_address, swizzled, value_address
from .instructions import (
    copy16,
    fence,
    load_matrices,
    mma_maker,
    pack_maker,
    wait_all,
    wgmma_maker,
)
from .tensor_tile import TensorBlocks, TensorSpec
from .toolkit import cuda, device_function

__all__ = ["accumulate_maker", "arrival", "loader", "query_loader", "score_maker"]


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
    place = placer(kind, TO_ROW, KEYS)
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
        for n in range(ROUNDS):
            key = begin + row + n * AT_ONCE
            here = count if first <= key and key < last else np.int32(0)
            if ROUNDS * AT_ONCE == KEYS or row + n * AT_ONCE < KEYS:
                to = TO + place(row + n * AT_ONCE, d)
                copy16(shared, to, x, from_ if here > 0 else np.int64(0), here)
            from_ += AT_ONCE * row_stride

    def load_elements(shared, x, at, row_stride, dim_stride, begin, first, last, n_cols, t):
        width = n_cols if operand else HEAD_DIM
        for n in range(t, KEYS * WIDTH, THREADS):
            row, d = n // WIDTH, n % WIDTH
            key, bits = begin + row, np.uint16(0)
            if first <= key and key < last and d < width:
                bits = x[at + key * row_stride + d * dim_stride]
            shared[TO + place(row, d)] = bits

    return device_function(load_vectors if kind.vectors else load_elements)


def placer(kind: TensorSpec, to_row: int, rows: int):
    """A device function: where an element of a tile lies in shared memory."""
    if kind.wgmma:
        place = device_function(swizzled)
        return device_function(lambda row, dim: place(row, dim, rows))
    return device_function(lambda row, dim: row * to_row + dim)


def arrival(kind: TensorSpec):
    """A device function that waits until what this thread has copied can be multiplied."""
    WGMMA = kind.wgmma

    def arrive():
        wait_all()
        if WGMMA:
            fence()

    return device_function(arrive)


def score_maker(b: TensorBlocks, kind: TensorSpec):
    """A device function that multiplies queries by a tile of k."""
    if kind.wgmma:
        multiply = wgmma_maker(kind.dtype, 4 * b.cols, b.k_steps, b.keys, False)
        return device_function(
            lambda s, q_registers, shared, lane: multiply(s, q_registers, shared, 0)
        )
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
    if kind.wgmma:
        multiply = wgmma_maker(kind.dtype, 4 * b.sums, STEPS, b.keys, True)
        REGISTERS = 4 * STEPS

        def accumulate_all(acc, s, shared, lane):
            weights = cuda.local.array(REGISTERS, np.uint32)
            for step in range(STEPS):
                for register in range(4):
                    r, c = register % 2, 4 * step + register // 2 * 2
                    weights[4 * step + register] = pack(s[r, c], s[r, c + 1])
            multiply(acc, weights, shared, V_FROM)

        return device_function(accumulate_all)

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
