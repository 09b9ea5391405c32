"""Arrays of other libraries, read where they lie: through what NumPy takes, or through DLPack.

NumPy's own way is asked first where a class has one, because its library then says what it cannot
give: torch exports a lazily negated, a masked or a fake tensor through DLPack as if it were plain.
DLPack serves what has no other way, and what NumPy has no dtype for: bfloat16. It is read here,
not by `numpy.from_dlpack`, which knows no bfloat16.

The structures are those of ``dlpack.h``: https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Any

import numpy as np

from .dtypes import float_type

__all__ = ["as_array", "check_meaning", "refusal"]

_HOST = (1, 3, 11)  # kDLCPU, and what CUDA and ROCm have pinned of its memory
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}  # of DLDataTypeCode, with a name in NumPy
_BFLOAT16 = (4, 16)
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_REFUSALS = (TypeError, ValueError, RuntimeError, BufferError, AttributeError)


def as_array(name: str, value: Any) -> np.ndarray:
    """The elements of `value` as an array, or an error that begins with `name`; no copy is made of
    an array.
    """
    check_meaning(name, value)
    try:
        x = _read(value)
    except (*_REFUSALS, ImportError) as error:
        raise refusal(name, value, error) from error
    if x.dtype == object and x.ndim == 0 and not isinstance(value, int):
        dense = "; pass .toarray()" * hasattr(value, "toarray")
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}{dense}")
    return x


# Tensors of which the memory does not say what they mean, by module and name.
_OTHERWISE = {
    ("torch.nn.attention.bias", "CausalBias"): "pass causal=True, for an upper left one q_offset=0",
    ("torch.masked", "MaskedTensor"): "pass mask= besides",
    ("torch.nested._internal.nested_tensor", "NestedTensor"): "pass it padded, with kv_lengths",
}


def check_meaning(name: str, value: Any) -> None:
    """An error if `value` is a tensor whose elements do not lie in its memory."""
    for (module, kind), advice in _OTHERWISE.items():
        if isinstance(value, getattr(sys.modules.get(module), kind, ())):
            raise TypeError(f"{name}: expected an array of numbers, got {kind}; {advice}")


def refusal(name: str, value: Any, error: Exception) -> TypeError:
    """The error of an array that cannot be read, with what to do about it."""
    what = type(value).__name__ + _advice(value, error)
    return TypeError(f"{name}: expected an array that NumPy can read, got {what}")


def _read(value) -> np.ndarray:
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return _from_dlpack(value)
    try:
        return np.asarray(value)
    except TypeError:  # of a dtype that NumPy has not, perhaps
        if not hasattr(value, "__dlpack__"):
            raise
        with suppress(*_REFUSALS):
            return _from_dlpack(value)
        raise


def _is_tensor(value) -> bool:
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


def _advice(value, error) -> str:
    """What to do about an array that cannot be read."""
    reason = str(error).strip().partition("\n")[0]
    if not _is_tensor(value):
        tracer = any(c.__name__ == "Tracer" for c in type(value).__mro__)
        where = "; inside of jax.jit and jax.grad call fastattn.integrations.jax" * tracer
        return f": {reason}{where}"
    if value.is_nested:
        return ", nested; pass it padded, with kv_lengths"
    if str(value.layout) != "torch.strided":
        return f" of layout {value.layout}; pass .to_dense()"
    if value.device.type != "cpu":
        return f" on device {value.device}; pass .cpu()"
    if value.requires_grad:
        return (
            " that requires a gradient; pass .detach(), or call fastattn.integrations.torch, which "
            "passes gradients on"
        )
    if value.is_conj():
        return ", lazily conjugated; pass .resolve_conj()"
    if value.is_neg():
        return ", lazily negated; pass .resolve_neg()"
    return f": {reason}"


# --------------------------------------------------------------------------------- DLPack


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):  # DLTensor, with which a DLManagedTensor begins
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):  # DLManagedTensorVersioned
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


def _function(name, result, *arguments):
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


_capsule_pointer = _function(
    "PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p
)
_capsule_is = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)


class _Memory:
    """The base of the array that NumPy makes. It holds the capsule, which is never renamed: an
    unconsumed capsule releases the tensor when it is deleted.
    """

    def __init__(self, capsule, interface):
        self.capsule = capsule
        self.__array_interface__ = interface


def _from_dlpack(value) -> np.ndarray:
    try:
        capsule = value.__dlpack__(max_version=(1, 0))
    except TypeError:  # from before there were versions
        capsule = value.__dlpack__()
    tensor, read_only = _tensor_of(capsule)
    if tensor.device.type not in _HOST:
        raise TypeError(f"it is on device ({tensor.device.type}, {tensor.device.id})")
    dtype = _dtype_of(tensor.dtype)
    shape = tuple(tensor.shape[: tensor.ndim])
    address = (tensor.data or 0) + tensor.byte_offset
    if not tensor.data and 0 not in shape:
        raise TypeError("it has no memory")
    strides = None
    if tensor.strides:
        strides = tuple(dtype.itemsize * n for n in tensor.strides[: tensor.ndim])
    interface = {
        "version": 3,
        "data": (address, read_only),
        "shape": shape,
        "strides": strides,
        "typestr": np.dtype(f"V{dtype.itemsize}").str if dtype.kind == "V" else dtype.str,
    }
    return np.asarray(_Memory(capsule, interface)).view(dtype)


def _tensor_of(capsule) -> tuple[_Tensor, bool]:
    """The tensor in a capsule, and whether it may only be read."""
    if not _capsule_is(capsule, b"dltensor_versioned"):
        return _Tensor.from_address(_capsule_pointer(capsule, b"dltensor")), False
    managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    if managed.major != 1:
        raise TypeError(f"it is of version {managed.major} of DLPack")
    return managed.tensor, bool(managed.flags & _READ_ONLY)


def _dtype_of(x: _DType) -> np.dtype:
    if (x.code, x.bits, x.lanes) == (*_BFLOAT16, 1):
        return float_type("bfloat16")  # or an ImportError of its package
    if x.code not in _KINDS or x.lanes != 1 or x.bits % 8:
        raise TypeError(f"its DLPack dtype is ({x.code}, {x.bits}, {x.lanes})")
    return np.dtype(f"{_KINDS[x.code]}{x.bits // 8}")
