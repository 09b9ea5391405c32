"""Numba's CUDA, imported here and nowhere else."""

from __future__ import annotations

from numba import cuda

__all__ = ["SIMULATED", "cuda", "device_function", "intrinsic", "kernel"]

# Numba's simulator runs each thread of the device as one of Python's.
SIMULATED = bool(getattr(cuda.config, "ENABLE_CUDASIM"))  # noqa: B009  which it makes as it runs

if not SIMULATED:
    from numba.cuda.extending import intrinsic


def device_function(function):
    """`function` as a part of kernels. It is always inlined: the local arrays that it is given are
    registers only then.
    """
    if SIMULATED:
        return cuda.jit(function, device=True)
    return cuda.jit(device=True, forceinline=True)(function)


def kernel(function, registers: int | None = None):
    """`function` as a kernel of at most so many registers a thread."""
    return cuda.jit(function, **({} if SIMULATED else {"max_registers": registers}))
