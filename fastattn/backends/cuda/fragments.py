"""Where the elements of a tile lie in the registers of a warp's 32 lanes.

The maps are those of ``mma.sync.m16n8k16`` and of ``ldmatrix`` in NVIDIA's PTX ISA, sections
"Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix". They are plain
functions of numbers, for kernels and for NumPy.
"""

from __future__ import annotations

__all__ = [
    "a_element", "b_element", "c_element", "key_address", "loaded", "row_chunks", "value_address",
]  # fmt: skip


def a_element(lane, register, half):
    """``(row, k)`` of the left side, 16 x 16: one of the two numbers in a register."""
    return lane // 4 + 8 * (register % 2), 2 * (lane % 4) + half + 8 * (register // 2)


def b_element(lane, register, half):
    """``(k, column)`` of the right side, 16 x 8."""
    return 2 * (lane % 4) + half + 8 * register, lane // 4


def c_element(lane, register):
    """``(row, column)`` of the sums, 16 x 8, a number to a register."""
    return lane // 4 + 8 * (register // 2), 2 * (lane % 4) + register % 2


def loaded(lane, half, transposed):
    """``(row, column)`` of an 8 x 8 matrix that a lane gets from `ldmatrix`."""
    if transposed:
        return 2 * (lane % 4) + half, lane // 4
    return lane // 4, 2 * (lane % 4) + half


def key_address(lane):
    """``(key, dim)`` of the row of 8 dims whose address a lane gives, so that four matrices are the
    right sides of two products, with 8 keys each, over 16 dims.
    """
    return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 8


def value_address(lane):
    """``(key, column)`` of the row of 8 columns whose address a lane gives, so that four transposed
    matrices are the right sides of two products, with 8 columns each, over 16 keys.
    """
    return lane % 8 + lane // 8 % 2 * 8, lane // 16 * 8


def row_chunks(dims):
    """The length, in chunks of 8 numbers, of a row of `dims` in shared memory: an odd number, so
    that 8 rows that are read at once lie in different banks.
    """
    return (dims + 15) // 16 * 2 + 1
