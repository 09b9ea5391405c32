"""Elements of operands in global memory, and tiles of them copied to shared memory."""

from __future__ import annotations

import math

import numpy as np

from .toolkit import device_function

__all__ = ["POSITIVE", "query_loader", "reader", "tile_loader", "writer"]

# An index masked with this is known not to count from the end.
POSITIVE = (1 << 63) - 1


def reader(bfloat16: bool, clamp: bool, real):
    """A device function that makes an element of an array a number to compute with."""
    most = np.finfo(real).max

    def read(x, index):
        return real(x[index & POSITIVE])

    def read_clamped(x, index):  # a finite number stays one, however large
        y = np.float64(x[index & POSITIVE])
        if abs(y) < math.inf:
            y = min(max(y, -np.float64(most)), np.float64(most))
        return real(y)

    def read_bfloat16(x, index):  # it is the upper half of a float32
        return real(np.uint32(np.uint32(x[index & POSITIVE]) << 16).view(np.float32))

    chosen = read_bfloat16 if bfloat16 else read_clamped if clamp else read
    return device_function(chosen)


def writer(bfloat16: bool):
    """A device function that stores a number."""

    def write(to, index, x):
        to[index & POSITIVE] = x

    def write_bfloat16(to, index, x):
        bits = np.int64(np.float32(x).view(np.uint32))
        if x != x:
            bits = 0x7FC00000
        else:  # to nearest, ties to even
            bits += 0x7FFF + (bits >> 16 & 1)
        to[index & POSITIVE] = np.uint16(bits >> 16)

    return device_function(write_bfloat16 if bfloat16 else write)


def tile_loader(read, rows, cols, to_row, threads, real):
    """A device function that copies `rows` x `cols` of k or v to shared memory, 0 beyond its end,
    and says whether this thread met a NaN or an Inf.
    """
    AT_ONCE = threads // cols  # rows; threads that are left over fetch nothing
    ROUNDS, ACTIVE = -(-rows // AT_ONCE), AT_ONCE * cols
    ZERO, MOST = real(0), np.finfo(real).max

    def load_tile(x, at, row_stride, dim_stride, n_rows, n_cols, to, t):
        wild = False
        if t < ACTIVE:
            row, d = t // cols, t % cols
            x_at = at + row * row_stride + d * dim_stride
            for n in range(ROUNDS):
                y = ZERO
                if row + n * AT_ONCE < n_rows and d < n_cols:
                    y = read(x, x_at)
                    wild |= not abs(y) <= MOST
                if row + n * AT_ONCE < rows:
                    to[(row + n * AT_ONCE) * to_row + d] = y
                x_at += AT_ONCE * row_stride
        return wild

    return device_function(load_tile)


def query_loader(read, rows, cols, to_row, threads, real):
    """A device function that copies scaled queries to shared memory, each from a place of its own,
    0 beyond their end.
    """
    AT_ONCE = threads // cols
    ROUNDS, ACTIVE = -(-rows // AT_ONCE), AT_ONCE * cols
    ZERO = real(0)

    def load_queries(q, row_place, dim_place, dim_stride, n_rows, n_cols, row_scale, to, t):
        if t < ACTIVE:
            d = t % cols
            for n in range(ROUNDS):
                row, y = t // cols + n * AT_ONCE, ZERO
                if row < n_rows and d < n_cols:
                    y = read(q, row_place[row] + dim_place + d * dim_stride) * row_scale[row]
                if row < rows:
                    to[row * to_row + d] = y

    return device_function(load_queries)
