"""Where the elements of a tile lie in the registers of a warp's 32 lanes, and in shared memory.

The maps are those of ``mma.sync.m16n8k16``, ``ldmatrix`` and ``wgmma`` in NVIDIA's PTX ISA, in
"Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix" and "Asynchronous
Warpgroup Level Matrix Shared Memory Layout". They are plain functions of numbers, for kernels and
for NumPy. The rows of a warp in ``wgmma.m64nNk16`` lie as those of ``mma.m16n8k16``.
"""

from __future__ import annotations

__all__ = [
    "a_element", "b_element", "c_element", "descriptor", "key_address", "loaded", "row_chunks",
    "step_offset", "swizzled", "value_address",
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


def swizzled(row, dim, rows):
    """Where `wgmma` wants an element of a tile of so many rows, in numbers of 16 bits: in blocks of
    64 columns, rows of 128 bytes, whose chunks of 16 bytes change places from row to row.
    """
    return dim // 64 * (rows * 64) + row * 64 + (dim % 64 // 8 ^ row % 8) * 8 + dim % 8


def descriptor(rows, transposed):
    """The matrix descriptor of such a tile as the right side of `wgmma`, less its address: of k, or
    of v, which is `transposed`. Bit 62 is the swizzle of 128 bytes; in units of 16 bytes bits 32 on
    say how far the next 8 rows are, bits 16 on, where v has more than 64 columns, the next block.
    """
    return 1 << 62 | 64 << 32 | (rows * 8 if transposed else 1) << 16


def step_offset(step, rows, transposed):
    """How far, in units of 16 bytes, the next 16 of what is summed over are: dims, or keys."""
    return 128 * step if transposed else step % 4 * 2 + step // 4 * (rows * 8)
