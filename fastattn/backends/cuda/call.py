"""One call: its arrays and numbers on the device, and the launches that answer it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...core.device_array import packed
from ...core.problem import Problem
from . import merge, multiply_add, tensor_cores
from .layout import Fields, pack
from .operands import (
    Operand,
    Result,
    constant,
    dtype_name,
    in_vectors,
    nothing,
    numbers,
    operand,
    scratch,
)  # fmt: skip
from .tensor_tile import TensorSpec, blocks_of, tensor_kinds
from .tile import FEW_QUERIES, Spec, slice_of, tile_for
from .toolkit import SIMULATED, cuda

__all__ = ["Call", "Split", "spec_of", "tiles_of", "tiles_per_launch"]

# A launch does about so many flops for each multiprocessor: 20 to 50 ms, after which Ctrl-C is
# heard. It has at least so many blocks of threads for each, so that all are busy.
LAUNCH_FLOPS = 5_000_000_000
LAUNCH_TILES = 8

# Numba warns of fewer blocks of threads in a launch.
WARNED_BLOCKS = 128

# The keys of a part are a multiple of so many, and there are at most so many parts.
PART_KEYS = 32 if SIMULATED else 512
MOST_PARTS = 64


class Split:
    """How a few queries are shared out: heads that read the same keys lie in one tile, and the
    keys are split over blocks of threads, by a size that depends on their number alone.
    """

    def __init__(self, p: Problem):
        few = p.n_queries <= FEW_QUERIES and not p.return_weights
        self.few = few
        self.share = p.group if few else 1
        self.part_keys = PART_KEYS * max(1, math.ceil(p.n_keys / (PART_KEYS * MOST_PARTS)))
        self.parts = max(1, math.ceil(p.n_keys / self.part_keys)) if few else 1


def spec_of(p: Problem) -> Spec:
    """What the multiply-add kernel is compiled for."""
    operands = {"q": p.q, "k": p.k, "v": p.v, "b": p.bias, "o": p}
    halves = (c for c, x in operands.items() if x is not None and dtype_name(x.dtype) == "bfloat16")
    wide = p.bias is not None and p.bias.dtype.kind == "f" and p.bias.dtype.itemsize > 4
    return Spec(
        real=dtype_name(p.accumulator),
        head_dim=p.head_dim,
        value_dim=max(1, p.value_dim),
        bfloat16="".join(halves),
        softcap=p.softcap is not None,
        bias=p.bias is not None,
        clamp_bias=wide and p.accumulator.itemsize == 4,
        relative_bias=p.relative_bias is not None,
        alibi=p.alibi is not None,
        sinks=p.sinks is not None,
        mask=p.mask is not None,
        lse=p.return_lse,
        row_max=p.return_max,
        weights=p.return_weights,
        few=p.n_queries <= FEW_QUERIES and not p.return_weights,
        simulated=SIMULATED,
    )


class Call:
    """A problem whose arrays are on the device."""

    def __init__(self, p: Problem, result, stream):
        self.p, self.stream, self.split, self.spec = p, stream, Split(p), spec_of(p)
        self.real = np.dtype(p.accumulator)
        axes = len(p.batch) + 3

        def there(x):
            return operand(x, axes, p.on_device, stream, self.real)

        def interval(side):
            host = None if side is None else side[..., None]
            return operand(host, axes, False, stream, np.int64)

        start, stop = p.key_range.spans or (None, None)
        self.q, self.k, self.v = there(p.q), there(p.k), there(p.v)
        self.mask, self.bias = there(p.mask), there(p.bias)
        self.start, self.stop = interval(start), interval(stop)
        self.out = Result(p, p.rows(p.value_dim), p.dtype, result)
        self.lse = Result(p, p.rows(), p.accumulator) if p.return_lse else None
        self.row_max = Result(p, p.rows(), p.accumulator) if p.return_max else None
        self.weights = Result(p, p.rows(p.n_keys), p.dtype) if p.return_weights else None
        self.positions, self.per_head = _positions(p), _per_head(p)
        self.flags: Any = None  # of the kernel of tensor cores

    def kinds(self) -> list[TensorSpec]:
        """What kernels of tensor cores for it are compiled for, the fastest first."""
        vectors = all(map(in_vectors, (self.k, self.v), (self.p.head_dim, self.p.value_dim)))
        return tensor_kinds(self.spec, dtype_name(self.p.dtype), vectors)

    def answer(self, kind: TensorSpec | None, redo=True):
        """Launch what answers it, by tensor cores if a `kind` is given; ``(lse, row_max,
        weights)``. Without `redo`, rows that these flag are left as they are.
        """
        if math.prod(self.p.rows()):
            if self.split.parts > 1:
                self._merge_parts(kind, redo)
            else:
                self._attend(self.spec, kind, redo, self.out.operand, self.lse, self.row_max)
        self.out.deliver(self.stream)
        results = (self.lse, self.row_max, self.weights)
        return tuple(None if x is None else x.deliver(self.stream) for x in results)

    def _merge_parts(self, kind, redo):
        """Each part of the keys by itself, then all of them together."""
        p, parts, rows = self.p, self.split.parts, math.prod(self.p.rows())
        sums = scratch("sums", parts * rows * max(1, p.value_dim), self.real, self.stream)
        lse = scratch("lse", 2 * parts * rows, self.real, self.stream)
        high = scratch("max", parts * rows, self.real, self.stream) if p.return_max else None
        where = Operand(sums, 0, packed(p.rows(p.value_dim), 1))
        halves = self.spec.bfloat16.replace("o", "")
        each = self.spec._replace(partial=True, sinks=False, bfloat16=halves)
        layout = self._attend(each, kind and kind._replace(spec=each), redo, where, lse, high)
        idle = 1 if SIMULATED else math.ceil(WARNED_BLOCKS / rows)
        none = nothing(self.real)
        merge.compiled(self.spec)[(rows, idle), merge.THREADS, self.stream](
            sums, lse, none if high is None else high, self.out.elements,
            *(none if x is None else x.elements for x in (self.lse, self.row_max)),
            self.per_head, layout,
        )  # fmt: skip

    def _attend(self, spec: Spec, kind, redo, out: Operand, lse, row_max):
        """The kernels that compute a result, or parts of it; the layout that they were given."""
        p, none = self.p, nothing(self.real)
        layout = numbers(self._layout(out, kind), np.int64)
        operands = (out, self.mask, self.bias, self.start, self.stop)
        results = [none if x is None else getattr(x, "elements", x) for x in (lse, row_max)]
        with np.errstate(over="ignore"):
            softcap = self.real.type(p.softcap or 1)
        before = (*(x.elements for x in operands), *results)
        tables = (self.positions, self.per_head, layout)
        flags = nothing(np.int32)
        if kind is not None:
            b = blocks_of(kind)
            rows = b.slices * self.split.parts * math.prod(p.rows())
            self.flags = flags = scratch("flags", rows, np.int32, self.stream)
            qkv = (x.elements.view(np.uint16) for x in (self.q, self.k, self.v))
            self._launch(
                tensor_cores.compiled(kind), b, b.slices, (*qkv, *before, *tables, flags, softcap)
            )
            spec = spec._replace(redo=True)
        if kind is None or redo:
            weights = none if self.weights is None else self.weights.elements
            qkv = (x.elements for x in (self.q, self.k, self.v))
            margin = self.real.type(math.log(2 * p.n_keys + 2))
            slices = math.ceil(spec.value_dim / slice_of(spec))
            arguments = (*qkv, *before, weights, *tables, flags, softcap, margin)
            self._launch(multiply_add.compiled(spec), tile_for(spec), slices, arguments)
        return layout

    def _launch(self, kernel, tile, slices, arguments):
        """A kernel, in launches that are not long."""
        tiles, at_once = tiles_of(self.p, tile, self.split), tiles_per_launch(self.p, tile)
        for first in range(0, tiles, at_once):
            if first:
                self.stream.synchronize()  # Ctrl-C is heard before there is a queue of launches
            blocks = min(at_once, tiles - first)
            # Numba warns of small grids; blocks that end at once are there to be counted.
            least = 1 if SIMULATED else math.ceil(WARNED_BLOCKS / (blocks * slices))
            grid = (blocks, slices, max(self.split.parts, least))
            kernel[grid, tile.threads, self.stream](*arguments, first)

    def _layout(self, out: Operand, kind) -> tuple[int, ...]:
        p, r, split = self.p, self.p.key_range, self.split
        rows = math.prod(p.rows())
        fields = {
            Fields.N_QUERIES: p.n_queries, Fields.N_KEYS: p.n_keys, Fields.VALUE_DIM: p.value_dim,
            Fields.HEADS: p.heads, Fields.GROUP: p.group, Fields.SHARE: split.share,
            Fields.OF_ENTRY: int(_by_entry(p)),
            Fields.ENTRIES: math.prod(p.batch) if _by_entry(p) else 1,
            Fields.LEFT: -1 if r.left is None else r.left,
            Fields.RIGHT: -1 if r.right is None else r.right,
            Fields.REACH: 0 if p.relative_bias is None else p.relative_bias.shape[-1] // 2,
            Fields.PART_KEYS: split.part_keys, Fields.PARTS: split.parts,
            Fields.OUT_PART: rows * p.value_dim, Fields.ROW_PART: rows,
            Fields.SPANS: int(r.spans is not None),
            Fields.FLAGS: 0 if kind is None else blocks_of(kind).slices,
        }  # fmt: skip
        operands = (self.q, self.k, self.v, out, self.mask, self.bias, self.start, self.stop)
        records = ((x.first, x.strides) for x in (*operands, self.out.operand))
        return pack(fields, p.batch, records)


def _by_entry(p: Problem) -> bool:
    """Do positions or lengths differ between batch entries?"""
    return isinstance(p.q_offset, np.ndarray) or p.key_range.lengths is not None


def _positions(p: Problem):
    """Of each entry the position of its first query, then of each the number of its keys."""
    lengths = p.n_keys if p.key_range.lengths is None else p.key_range.lengths
    if not _by_entry(p):
        return numbers((p.q_offset, lengths), np.int64)
    offset = p.q_offset[..., 0] if isinstance(p.q_offset, np.ndarray) else p.q_offset
    sides = (np.asarray(x, np.int64) for x in (offset, lengths))
    return constant(np.concatenate([np.broadcast_to(x, p.batch).ravel() for x in sides]))


def _per_head(p: Problem):
    """Scales, slopes, sinks and the rows of the relative bias."""
    if p.alibi is p.sinks is p.relative_bias is None and type(p.scale) is float:
        return numbers((p.scale,) * p.heads + (0.0,) * (2 * p.heads), p.accumulator)
    rows = (0 if x is None else x for x in (p.scale, p.alibi, p.sinks))
    bias = np.empty((p.heads, 0)) if p.relative_bias is None else p.relative_bias
    bias = np.broadcast_to(bias, (p.heads, bias.shape[-1]))
    each = [np.broadcast_to(x, (p.heads,)) for x in rows]
    with np.errstate(over="ignore"):
        return constant(np.concatenate([*each, bias.ravel()]).astype(p.accumulator))


def tiles_of(p: Problem, tile, split: Split) -> int:
    heads = p.heads // split.share
    return math.prod(p.batch) * heads * math.ceil(p.n_queries * split.share / tile.queries)


def tiles_per_launch(p: Problem, tile) -> int:
    processors = getattr(cuda.get_current_device(), "MULTIPROCESSOR_COUNT", 1)
    flops = 2 * tile.queries * max(p.n_keys, 1) * (p.head_dim + max(p.value_dim, 1))
    return processors * max(LAUNCH_TILES, LAUNCH_FLOPS // flops)
