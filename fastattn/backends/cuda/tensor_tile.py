"""What a kernel of tensor cores is compiled for, and how its blocks of threads share the work."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from .fragments import row_chunks
from .tile import Geometry, Spec
from .toolkit import SIMULATED, cuda, device_function

__all__ = ["TensorBlocks", "TensorSpec", "blocks_of", "key_of", "row_of", "tensor_kinds"]


class TensorSpec(NamedTuple):
    """What a kernel is compiled for."""

    spec: Spec
    dtype: str  # float16 or bfloat16
    vectors: bool  # k and v can be copied 16 bytes at a time
    wgmma: bool = False  # else mma.sync


class TensorBlocks(Geometry):
    """The sizes of the kernel's loops, and of its arrays in shared memory and registers."""

    real = np.float32

    def __init__(self, kind: TensorSpec):
        spec = self.spec = kind.spec
        wide, narrow = spec.head_dim > 128, spec.head_dim <= 64
        self.keys = 16 if SIMULATED else 32 if wide else 64
        self.warps = 1 if SIMULATED or spec.few else 8 if narrow or kind.wgmma else 4
        # So that two or three blocks of threads are under way at once on a multiprocessor.
        self.registers = 255 if wide or spec.few or kind.wgmma else 128 if narrow else 168
        self.queries, self.threads = 16 * self.warps, 32 * self.warps
        self.slice = min(spec.value_dim, 16 if SIMULATED else 128)
        self.slices = -(-spec.value_dim // self.slice)
        multiple = 64 if kind.wgmma else 16
        k_dims, v_dims = (multiple * -(-n // multiple) for n in (spec.head_dim, self.slice))
        self.k_steps, self.key_tiles, self.dim_tiles = k_dims // 16, self.keys // 8, v_dims // 8
        self.rows, self.cols, self.sums = 2, 2 * self.key_tiles, 2 * self.dim_tiles
        self.k_row, self.v_row = (n if kind.wgmma else 8 * row_chunks(n) for n in (k_dims, v_dims))
        self.alignment = 1024 if kind.wgmma else 16  # of shared memory, in bytes
        self.v_from = self.keys * self.k_row
        self.shared = self.v_from + self.keys * self.v_row  # numbers of 16 bits
        # Scores are scaled where something is added to them, else in the exponent.
        self.scales = spec.softcap or spec.bias or spec.relative_bias or spec.alibi
        self.row_of = device_function(row_of)
        self.key_of = device_function(key_of)


def row_of(r, ty):
    """The row of a tile that the scores ``s[r]`` of a thread are of."""
    return ty + 8 * r


def key_of(c, tx):
    """The key of a tile that its scores ``s[:, c]`` are of."""
    return c // 2 * 8 + 2 * tx + c % 2


def tensor_kinds(spec: Spec, dtype: str, vectors: bool) -> list[TensorSpec]:
    """The kinds of kernel for a call on the current device, the fastest first."""
    kind = TensorSpec(spec, dtype, vectors)
    hopper = not SIMULATED and tuple(cuda.get_current_device().compute_capability) == (9, 0)
    if hopper and 32 < spec.head_dim <= 128 and not spec.few:  # in blocks of 64 dims
        return [kind._replace(wgmma=True), kind]
    return [kind]


@cache
def blocks_of(kind: TensorSpec) -> TensorBlocks:
    return TensorBlocks(kind)
