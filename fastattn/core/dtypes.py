"""Dtypes: by name, bfloat16 among them, and what is computed in which."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

import numpy as np

from .int4 import GROUP, unpack

__all__ = [
    "FLOAT32",
    "FLOAT64",
    "FLOATS",
    "as_real",
    "chosen_dtype",
    "float_dtype",
    "float_type",
    "is_float",
    "is_real",
    "wider",
    "widest",
]

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
FLOATS = ("float32", "float64", "float16", "bfloat16")
_FLOATS = "float16, bfloat16, float32 or float64 (integers and bools become float64)"


def float_type(name: str) -> np.dtype:
    """The dtype called `name`; bfloat16 and float8_e4m3fn need ``ml_dtypes``."""
    if name in ("bfloat16", "float8_e4m3fn"):
        return np.dtype(getattr(import_module("ml_dtypes"), name))
    return np.dtype(name)


def chosen_dtype(name: str, value) -> np.dtype:
    """The dtype that an argument names, one that is computed in, or an error that begins with the
    argument's name.
    """
    try:
        dtype = float_type(value) if isinstance(value, str) else np.dtype(value)
    except ImportError:
        raise ValueError(f"{name}: expected an installed dtype, got {value}, which needs the "
                         "package ml_dtypes") from None  # fmt: skip
    except TypeError:
        raise TypeError(f"{name}: expected {_FLOATS}, got {value!r}") from None
    if value is None or dtype.kind in "biu":
        raise TypeError(f"{name}: expected one of {', '.join(FLOATS)}, got {value!r}")
    return float_dtype(name, np.empty(0, dtype))


def float_dtype(name: str, x: np.ndarray) -> np.dtype:
    """The dtype that `x` is computed in, or an error that names the argument."""
    dtype = _computed_in(x.dtype)
    if dtype is None:
        raise TypeError(f"{name}: expected {_FLOATS}, got {x.dtype}")
    return dtype


@lru_cache  # a dtype's name takes 2 us
def _computed_in(dtype: np.dtype) -> np.dtype | None:
    if dtype.kind in "biu":
        return FLOAT64
    return np.dtype(dtype.type) if is_float(dtype) else None  # native


@lru_cache
def is_float(dtype: np.dtype) -> bool:
    """Is it one of `FLOATS`, in whatever byte order?"""
    return dtype.name in FLOATS


def widest(wanted: set) -> np.dtype:
    """The dtype in which all of `wanted` are computed together."""
    for dtype in (FLOAT64, FLOAT32):
        if dtype in wanted:
            return dtype
    return wanted.pop() if len(wanted) == 1 else FLOAT32  # float16 with bfloat16


def wider(dtype, other) -> np.dtype:
    """The wider of `dtype` and the real dtype `other`; long double counts as float64."""
    short = (other.kind == "f" and other.itemsize < 8) or _is_bfloat16(other)
    return widest({dtype, other.newbyteorder("=") if short else FLOAT64})


def _is_bfloat16(dtype) -> bool:
    return dtype.name == "bfloat16"


def is_real(dtype) -> bool:
    """Is it of integers or of floats that options may have? Of ml_dtypes bfloat16 alone is, though
    float8_e5m2 too is of the kind "f".
    """
    return dtype.kind in "iu" or issubclass(dtype.type, np.floating) or _is_bfloat16(dtype)


def as_real(x, scales, real, dim):
    """Keys or values of `dim` numbers in the dtype `real`, as they lie or as a cache stores them:
    int8 with `scales` (..., 1) or int4 with (..., groups), which are uint8.
    """
    if x.dtype == np.uint8:
        scales = np.repeat(scales, GROUP, axis=-1)[..., :dim]
        x = unpack(x, dim)
    x = x.astype(real)
    return x if scales is None else x * scales.astype(real)
