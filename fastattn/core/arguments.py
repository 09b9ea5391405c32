"""Single arguments, by their names: each as what it is meant to be, or an error that names it."""

from __future__ import annotations

import operator
import sys
from itertools import zip_longest
from numbers import Real
from types import FunctionType

import numpy as np

from .device_array import DeviceArray, on_device
from .dtypes import float_dtype, is_real
from .foreign import as_array

__all__ = [
    "FAR", "broadcast", "broadcast_shapes", "count", "flag", "function", "in_range", "integer",
    "integers", "number", "operand", "plain", "positive", "renamed", "shaped", "vector",
]  # fmt: skip

# Positions beyond this are as good as infinite; sums of three of them still fit an int64.
FAR = 1 << 61


def plain(name, value) -> np.ndarray:
    """`value` as an array in the host's memory, or an error that names the argument."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked array; pass mask= instead")
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if on_device(value):
        raise TypeError(f"{name}: expected an array in the host's memory, got one on a CUDA device")
    return as_array(name, value)


def operand(name, value, q=None):
    """`value` as an array, which must lie where `q` does."""
    if type(value) is not np.ndarray and on_device(value):
        if q is not None and not isinstance(q, DeviceArray):
            raise TypeError(
                f"{name}: expected an array in the host's memory like q, got one on a CUDA device"
            )
        x = DeviceArray(name, value)
        if q is not None and None not in (x.device, q.device) and x.device != q.device:
            raise ValueError(
                f"{name}: expected an array on CUDA device {q.device} like q, "
                f"got one on device {x.device}"
            )
        return x
    if isinstance(q, DeviceArray):
        raise TypeError(
            f"{name}: expected an array on the CUDA device like q, got one in the host's memory"
        )
    return plain(name, value)


def flag(name: str, value) -> bool:
    """True or False, or an error that names the argument."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name}: expected bool, got {type(value).__name__}")


def number(name: str, value) -> float:
    """A real number, or an error that names the argument."""
    if type(value) is float:
        return value
    if isinstance(value, Real) and not isinstance(value, (bool, np.generic)):
        try:
            return float(value)
        except OverflowError:
            most = sys.float_info.max
            return most if value == abs(value) else -most
    x = plain(name, value)
    if x.ndim or not is_real(x.dtype):
        what = x.dtype if x.ndim == 0 else f"array of shape {x.shape}"
        raise TypeError(f"{name}: expected a real number, got {what}")
    return float(in_range(x, np.float64))


def positive(name: str, value) -> float:
    """A finite number > 0, or an error that names the argument."""
    x = number(name, value)
    if not 0 < x < np.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {x}")
    return x


def in_range(x, dtype) -> np.ndarray:
    """`x` with its finite numbers drawn in to what `dtype` can hold; infinite ones stay so."""
    most = np.finfo(dtype).max
    if np.can_cast(x.dtype, dtype):
        return x
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(x), x, np.clip(x, -most, most))


def integer(name: str, value) -> int:
    """A whole number, or an error that names the argument."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}") from None


def count(name: str, value) -> int:
    """A whole number of at least 1, or an error that names the argument."""
    n = integer(name, value)
    if n < 1:
        raise ValueError(f"{name}: expected at least 1, got {n}")
    return n


def function(name: str, value) -> None:
    """A Python function, or a compiled one that was made of it; else an error that names it."""
    if not isinstance(getattr(value, "py_func", value), FunctionType):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def integers(name: str, value) -> np.ndarray:
    """`value` as int64, far values drawn in to +-2**61."""
    x = plain(name, value)
    listed = x.dtype.kind == "f" and isinstance(value, (list, tuple))
    items = np.array(value, object) if listed else x  # NumPy makes float64 of [2**63, -1]
    if items.dtype.kind == "O" and all(type(item) is int for item in items.flat):
        x = items  # Python integers too large for int64
    elif x.dtype.kind not in "iu" and x.size:
        raise TypeError(f"{name}: expected integers, got {x.dtype}")
    if x.dtype.kind == "u":
        return np.minimum(x, np.asarray(FAR, np.uint64)).astype(np.int64)
    return np.asarray(np.clip(x, -FAR, FAR)).astype(np.int64)


def vector(name: str, value, dim: int) -> np.ndarray:
    """`dim` real numbers as float64, or an error that names the argument."""
    x = plain(name, value)
    if not is_real(x.dtype):
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.shape != (dim,):
        raise ValueError(f"{name}: expected shape ({dim},), got {x.shape}")
    return np.ascontiguousarray(in_range(x, np.float64), np.float64)


def shaped(name: str, value, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of exactly that shape, or an error that names the argument."""
    x = plain(name, value)
    float_dtype(name, x)
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {x.shape}")
    return x


def broadcast_shapes(*shapes) -> tuple[int, ...]:
    """As `numpy.broadcast_shapes`, which takes no more than 32 axes of the 64 of an array."""
    found = []
    for lengths in zip_longest(*map(reversed, shapes), fillvalue=1):
        own = set(lengths) - {1}
        if len(own) > 1:
            raise ValueError(f"{' and '.join(map(str, shapes))} do not broadcast")
        found.append(own.pop() if own else 1)
    return tuple(reversed(found))


def broadcast(name: str, x, shape, axes: str):
    """`x` broadcast to `shape`, whose axes are told in words, or an error that names `x`."""
    try:
        return x.broadcast_to(shape) if isinstance(x, DeviceArray) else np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {axes} = {shape}, got {x.shape}"
        ) from None


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """A TypeError or ValueError that begins with the name that its argument has elsewhere."""
    if type(error) not in (TypeError, ValueError):
        return error
    name, colon, rest = str(error).partition(":")
    return type(error)(names.get(name, name) + colon + rest)
