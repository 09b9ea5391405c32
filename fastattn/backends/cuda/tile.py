"""What a multiply-add kernel is compiled for, and how its blocks of threads share the work."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .toolkit import device_function

__all__ = ["FEW_QUERIES", "Blocks", "Geometry", "Spec", "Tile", "slice_of", "tile_for"]

# Up to so many queries are served by narrow tiles, with the keys split over blocks of threads.
FEW_QUERIES = 4


class Spec(NamedTuple):
    """What a kernel is compiled for, the types of its arguments aside."""

    real: str  # float32 or float64: what it computes in
    head_dim: int
    value_dim: int  # at least 1; one block of threads makes `slice_of` of them
    bfloat16: str = ""  # which of "q", "k", "v", "b"(ias) and "o"(ut) hold its bits as uint16
    softcap: bool = False
    bias: bool = False
    clamp_bias: bool = False  # may hold numbers that `real` cannot
    relative_bias: bool = False
    alibi: bool = False
    sinks: bool = False
    mask: bool = False
    lse: bool = False
    row_max: bool = False
    weights: bool = False
    few: bool = False  # at most FEW_QUERIES
    partial: bool = False  # of a part of the keys: lse is pairs of the largest score and the sum
    redo: bool = False  # only the rows that another kernel has flagged
    simulated: bool = False


class Tile(NamedTuple):
    """How a block of threads shares its work."""

    ty: int
    tx: int
    rows: int  # queries of a thread
    cols: int  # keys of a thread
    chunk: int  # dims of q and k in shared memory at a time
    resident: int  # up to this head_dim the queries stay in shared memory
    v_keys: int  # keys of v in shared memory at a time
    registers: int  # of a thread, so that enough threads are under way at once
    dims: int  # columns of v that a thread reads at once; it holds up to twice as many

    @property
    def queries(self) -> int:
        return self.ty * self.rows

    @property
    def keys(self) -> int:
        return self.tx * self.cols

    @property
    def threads(self) -> int:
        return self.ty * self.tx


def tile_for(spec: Spec) -> Tile:
    """The tile of a kernel: within 48 KiB of shared memory and 255 registers a thread."""
    wide = slice_of(spec) > 64  # twice the sums per query, so half the queries per thread
    if spec.simulated:  # each thread is one of Python's, each operation a microsecond
        if spec.few:
            return Tile(2, 8, 1, 2, chunk=8, resident=8, v_keys=4, registers=0, dims=2)
        return Tile(4, 4, 2, 2, chunk=8, resident=8, v_keys=4, registers=0, dims=2)
    if spec.few:
        deep = 16 if spec.real == "float64" else 32
        return Tile(4, 32, 1, 4, chunk=deep, resident=128, v_keys=deep, registers=128, dims=4)
    if spec.real == "float64":
        return Tile(
            8, 16, 4, 2, chunk=32, resident=64, v_keys=8 if wide else 16, registers=255, dims=4
        )
    if wide:
        return Tile(16, 16, 4, 4, chunk=32, resident=64, v_keys=16, registers=128, dims=4)
    return Tile(8, 16, 8, 4, chunk=32, resident=64, v_keys=32, registers=168, dims=4)


def slice_of(spec: Spec) -> int:
    """How many columns of v one block of threads serves."""
    return min(spec.value_dim, 16 if spec.simulated else 128)


class Geometry:
    """What any kernel tells of its tiles."""

    spec: Spec
    real: Any  # the type of scores
    queries: int  # of a tile
    keys: int
    threads: int
    rows: int  # of the scores of a thread
    cols: int
    row_of: Any  # (r, ty) -> the query of the tile that its scores s[r] are of
    key_of: Any  # (c, tx) -> the key of s[:, c]
    scales: bool = False  # are scores yet to be scaled?


class Blocks(Geometry):
    """The sizes of the loops of `multiply_add`, of its shared memory and of its registers."""

    def __init__(self, spec: Spec):
        self.spec, self.tile = spec, tile_for(spec)
        self.real = np.dtype(spec.real).type
        self.rows, self.cols, self.threads = self.tile.rows, self.tile.cols, self.tile.threads
        self.queries, self.keys, self.v_keys = self.tile.queries, self.tile.keys, self.tile.v_keys
        self.head_dim, self.slice = spec.head_dim, slice_of(spec)
        self.chunks = _ceil_div(spec.head_dim, self.tile.chunk)
        self.chunk = 4 * _ceil_div(_ceil_div(spec.head_dim, self.chunks), 4)
        self.resident = self.tile.resident >= spec.head_dim
        self.q_dims = self.chunk * self.chunks if self.resident else self.chunk
        self.q_row, self.k_row = _padded(self.q_dims), _padded(self.chunk)
        self.p_row = _padded(self.keys)
        self.parts = _ceil_div(self.slice, self.tile.dims * self.tile.tx)
        self.dims = _ceil_div(self.slice, self.parts * self.tile.tx)
        self.sums = self.parts * self.dims  # a thread's columns of v
        self.v_cols = self.tile.tx * self.sums
        self.v_row = _padded(4 * _ceil_div(self.v_cols, 4))
        # How many tiles are summed before the sums are added to those of before: one sum over all
        # keys would round too often.
        self.fold = max(1, 512 // self.keys)
        ty_, tx_ = self.tile.ty, self.tile.tx
        self.row_of = device_function(lambda r, ty: r * ty_ + ty)
        self.key_of = device_function(lambda c, tx: c * tx_ + tx)

    @cached_property
    def shared(self) -> tuple[int, int, int]:
        """The lengths of what holds q, k or v, and the weights."""
        kv = max(self.keys * self.k_row, self.v_keys * self.v_row)
        return self.queries * self.q_row, kv, self.queries * self.p_row

    @property
    def columns(self) -> int:
        """Masked with it, an index is known to be neither negative nor odd."""
        return 0x10000 - math.gcd(4, self.dims)


def _padded(n: int) -> int:
    """A row length of at least `n` that is an odd multiple of 4."""
    return n + 4 if n % 8 == 0 else n


def _ceil_div(n: int, by: int) -> int:
    return -(-n // by)
