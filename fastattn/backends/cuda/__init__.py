"""Blocked attention on a CUDA device, with kernels that Numba compiles.

NumPy arrays are copied to the device and the results back; arrays that are there already are read
where they lie, and the results stay beside them. Float32 and float64 are computed as such, float16
and bfloat16 in float32, on any device.
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from ...core.device_array import DeviceArray, packed
from ...core.problem import DOT, Problem

name = "cuda"

# A launch does about so many flops for each multiprocessor: 20 to 50 ms, after which Ctrl-C is
# heard. It has at least so many blocks of threads for each, so that all are busy.
LAUNCH_FLOPS = 5_000_000_000
LAUNCH_TILES = 8

# Up to which release numba-cuda fails from which NumPy on, and why.
MISFITS = (((0, 30, 4), (2, 5), "it needs numpy.row_stack, which is gone"),)

# Numba warns of fewer blocks of threads in a launch.
WARNED_BLOCKS = 128


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    if problem.k_scales is not None:
        return "no kernel for int8 keys and values"
    if problem.is_sparse:
        return "no kernel for a sparse mask"
    if problem.block_table is not None:
        return "no kernel for keys in pages"
    if problem.is_flex:
        return "a score_mod or mask_mod cannot be compiled into it"
    if problem.score_function is not DOT:
        return "its kernels compute dot products alone"
    if problem.dropout is not None:
        return "its kernels have no dropout"
    return missing()


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why nothing can run on a CUDA device here, or None."""
    if find_spec("numba") is None or find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    try:
        cuda = import_module("numba.cuda")
        if not cuda.is_available():
            error = cuda.cuda_error()
            if error is None:
                return "no CUDA toolkit for Numba; numba-cuda[cu12] or [cu13] installs one"
            return f"no CUDA device ({_in_one_line(error).partition('.')[0]})"
        return None if cuda.config.ENABLE_CUDASIM else _compiler_fails(cuda)
    except Exception as error:  # of several types, where it does not fit its surroundings
        return f"numba-cuda does not work here ({_in_one_line(error)})"


def _compiler_fails(cuda) -> str | None:
    """Why no kernel can be compiled, or None: where it is not known, the smallest is tried."""
    from importlib.metadata import version  # not at the top: it imports 30 modules

    numba_cuda, numpy = version("numba-cuda"), version("numpy")
    for last, first, reason in MISFITS:
        if _release(numba_cuda) <= last and _release(numpy) >= first:
            return f"numba-cuda {numba_cuda} does not work with NumPy {numpy} ({reason})"
    try:
        cuda.jit("void(float32[::1])")(_smallest_kernel)
    except Exception as error:
        return f"numba-cuda {numba_cuda} compiles no kernel here ({_in_one_line(error)})"
    return None


def _smallest_kernel(x):
    x[0] = 1


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _in_one_line(error) -> str:
    return " ".join(str(error).split())


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    p = problem
    device, stream_address = p.q.place() if isinstance(p.q, DeviceArray) else (None, 0)
    cuda = import_module("numba.cuda")
    with cuda.gpus[device] if device is not None else nullcontext():
        stream = cuda.external_stream(stream_address) if stream_address else cuda.default_stream()
        try:
            return _run(p, result, cuda, stream)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise MemoryError(f"on the CUDA device: {error}") from error
            raise


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    kernel = import_module(".kernel", __package__)
    p = problem
    spec = _spec(p)
    tile = kernel.tile_for(spec)
    device = import_module("numba.cuda").get_current_device()
    tiles = _tiles(p, tile)
    return {
        "kernel": f"Numba, {spec.real} sums of {p.dtype}",
        "device": getattr(device, "name", "the simulator"),
        "tile": f"{tile.queries} queries, {tile.keys} keys a block, {tile.threads} threads",
        "launches": str(math.ceil(tiles / _tiles_per_launch(p, tile))),
    }


class _Operand(NamedTuple):
    """An array on the device as the kernel reads it."""

    elements: Any  # one-dimensional, from its lowest address on
    at: np.ndarray | int  # where each (batch, head) begins, in elements
    strides: tuple[int, ...] = (0, 0)  # of the last two axes, in elements


