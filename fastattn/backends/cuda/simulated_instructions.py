"""The instructions of `ptx`, for Numba's simulator: what a warp does at once, its 32 threads do by
the maps of `fragments`, each with what all have brought.
"""

from __future__ import annotations

import threading
from functools import cache
from itertools import product

import numpy as np

from .fragments import a_element, b_element, c_element, descriptor, loaded, step_offset

__all__ = [
    "commit", "copy16", "exp2", "fence", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all", "wgmma_maker",
]  # fmt: skip

LANES = 32
PATIENCE = 60  # seconds, after which a warp that is not complete is an error

_making = threading.Lock()


class _Warp:
    def __init__(self):
        self.brought = [None] * LANES
        self.barrier = threading.Barrier(LANES, timeout=PATIENCE)


def _gather(x):
    """``(lane, [what each lane brings])``."""
    thread = threading.current_thread()
    lane, number = thread.thread_id % LANES, thread.thread_id // LANES
    with _making:
        warps = thread._manager.__dict__.setdefault("warps", {})
        warp = warps.setdefault(number, _Warp())
    warp.brought[lane] = x
    warp.barrier.wait()
    everyone = list(warp.brought)
    warp.barrier.wait()
    return lane, everyone


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


def _halves(register, dtype):
    """The two numbers in a register."""
    bits = np.array([register & 0xFFFF, register >> 16], np.uint16)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def load_matrices(transposed):
    def load(fragment, shared, at):
        lane, rows = _gather(at)
        for matrix in range(4):
            bits = 0
            for half in range(2):
                row, column = loaded(lane, half, transposed)
                bits |= int(shared[rows[8 * matrix + row] + column]) << 16 * half
            fragment[matrix] = bits

    return load


@cache
def mma_maker(dtype):
    def mma(sums, n, a, a_at, b, b_at):
        own = [int(x) for x in (*a[a_at : a_at + 4], *b[b_at : b_at + 2])]
        lane, everyone = _gather(own)
        left, right = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        row, column = c_element(lane, 0)
        # Only what this lane's sums are made of: two rows and two columns.
        for other, register in product(range(LANES), range(4)):
            if a_element(other, register, 0)[0] in (row, row + 8):
                for half, x in enumerate(_halves(everyone[other][register], dtype)):
                    left[a_element(other, register, half)] = x
        for other, register in product(range(LANES), range(2)):
            if b_element(other, register, 0)[1] in (column, column + 1):
                for half, x in enumerate(_halves(everyone[other][4 + register], dtype)):
                    right[b_element(other, register, half)] = x
        for r, c in product(range(2), range(2)):
            sums[r, n + c] += np.dot(left[row + 8 * r], right[:, column + c])

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

    def multiply(sums, a, shared, at):
        lane, everyone = _gather([int(x) for x in a])
        row, column = c_element(lane, 0)
        wanted = [8 * tile + column + c for tile in range(columns // 8) for c in range(2)]
        total = np.zeros((2, len(wanted)), np.float32)
        for step in range(steps):
            start = 2 * at + 16 * step_offset(step, rows, transposed)
            left = np.zeros((2, 16), np.float32)
            for other, register in product(range(LANES), range(4)):
                its_row = a_element(other, register, 0)[0]
                if its_row % 8 == row:
                    numbers = _halves(everyone[other][4 * step + register], dtype)
                    for half, x in enumerate(numbers):
                        left[its_row // 8, a_element(other, register, half)[1]] = x
            places = [[_by_descriptor(start, described, k, n, transposed) // 2 for n in wanted]
                      for k in range(16)]  # fmt: skip
            right = [[_halves(int(shared[place]), dtype)[0] for place in line] for line in places]
            total += left @ np.array(right, np.float32)
        sums[...] = sums + total if transposed else total

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
    lane, everyone = _gather(x)
    return everyone[lane ^ mask]
