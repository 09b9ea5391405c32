"""The instructions of `ptx`, for Numba's simulator.

What a warp does at once is computed once, by the maps of `fragments`, when all of its 32 threads
have brought their registers.
"""

from __future__ import annotations

import threading
from functools import cache
from threading import Barrier

import numpy as np

from .fragments import a_element, b_element, c_element, descriptor, loaded, step_offset

__all__ = [
    "commit", "copy16", "exp2", "fence", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all", "wgmma_maker",
]  # fmt: skip

LANES = 32
PATIENCE = 60  # seconds, after which a warp that is not complete is an error

_making = threading.Lock()

# For the maps: the lanes of a warp, the registers of a fragment and the halves of a register.
_LANE, _HALF = np.arange(LANES)[:, None, None], np.arange(2)
_REGISTER = np.arange(4)[:, None]


class _Warp:
    def __init__(self):
        self.brought = [None] * LANES
        self.barrier = Barrier(LANES, self.work, PATIENCE)

    def work(self):
        self.result = self.combine(self.brought)


def _together(x, combine):
    """``(lane, combine([what each lane brings]))``."""
    thread = threading.current_thread()
    lane, number = thread.thread_id % LANES, thread.thread_id // LANES
    with _making:
        warps = thread._manager.__dict__.setdefault("warps", {})
        if number not in warps:
            warps[number] = _Warp()
        warp = warps[number]
    warp.brought[lane], warp.combine = x, combine
    warp.barrier.wait()
    return lane, warp.result


def commit():
    """Copies are done when they are begun."""


def wait_all():
    pass


def fence():
    pass


def copy16(shared, to, x, at, count):
    shared[to : to + 8] = 0
    if count:
        shared[to : to + count] = x[at : at + count]


def _numbers(bits, dtype):
    """The numbers of 16 bits each, as float32."""
    if dtype == "float16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _halves(registers, dtype):
    """The two numbers in each register, along a last axis."""
    return _numbers(np.stack([registers & 0xFFFF, registers >> 16], axis=-1), dtype)


def load_matrices(transposed):
    def load(fragment, shared, at):
        lane, rows = _together(at, list)
        for matrix in range(4):
            bits = 0
            for half in range(2):
                row, column = loaded(lane, half, transposed)
                bits |= int(shared[rows[8 * matrix + row] + column]) << 16 * half
            fragment[matrix] = bits

    return load


@cache
def mma_maker(dtype):
    def product(everyone):
        numbers = _halves(np.array(everyone, np.uint32), dtype)
        left, right = np.empty((16, 16), np.float32), np.empty((16, 8), np.float32)
        left[a_element(_LANE, _REGISTER, _HALF)] = numbers[:, :4]
        right[b_element(_LANE, _REGISTER[:2], _HALF)] = numbers[:, 4:]
        return left @ right

    def mma(sums, n, a, a_at, b, b_at):
        own = [int(x) for x in (*a[a_at : a_at + 4], *b[b_at : b_at + 2])]
        lane, total = _together(own, product)
        row, column = c_element(lane, 0)
        sums[:, n : n + 2] += total[row : row + 9 : 8, column : column + 2]

    return mma


def _by_descriptor(start, described, k, n, transposed):
    """Where `wgmma` reads an element of its right side, in bytes: the manual's canonical layouts
    for a swizzle of 128 bytes, by which bits 4 to 6 of an address are exchanged by bits 7 to 9.
    """
    next_rows, next_block = (described >> 32 & 0x3FFF) * 16, (described >> 16 & 0x3FFF) * 16
    if transposed:
        at = start + n // 64 * next_block + k // 8 * next_rows + k % 8 * 128 + n % 64 * 2
    else:
        at = start + n // 8 * next_rows + n % 8 * 128 + 2 * k
    return at ^ (at >> 7 & 7) << 4


@cache
def wgmma_maker(dtype, columns, steps, rows, transposed):
    described = descriptor(rows, transposed)
    k, n = np.arange(16)[:, None], np.arange(columns)

    def multiply(sums, a, shared, at):
        def product(everyone):
            numbers = _halves(np.array(everyone, np.uint32), dtype)
            total = np.zeros((16, columns), np.float32)
            for step in range(steps):
                left = np.empty((16, 16), np.float32)
                left[a_element(_LANE, _REGISTER, _HALF)] = numbers[:, 4 * step : 4 * step + 4]
                start = 2 * at + 16 * step_offset(step, rows, transposed)
                places = _by_descriptor(start, described, k, n, transposed) // 2
                total += left @ _numbers(shared[places], dtype)
            return total

        lane, total = _together([int(x) for x in a], product)
        row, column = c_element(lane, 0)
        own = total[row : row + 9 : 8].reshape(2, -1, 8)[:, :, column : column + 2].reshape(2, -1)
        sums[...] = sums + own if transposed else own

    return multiply


@cache
def pack_maker(dtype):
    def pack(low, high):
        both = np.array([low, high], np.float32)
        if dtype == "float16":
            bits = both.astype(np.float16).view(np.uint16).astype(np.uint32)
        else:  # to nearest, ties to even
            bits = both.view(np.uint32).astype(np.uint64)
            bits = np.where(np.isnan(both), 0x7FFF, bits + 0x7FFF + (bits >> 16 & 1) >> 16)
        return np.uint32(int(bits[0]) | int(bits[1]) << 16)

    return pack


def exp2(x):
    return np.exp2(np.float32(x))


def shuffle_xor(x, mask):
    lane, everyone = _together(x, list)
    return everyone[lane ^ mask]
