"""Numbers as they lie in memory, whatever their format, read by their address."""

from __future__ import annotations

from math import copysign, inf, isinf, ldexp

import numpy as np

from ...core.int4 import GROUP
from .memory import (
    ahead,
    flags,
    floats,
    halfwords,
    peek_uint8,
    peek_uint16,
    peek_uint32,
    peek_uint64,
    reals,
)
from .vectors import (
    VECTOR_BYTES,
    choose,
    compiled,
    constant,
    from_bits,
    lanes,
    magnitude,
    per_type,
    splat,
    swap_bytes,
    to_bits,
    with_sign_of,
)

__all__ = [
    "FORMATS", "REAL", "STORED", "bounded", "finite_most", "format_of", "is_finite", "read",
    "rounded", "widen", "write",
]  # fmt: skip

REAL = 0  # the type of the computation
HALF, BFLOAT16, FLOAT32, FLOAT64, X87, INT8, INT16, INT32, INT64, UINT8, UINT16, UINT32, UINT64 = (
    range(1, 14)
)
FORMATS = {
    "float16": HALF, "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64,
    "int8": INT8, "int16": INT16, "int32": INT32, "int64": INT64,
    "uint8": UINT8, "uint16": UINT16, "uint32": UINT32, "uint64": UINT64,
}  # fmt: skip
if np.finfo(np.longdouble).nmant == 63 and np.dtype(np.longdouble).itemsize == 16:
    FORMATS.setdefault(np.dtype(np.longdouble).name, X87)
# What only a cache has, which `widen` alone knows; int4 are two in a byte.
FLOAT8, INT4 = 14, 15
STORED = {**FORMATS, "float8_e4m3fn": FLOAT8, "uint8": INT4}

finite_most = per_type(float(np.finfo(np.float32).max), float(np.finfo(np.float64).max))


def format_of(dtype: np.dtype) -> int | None:
    """The format of a dtype of any byte order; None: `read` does not know it."""
    return FORMATS.get(dtype.name)


@compiled
def half(bits):
    """A float16 as a float64."""
    magnitude = from_bits((bits & 0x7FFF) << 42, 0.0) * 2.0**1008
    if bits & 0x7C00 == 0x7C00:  # Inf or NaN
        magnitude = from_bits((0x1FFC00 | bits & 0x3FF) << 42, 0.0)
    return -magnitude if bits & 0x8000 else magnitude


@compiled
def bfloat16(bits):
    """A bfloat16, which is the upper half of a float32."""
    return from_bits(bits << 16, np.float32(0))


@compiled
def float8(bits):
    """A float8_e4m3fn, as float64."""
    magnitude = from_bits((bits & 0x7F) << 49, 0.0) * 2.0**1016
    if bits & 0x7F == 0x7F:
        magnitude = from_bits(0x7FF8 << 48, 0.0)
    return -magnitude if bits & 0x80 else magnitude


