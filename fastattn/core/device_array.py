"""Arrays in the memory of a CUDA device, as their ``__cuda_array_interface__`` describes them.

`make_problem` reads shapes, strides and dtypes, never elements, so a `DeviceArray` with these
is all it needs. What their library is, is asked here and nowhere else.
"""

from __future__ import annotations

import math
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

from .dtypes import float_type

__all__ = ["DeviceArray", "on_device", "packed"]


def on_device(x: Any) -> bool:
    """Is `x` an array in the memory of a CUDA device?"""
    try:
        return hasattr(x, "__cuda_array_interface__")
    except RuntimeError:  # torch will not describe it; making it a DeviceArray says why
        return getattr(x, "is_cuda", True)


class DeviceArray:
    """The description of an array on a device.

    Attributes
    ----------
    owner : object
        The array that was given, which keeps the memory alive; None if it is yet to be allocated.
    address : int
        Of the first element, on the device.
    shape, strides, dtype
        As of a NumPy array: strides in bytes.
    """

    def __init__(self, name: str, owner: Any):
        try:
            interface = owner.__cuda_array_interface__
        except RuntimeError as error:
            raise TypeError(f"{name}: {error}") from None
        if getattr(owner, "is_neg", bool)():  # which torch's description does not say
            raise TypeError(f"{name}: expected numbers as they lie, got a lazily negated tensor; "
                            "pass .resolve_neg()")  # fmt: skip
        if interface.get("mask") is not None:
            raise TypeError(f"{name}: expected a plain array, got a masked array")
        self.owner = owner
        self.address, self.readonly = interface["data"]
        self.shape = tuple(interface["shape"])
        self.dtype = _dtype(name, interface["typestr"])
        self.strides = tuple(interface.get("strides") or packed(self.shape, self.dtype.itemsize))
        if any(stride % self.dtype.itemsize for stride in self.strides):
            raise ValueError(
                f"{name}: expected strides that are multiples of {self.dtype.itemsize}, the "
                f"item's size, got {self.strides}"
            )

    @property
    def flags(self) -> SimpleNamespace:
        """What `make_problem` asks; its short ways for packed NumPy arrays are not for this."""
        return SimpleNamespace(aligned=True, c_contiguous=False, writeable=not self.readonly)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> int | None:
        """The number of the device, or None where its library does not tell."""
        attribute = {"torch": "index", "cupy": "id"}.get(self._library())
        return None if attribute is None else getattr(self.owner.device, attribute)

    def view(self, shape, strides) -> DeviceArray:
        """The same memory with another shape."""
        other = object.__new__(DeviceArray)
        other.__dict__.update(self.__dict__, shape=tuple(shape), strides=tuple(strides))
        return other

    def __getitem__(self, index) -> DeviceArray:
        """``x[None]``, with another axis in front, or ``x[0]``, without the first one."""
        if index is None:
            return self.view((1, *self.shape), (0, *self.strides))
        assert index == 0
        return self.view(self.shape[1:], self.strides[1:])

    def broadcast_to(self, shape) -> DeviceArray:
        """As `numpy.broadcast_to`."""
        if np.broadcast_shapes(self.shape, shape) != tuple(shape):
            raise ValueError
        new = len(shape) - self.ndim
        kept = zip(self.shape, self.strides, shape[new:], strict=True)
        return self.view(shape, (0,) * new + tuple(s if n == m else 0 for n, s, m in kept))

    def bounds(self) -> tuple[int, int]:
        """The addresses ``[low, high)`` that its elements lie in."""
        if not self.size:
            return self.address, self.address
        spans = [stride * (n - 1) for stride, n in zip(self.strides, self.shape, strict=True)]
        low = self.address + sum(s for s in spans if s < 0)
        return low, self.address + sum(s for s in spans if s > 0) + self.dtype.itemsize

    def may_overlap(self, other: DeviceArray) -> bool:
        low, high = self.bounds()
        other_low, other_high = other.bounds()
        return low < other_high and other_low < high

    def planned(self, shape, dtype) -> DeviceArray:
        """One without an owner, to be allocated: its axes in memory in the order of these."""
        new = len(shape) - self.ndim
        # Axes without a stride of their own, broadcast or new, come first.
        steps = [abs(stride) or math.inf for stride in self.strides]
        own = sorted(range(self.ndim), key=steps.__getitem__, reverse=True)
        order = [*range(new), *(axis + new for axis in own)]
        strides = packed([shape[axis] for axis in order], dtype.itemsize)
        other = self.view(shape, [strides[order.index(axis)] for axis in range(len(shape))])
        other.__dict__.update(owner=None, address=0, dtype=dtype, readonly=False)
        return other

    def allocate(self, shape, strides, dtype, otherwise=None) -> Any:
        """A new array on the same device, of the library that this one is of, or made by
        ``otherwise(shape, dtype, strides)`` if that is not known.
        """
        library = self._library()
        if library == "torch":
            torch = import_module("torch")
            elements = [stride // dtype.itemsize for stride in strides]
            kind = getattr(torch, dtype.name)
            return torch.empty_strided(shape, elements, dtype=kind, device=self.owner.device)
        if library == "cupy":
            cupy = import_module("cupy")
            with self.owner.device:
                memory = cupy.empty(math.prod(shape), dtype).data
                return cupy.ndarray(shape, dtype, memory, strides)
        return otherwise(tuple(shape), dtype=dtype, strides=tuple(strides))

    def place(self) -> tuple[int | None, int]:
        """``(device, stream)``: the number of the device, None for the current one, and the address
        of the stream that its library now works on, 0 for the default one.
        """
        if self._library() == "torch":  # which does not say it in its interface
            stream = import_module("torch").cuda.current_stream(self.owner.device)
            return self.device, stream.cuda_stream
        return self.device, self.owner.__cuda_array_interface__.get("stream") or 0

    def _library(self) -> str:
        name = type(self.owner).__module__.partition(".")[0]
        return name if name in sys.modules else ""


def _dtype(name: str, typestr: str) -> np.dtype:
    if typestr == "<V2":  # as torch and ml_dtypes call it
        try:
            return float_type("bfloat16")
        except ImportError:
            raise TypeError(f"{name}: expected an installed dtype, got bfloat16, which needs the "
                            "package ml_dtypes") from None  # fmt: skip
    dtype = np.dtype(typestr)
    if not dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got {typestr}")
    return dtype


def packed(shape, itemsize: int) -> tuple[int, ...]:
    """The strides of a C-contiguous array of such items."""
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(n, 1)
    return tuple(reversed(strides))