def _run(p: Problem, result, cuda, stream):
    kernel = import_module(".kernel", __package__)
    spec = _spec(p)
    tile = kernel.tile_for(spec)
    real = np.dtype(spec.real)
    rows = (*p.batch, p.heads)
    nothing = cuda.to_device(np.zeros(1, real), stream)

    def operand(x, group=1):
        if x is None or x.size == 0:
            return _Operand(nothing, 0)
        elements, strides, first = _memory(x, cuda) if p.on_device else _copy(x, cuda, stream)
        return _locate(elements, x.shape, strides, first, rows, group)

    def send(x, dtype):
        return nothing if x is None else cuda.to_device(np.ascontiguousarray(x, dtype), stream)

    def of_queries(side):
        side = np.atleast_2d(side)[..., None]  # an int where nothing is hidden
        elements, strides, first = _copy(side, cuda, stream)
        return _locate(elements, side.shape, strides, first, rows)

    out = _Result(p, p.rows(p.value_dim), p.dtype, cuda, result)
    lse = _Result(p, p.rows(), p.accumulator, cuda) if p.return_lse else None
    weights = _Result(p, p.rows(p.n_keys), p.dtype, cuda) if p.return_weights else None
    start, stop = p.key_range.bounds() or (0, p.n_keys)
    offset = p.q_offset if isinstance(p.q_offset, int) else p.q_offset[..., None, :]
    positions = 0 if p.alibi is None else np.arange(p.n_queries) + offset
    operands = (
        operand(p.q), operand(p.k, p.group), operand(p.v, p.group),
        _locate(out.elements, out.shape, out.strides, out.first, rows),
        operand(p.mask), operand(p.bias), of_queries(start),
        of_queries(stop), of_queries(positions),
    )  # fmt: skip
    at = [np.broadcast_to(o.at, rows).ravel() for o in operands]
    with np.errstate(over="ignore"):
        arguments = (
            *(o.elements for o in operands),
            *(nothing if x is None else x.elements for x in (lse, weights)),
            send(p.alibi, real), send(p.sinks, real),
            send(at, np.int64), send([o.strides for o in operands], np.int64),
            real.type(p.scale), real.type(p.softcap or 1), real.type(math.log(2 * p.n_keys + 2)),
            p.n_queries, p.n_keys, p.value_dim, p.heads,
        )  # fmt: skip
    slices = math.ceil(spec.value_dim / kernel.slice_of(spec))
    tiles, at_once = _tiles(p, tile), _tiles_per_launch(p, tile)
    attend = kernel.compiled(spec)
    for first in range(0, tiles, at_once):
        if first:
            stream.synchronize()  # Ctrl-C is heard before there is a queue of launches
        blocks = min(at_once, tiles - first)
        # Numba warns of small grids; blocks that end at once are there to be counted.
        idle = 1 if spec.simulated else math.ceil(WARNED_BLOCKS / (blocks * slices))
        grid = (blocks, slices, idle)
        attend[grid, tile.threads, stream](*arguments, first)
    out.deliver(stream)
    return tuple(None if x is None else x.deliver(stream) for x in (lse, None, weights))


class _Result:
    """A result on the device, and then where the caller has it."""

    elements: Any
    strides: tuple[int, ...]
    first: int
    target: Any

    def __init__(self, p: Problem, shape, dtype, cuda, target=None):
        self.shape, self.dtype, self.on_device = shape, dtype, p.on_device
        self.target = target
        if isinstance(p.q, DeviceArray):
            if target is None or target.owner is None:
                strides = packed(shape, dtype.itemsize) if target is None else target.strides
                axes = slice(1, None) if p.one_head else slice(None)
                self.target = p.q.allocate(shape[axes], strides[axes], dtype)
                if target is not None:
                    target.owner = self.target
                target = DeviceArray("out", self.target)
                target = target[None] if p.one_head else target
            self.elements, self.strides, self.first = _memory(target, cuda)
        else:
            self.elements = cuda.device_array(max(1, math.prod(shape)), stored(dtype))
            self.strides, self.first = packed(shape, 1), 0

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


def _spec(p: Problem):
    """What the kernel is compiled for."""
    kernel = import_module(".kernel", __package__)
    operands = {"q": p.q, "k": p.k, "v": p.v, "b": p.bias, "o": p}
    halves = (c for c, x in operands.items() if x is not None and x.dtype.name == "bfloat16")
    wide = p.bias is not None and p.bias.dtype.kind == "f" and p.bias.dtype.itemsize > 4
    return kernel.Spec(
        real=p.accumulator.name,
        head_dim=p.head_dim,
        value_dim=max(1, p.value_dim),
        bfloat16="".join(halves),
        softcap=p.softcap is not None,
        bias=p.bias is not None,
        clamp_bias=wide and p.accumulator.itemsize == 4,
        alibi=p.alibi is not None,
        sinks=p.sinks is not None,
        mask=p.mask is not None,
        lse=p.return_lse,
        weights=p.return_weights,
        simulated=bool(import_module("numba.cuda").config.ENABLE_CUDASIM),
    )


def _tiles(p: Problem, tile) -> int:
    return math.prod(p.batch) * p.heads * math.ceil(p.n_queries / tile.queries)


def _tiles_per_launch(p: Problem, tile) -> int:
    device = import_module("numba.cuda").get_current_device()
    processors = getattr(device, "MULTIPROCESSOR_COUNT", 1)
    flops = 2 * tile.queries * max(p.n_keys, 1) * (p.head_dim + max(p.value_dim, 1))
    return processors * max(LAUNCH_TILES, LAUNCH_FLOPS // flops)


def _locate(elements, shape, strides, first, rows, group=1) -> _Operand:
    """An operand of which `group` heads follow each other read one head."""
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    lead = (*rows[:-1], rows[-1] // group)
    at = np.full(lead, first, np.int64)
    for axis, (n, stride) in enumerate(
        zip(reversed(shape[:-2]), reversed(strides[:-2]), strict=True)
    ):
        at += (np.arange(n) * stride).reshape(-1, *(1,) * axis)
    return _Operand(elements, np.repeat(at, group, -1), strides[-2:])


def _memory(x: DeviceArray, cuda):
    """``(elements, strides, first)`` of an array that is on the device."""
    low, high = x.bounds()
    description = {
        "shape": ((high - low) // x.itemsize,), "strides": None, "data": (low, False),
        "typestr": stored(x.dtype).str, "version": 3,
    }  # fmt: skip
    strides = tuple(stride // x.itemsize for stride in x.strides)
    elements = cuda.from_cuda_array_interface(description, owner=x.owner)
    return elements, strides, (x.address - low) // x.itemsize


def _copy(x: np.ndarray, cuda, stream):
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
    if dtype.name == "bfloat16":
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype
