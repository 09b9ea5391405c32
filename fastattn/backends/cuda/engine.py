"""Which kernel serves a problem, and what `fastattn.explain` says of it.

Tensor cores are used on a device once a trial of the same kind of kernel has given there what
multiply-adds give.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ...core.dtypes import float_type
from ...core.problem import Problem, make_problem
from .call import PART_KEYS, Call, Split, spec_of, tiles_of, tiles_per_launch
from .operands import current_device, dtype_name
from .tensor_tile import TensorSpec, blocks_of, tensor_kinds
from .tile import Geometry, Tile, tile_for
from .toolkit import SIMULATED, cuda

__all__ = ["describe", "run", "trial"]

MOST_DIMS = 256  # whose fragments of q fit into registers

# A product of bfloat16 that leaves float32 is, with a smaller scale, a score that does not.
LEAST_SCALE = 2.0**-20

# How far the largest error of a trial may go, relative to the largest number of v: a few roundings
# of the weights and of the result.
TOLERANCE = {"float16": 2.0**-8, "bfloat16": 2.0**-5}


def run(p: Problem, result, stream):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    call = Call(p, result, stream)
    kinds = call.kinds() if unfit(p) is None else []
    right = (kind for kind in kinds if trial(current_device(), kind) is None)
    return call.answer(next(right, None))


def unfit(p: Problem) -> str | None:
    """Why `p` is not for tensor cores on this device, or None."""
    if not (dtype_name(p.q.dtype) in TOLERANCE and p.q.dtype == p.k.dtype == p.v.dtype):
        return "they multiply float16 or bfloat16, the same for q, k and v"
    if not SIMULATED and tuple(cuda.get_current_device().compute_capability) < (8, 0):
        return "the device has a compute capability below 8.0"
    if p.head_dim > MOST_DIMS:
        return f"head_dim is above {MOST_DIMS}"
    if p.return_weights:
        return "weights are asked for"
    if not (p.scale >= LEAST_SCALE if type(p.scale) is float else np.min(p.scale) >= LEAST_SCALE):
        return "the scale is not positive, or tiny"
    return None


@lru_cache(maxsize=512)
def trial(device: int, kind: TensorSpec) -> str | None:
    """What is wrong with a kernel of tensor cores on `device`, the current one, or None: it is run
    once, on some ragged tiles, beside the kernel of multiply-adds. The simulator needs none.
    """
    return None if SIMULATED else compared(kind)


def compared(kind: TensorSpec) -> str | None:
    """What is wrong with a kernel, as a problem shows that both kernels solve."""
    try:
        p = example(kind)
        (ours, lse), flagged = solved(p, kind)
        (wanted, wanted_lse), _ = solved(p, None)
    except Exception as error:  # of the compiler, the driver, or a launch
        return f"a trial of them failed ({' '.join(str(error).split())})"
    off, most = np.abs(ours - wanted).max(), np.abs(np.asarray(p.v, np.float32)).max()
    if kind.spec.lse:
        off = max(off, np.abs(lse - wanted_lse).max() / 8)
    if flagged or not off <= TOLERANCE[kind.dtype] * most:
        return f"a trial of them differed from multiply-adds by {off:.2g}"
    return None


def example(kind: TensorSpec) -> Problem:
    """A problem of a kind, of several tiles with ragged ends, each row with keys in sight; of two
    parts if there are a few queries.
    """
    spec, b, rng = kind.spec, blocks_of(kind), np.random.default_rng(0)
    n_queries = 1 if spec.few else b.queries + 5
    n_keys = n_queries + 2 * b.keys + 5 + (PART_KEYS if spec.few else 0)
    bias_type = "bfloat16" if "b" in spec.bfloat16 else "float64" if spec.clamp_bias else "float32"

    def draw(heads, n, dim):
        x = rng.standard_normal((1, heads, n, dim), np.float32)
        return x.astype(float_type(kind.dtype))

    grid = rng.standard_normal((2, n_queries, n_keys), np.float32)
    mask, bias = grid > -1, grid.astype(float_type(bias_type))
    mask[..., 0] = True
    return make_problem(
        draw(2, n_queries, spec.head_dim), draw(1, n_keys, spec.head_dim),
        draw(1, n_keys, spec.value_dim), causal=True,
        softcap=5.0 if spec.softcap else None, bias=bias if spec.bias else None,
        relative_bias=rng.standard_normal((2, 9)) if spec.relative_bias else None,
        alibi=[0.1, 0.2] if spec.alibi else None, sinks=[0.5, -1.0] if spec.sinks else None,
        mask=mask if spec.mask else None, return_lse=spec.lse, return_max=spec.row_max,
    )  # fmt: skip


def solved(p: Problem, kind: TensorSpec | None):
    """``(out, lse)`` as float32, and whether a row was flagged, by a kernel alone."""
    stream = cuda.default_stream()
    out = p.new_result()
    call = Call(p, out, stream)
    lse, _, _ = call.answer(kind, redo=False)
    flagged = False
    if kind is not None:
        n = blocks_of(kind).slices * call.split.parts * math.prod(p.rows())
        flags = call.flags.copy_to_host(stream=stream)
        stream.synchronize()
        flagged = bool(flags[:n].any())
    return (np.asarray(out, np.float32), lse), flagged


def describe(p: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    spec, split, why = spec_of(p), Split(p), unfit(p)
    tile: Geometry | Tile = tile_for(spec)
    passed = ""
    products = f"multiply-adds, {spec.real} sums of {p.dtype}"
    if why is None:
        whole = p.head_dim % 8 == p.value_dim % 8 == 0  # and so in vectors, in most layouts
        for kind in tensor_kinds(spec, p.dtype.name, whole):
            why = trial(current_device(), kind)
            if why is None:
                break
            passed = f"; no wgmma: {why}" if kind.wgmma else ""
    if why is None:
        tile = blocks_of(kind)
        instruction = "wgmma" if kind.wgmma else "mma.sync"
        products = f"tensor cores ({instruction}), float32 sums of {p.dtype}{passed}"
    elif spec.real == "float32" and p.dtype.itemsize == 2:
        products += f"; no tensor cores: {why}"
    parts = f", keys in {split.parts} parts of {split.part_keys}" if split.parts > 1 else ""
    return {
        "kernel": f"Numba, {products}",
        "device": getattr(cuda.get_current_device(), "name", "the simulator"),
        "tile": f"{tile.queries} queries, {tile.keys} keys a block, {tile.threads} threads{parts}",
        "launches": str(math.ceil(tiles_of(p, tile, split) / tiles_per_launch(p, tile))),
    }
