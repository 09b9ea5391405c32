"""The arrays of a call as kernels get them: one-dimensional, on the device."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from ...core.device_array import DeviceArray, packed
from .toolkit import SIMULATED, cuda

__all__ = [
    "Operand", "Result", "constant", "current_device", "dtype_name", "in_vectors", "nothing",
    "numbers", "operand", "scratch", "stored",
]  # fmt: skip


class Operand(NamedTuple):
    """An array on the device as kernels read it."""

    elements: Any  # one-dimensional, from its lowest address on
    first: int  # in elements
    strides: tuple[int, ...]  # of each axis, 0 where it broadcasts


def operand(x, axes: int, on_device: bool, stream, real) -> Operand:
    """`x`, copied to the device if it is not there, with strides of so many axes."""
    if x is None or x.size == 0:
        return Operand(nothing(real), 0, (0,) * axes)
    elements, strides, first = memory(x) if on_device else copied(x, stream)
    strides = tuple(0 if n == 1 else stride for n, stride in zip(x.shape, strides, strict=True))
    return Operand(elements, first, (0,) * (axes - len(strides)) + strides)


class Result:
    """A result on the device, and then where the caller has it."""

    elements: Any
    strides: tuple[int, ...]
    first: int
    target: Any

    def __init__(self, p, shape, dtype, target=None):
        self.shape, self.dtype, self.on_device = shape, dtype, p.on_device
        self.target = target
        if isinstance(p.q, DeviceArray):
            if target is None or target.owner is None:
                strides = packed(shape, dtype.itemsize) if target is None else target.strides
                axes = slice(1, None) if p.one_head else slice(None)
                self.target = p.q.allocate(shape[axes], strides[axes], dtype, cuda.device_array)
                if target is not None:
                    target.owner = self.target
                target = DeviceArray("out", self.target)
                target = target[None] if p.one_head else target
            self.elements, self.strides, self.first = memory(target)
        else:
            self.elements = cuda.device_array(max(1, math.prod(shape)), stored(dtype))
            self.strides, self.first = packed(shape, 1), 0

    @property
    def operand(self) -> Operand:
        return Operand(self.elements, self.first, self.strides)

    def deliver(self, stream):
        if self.on_device:
            return self.target
        flat = self.elements.copy_to_host(stream=stream)[: math.prod(self.shape)]
        stream.synchronize()
        values = flat.view(self.dtype).reshape(self.shape)
        if self.target is None:
            return values
        self.target[...] = values
        return self.target


# Of a dtype. NumPy makes the string again at each access, which takes microseconds.
dtype_name = lru_cache(maxsize=64)(attrgetter("name"))


def in_vectors(x: Operand, dim: int) -> bool:
    """Do the rows of `x`, of numbers of 16 bits, consist of whole chunks of 16 bytes?"""
    *others, last = x.strides
    address = 0 if SIMULATED else x.elements.device_ctypes_pointer.value or 0
    whole = all(n % 8 == 0 for n in (dim, x.first, *others))
    return whole and last == 1 and address % 16 == 0


def current_device() -> int:
    return getattr(cuda.get_current_device(), "id", 0)


def constant(x: np.ndarray):
    """`x` on the device, where an equal one is kept for the next call that needs it."""
    return _constant(current_device(), x.dtype, x.tobytes())


def numbers(x: tuple, dtype):
    """The same of some numbers, found in less time than they take to become an array."""
    return _numbers(current_device(), dtype, x)


@lru_cache(maxsize=512)
def _numbers(device: int, dtype: np.dtype, x: tuple):
    return constant(np.array(x, dtype))


@lru_cache(maxsize=512)
def _constant(device: int, dtype: np.dtype, content: bytes):
    # On a stream of its own: it is there for kernels on any, and waits for none of them.
    stream = _upload_stream(device)
    there = cuda.to_device(np.frombuffer(content, dtype), stream)
    stream.synchronize()
    return there


@lru_cache(maxsize=64)
def _upload_stream(device: int):
    return cuda.stream()


def nothing(real):
    """What stands for an operand that is not there."""
    return numbers((0,), real)


_kept = threading.local()


def scratch(name: str, size: int, dtype, stream):
    """At least `size` elements on the device, the same ones for each call that a thread makes on a
    stream, one after the other.
    """
    handle = 0 if SIMULATED else int(stream.handle)
    key = (name, current_device(), handle, np.dtype(dtype))
    held = _kept.__dict__.setdefault("arrays", {})
    if key not in held or held[key].size < size:
        held[key] = cuda.device_array(size, dtype)
    return held[key]


def memory(x: DeviceArray):
    """``(elements, strides, first)`` of an array that is on the device."""
    low, high = x.bounds()
    description = {
        "shape": ((high - low) // x.itemsize,), "strides": None, "data": (low, False),
        "typestr": stored(x.dtype).str, "version": 3,
    }  # fmt: skip
    strides = tuple(stride // x.itemsize for stride in x.strides)
    elements = cuda.from_cuda_array_interface(description, owner=x.owner)
    return elements, strides, (x.address - low) // x.itemsize


def copied(x: np.ndarray, stream):
    """The same of one in the host's memory, copied; axes that are broadcast only once."""
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
    once = np.require(_representable(once), requirements=("C", "A"))
    strides = tuple(
        0 if n < m else stride
        for n, m, stride in zip(once.shape, x.shape, packed(once.shape, 1), strict=True)
    )
    flat = once.reshape(-1) if once.size else np.zeros(1, once.dtype)
    return cuda.to_device(flat.view(stored(flat.dtype)), stream), strides, 0


def _representable(x: np.ndarray) -> np.ndarray:
    """With a dtype that the device knows; a finite number stays one."""
    native = x.dtype.newbyteorder("=")
    if native.kind != "f" or native.itemsize <= 8:
        return x.astype(native, copy=False)
    most = np.finfo(np.float64).max
    return np.where(np.isfinite(x), np.clip(x, -most, most), x).astype(np.float64)


def stored(dtype: np.dtype) -> np.dtype:
    """As the kernel reads it: the bits of a bfloat16, bools as bytes."""
    if dtype_name(dtype) == "bfloat16":
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype
