"""Where results lie in memory."""

from __future__ import annotations

import numpy as np

from .arguments import operand
from .device_array import DeviceArray

__all__ = ["destination", "empty_like", "may_overlap"]


def empty_like(x, shape, dtype):
    """An array of `shape` whose axes lie in memory in the order of x's."""
    if isinstance(x, DeviceArray):
        return x.planned(shape, dtype)
    lead = len(shape) - x.ndim
    x = x.reshape((1,) * lead + x.shape) if lead else x
    return np.empty_like(x, dtype, shape=shape, subok=False)


def destination(out, shape, dtype, one_head, inputs):
    """The caller's `out`, checked, as a backend may fill it; None where it has to be filled with a
    copy, because it overlaps an input or cannot be written by a kernel.
    """
    q = inputs[0]
    x = operand("out", out, q) if isinstance(q, DeviceArray) else out
    if not isinstance(x, (np.ndarray, DeviceArray)) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"out: expected a plain NumPy array, got {type(out).__name__}")
    expected = shape[1:] if one_head else shape
    if x.shape != expected:
        raise ValueError(f"out: expected shape {expected}, got {x.shape}")
    if x.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"out: expected {dtype}, got {x.dtype}")
    if not x.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    if _overlaps_itself(x):
        raise ValueError("out: expected no overlap of elements, got an array that overlaps itself")
    writable = x.dtype.isnative and x.flags.aligned and type(x) in (np.ndarray, DeviceArray)
    if writable and not any(may_overlap(x, y) for y in inputs if y is not None):
        return x[None] if one_head else x
    return None


def may_overlap(x, y) -> bool:
    return x.may_overlap(y) if isinstance(x, DeviceArray) else np.may_share_memory(x, y)


def _overlaps_itself(x) -> bool:
    axes = sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)
    if x.size == 0:
        return False
    extent = x.itemsize
    for stride, n in axes:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False  # each axis steps over all that lies within
    # Interleaved axes: rare enough to look at every address.
    address = np.zeros(1, np.int64)
    for stride, n in axes:
        address = (address[:, None] + stride * np.arange(n)).ravel()
    address.sort()
    return bool((np.diff(address) < x.itemsize).any())