@compiled
def widen(address, row, step, rows, dims, format, scales, scales_row, target):
    """Rows of any format, those of int8 and int4 times their `scales`, strides in bytes, as rows of
    `target`, one behind the other.
    """
    groups = scales_row // 4
    for j in range(rows):
        source, to = address + j * row, ahead(target, j * dims)
        if format == REAL:
            numbers = reals(source, to[0])
            apart = step // (VECTOR_BYTES // lanes(to[0]))
            for d in range(dims):
                to[d] = numbers[d * apart]
        elif format == INT4:
            packed = flags(source)
            for d in range(dims):
                half_byte = np.int64(packed[d // 2 * step]) >> 4 * (d % 2) & 15
                to[d] = np.float64(half_byte - 8) * np.float64(scales[j * groups + d // GROUP])
        elif format == FLOAT8:
            packed = flags(source)
            for d in range(dims):
                to[d] = float8(np.int64(packed[d * step]))
        elif format == INT8:
            scale, numbers = np.float64(scales[j * groups]), flags(source)
            for d in range(dims):
                to[d] = np.float64(np.int8(numbers[d * step])) * scale
        elif format == FLOAT32:
            singles = floats(source)
            for d in range(dims):
                to[d] = singles[d * (step // 4)]
        else:
            words, apart = halfwords(source), step // 2
            for d in range(dims):
                bits = np.int64(words[d * apart])
                to[d] = bfloat16(bits) if format == BFLOAT16 else half(bits)


@compiled
def write(address, format, x):
    """The number `x`, a float32 if it is to be rounded to a half, to nearest and ties to even."""
    if format == REAL:
        reals(address, x)[0] = x
    elif format == BFLOAT16:
        bits = to_bits(np.float32(x))
        if x != x:
            halfwords(address)[0] = bits >> 16 | 0x40
        else:
            halfwords(address)[0] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    else:
        bits = to_bits(np.float32(x))
        sign, size = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
        if size > 0x7F800000:
            size = 0x7E00
        elif size >= 0x477FF000:  # 65520 rounds to infinity
            size = 0x7C00
        elif size < 0x38800000:  # subnormal: adding 1/2 leaves it in the lowest bits
            size = to_bits(from_bits(size, np.float32(0)) + np.float32(0.5)) - 0x3F000000
        else:
            size = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13
        halfwords(address)[0] = sign | size


@compiled
def read(address, format, swapped):
    """One number as a float64; a finite one stays finite."""
    if format == X87:
        return x87(address, swapped)
    size = (8, 2, 2, 4, 8, 16, 1, 2, 4, 8, 1, 2, 4, 8)[format]
    if size == 1:
        bits = np.uint64(peek_uint8(address))
    elif size == 2:
        bits = np.uint64(peek_uint16(address))
    elif size == 4:
        bits = np.uint64(peek_uint32(address))
    else:
        bits = peek_uint64(address)
    if swapped:
        bits = swap_bytes(bits) >> np.uint64(64 - 8 * size)
    return decode(np.int64(bits), format)


@compiled
def decode(bits, format):
    if format == FLOAT32:
        return np.float64(from_bits(bits, np.float32(0)))
    if format == FLOAT64:
        return from_bits(bits, 0.0)
    if format == HALF:
        return half(bits)
    if format == BFLOAT16:
        return np.float64(bfloat16(bits))
    if format == INT8:
        return np.float64(np.int8(bits))
    if format == INT16:
        return np.float64(np.int16(bits))
    if format == INT32:
        return np.float64(np.int32(bits))
    if format == UINT64:
        return np.float64(np.uint64(bits))
    return np.float64(bits)


@compiled
def x87(address, swapped):
    """An 80-bit long double in 16 bytes."""
    if swapped:
        mantissa = swap_bytes(peek_uint64(address + 8))
        top = np.int64(swap_bytes(np.uint64(peek_uint16(address + 6))) >> np.uint64(48))
    else:
        mantissa = peek_uint64(address)
        top = np.int64(peek_uint16(address + 8))
    exponent = top & 0x7FFF
    if exponent == 0x7FFF:
        value = inf if mantissa << np.uint64(1) == 0 else inf - inf
    else:
        value = ldexp(np.float64(mantissa), exponent - 16383 - 63)
        if isinf(value):
            value = finite_most(0.0)
    return copysign(value, -1.0 if top & 0x8000 else 1.0)


@compiled
def is_finite(x, like):
    """Which lanes of a vector are?"""
    return magnitude(x) <= splat(finite_most(like))


@compiled
def bounded(total, finite, like):
    """A vector of sums; those of finite numbers that overflow are the largest number still."""
    most = splat(finite_most(like))
    bound = choose(magnitude(total) > most, with_sign_of(most, total), total)
    return choose(finite, bound, total)


@compiled
def rounded(x, like):
    """A float64 in the type of `like`; a finite one stays finite."""
    most = np.float64(finite_most(like))
    if abs(x) > most and not isinf(x):  # false for NaN
        x = copysign(most, x)
    return constant(x, like)
