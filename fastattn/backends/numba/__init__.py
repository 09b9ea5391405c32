"""The compiled kernels' tile in Numba. `tile` is the kernel, `vectors` all that depends on the
instruction set; importing one of these imports Numba, so only a call may.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from ...core.backward import Backward
from ...core.block_mask import NONE
from ...core.problem import DOT, Problem
from ...core.thread_pool import share
from ...core.threads import flops, openmp_setting, thread_count

name = "numba"

# A launch is long beside the 10 us that it costs, more where threads wait for each other to start
# one, and short beside what Ctrl-C may take.
LAUNCH_FLOPS = 100_000_000
# A thread makes at least so many, if there are as many tiles: some see more keys than others.
LAUNCHES = 8
# Below this many flops a second thread costs more than it brings: waking one takes some 50 us.
ONE_THREAD_FLOPS = 20_000_000


def _disabled() -> bool:
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


@cache
def _missing() -> str | None:
    """Why Numba cannot be used, or None."""
    if _disabled():
        return "NUMBA_DISABLE_JIT is set"
    try:
        import_module("numba")
        import_module("fastattn.backends.numba.launch")
    except Exception as error:  # of several types, where it refuses the NumPy that it finds
        return f"numba cannot be imported ({' '.join(str(error).split())})"
    return None


def broken() -> str | None:
    """Why Numba, which is there, cannot be imported, or None."""
    there = not _disabled() and find_spec("numba") is not None
    return _missing() if there else None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    p = problem
    missing = _missing()
    if missing is not None:
        return missing
    if p.relative_bias is not None and p.bias is not None:
        return "no kernel for a bias and a relative bias at once"
    if p.is_sparse:
        return "no kernel for a sparse mask"
    from .numbers import format_of

    if p.bias is not None and format_of(p.bias.dtype) is None:
        return f"no kernel for a bias of {p.bias.dtype}"
    return None


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    row_max = np.empty(p.rows(), p.accumulator) if p.return_max else None
    weights = np.zeros(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    with np.errstate(all="ignore"):
        _Call(p, result, lse, row_max, weights).run()
    return lse, row_max, weights


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    if not problem.is_flex:
        return "it computes gradients and tangents of flex alone"
    if problem.score_mod is not None and problem.score_grad is None:
        return "score_mod has no score_grad"
    return unsupported(problem)


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments."""
    from . import gradients

    return gradients.run_backward(backward)


unsupported_forward_mode = unsupported_backward


def run_forward_mode(problem: Problem, tangents) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)`` along `tangents`, by the names of their operands."""
    from . import gradients

    return gradients.run_forward_mode(problem, tangents)


class _Call:
    """One call: the record that its tiles start from, and who carries them out."""

    def __init__(self, p: Problem, result, lse, row_max, weights):
        from . import hooks, launch, numbers, score_functions, tile

        self.hooks = (
            hooks.score_function(p.score_mod, p.accumulator.itemsize),
            hooks.mask_function(p.mask_mod),
        )
        if p.gradients and p.score_mod is not None:  # an error now, not after the forward pass
            hooks.score_function(p.score_grad, p.accumulator.itemsize, "score_grad")
        self.score_function, self.bias = score_functions.NUMBER[p.score_function.name], None
        self.kernel = launch.launcher(*self.hooks)
        self.dropout = None if p.dropout is None else np.int64(1)
        scale = (
            float(np.abs(p.scale).max(initial=0)) if isinstance(p.scale, np.ndarray) else p.scale
        )
        self.scale = p.accumulator.type(scale if p.score_function is DOT else 1)
        self.threads = threads(p)
        self.sizes = tile.scratch(p.accumulator.itemsize, p.head_dim, p.value_dim)
        self.record = t = np.zeros(1, tile.TILE)
        self.keep: list[np.ndarray] = []  # what the record points to
        # User functions get one head and neighbouring queries, which vectorises best.
        fold = p.group if self.hooks == (None, None) else 1
        t["heads"], t["kv_heads"], t["group"], t["fold"] = p.heads, p.kv_heads, p.group, fold
        t["n_queries"], t["n_keys"] = p.n_queries, p.n_keys
        t["head_dim"], t["value_dim"] = p.head_dim, p.value_dim
        t["scale"], t["softcap"] = scale, p.softcap or 0
        if isinstance(p.scale, np.ndarray):
            t["scales"] = self.address(p.scale)
        t["keep_factor"] = 1
        if p.dropout is not None:
            t["drop_seed"] = np.uint64(p.dropout.seed).astype(np.int64)
            t["drop_threshold"], t["keep_factor"] = p.dropout.threshold, p.dropout.factor
            names = ("drop_entry", "drop_head", "drop_query", "drop_key")
            for name, start in zip(names, p.dropout.offset, strict=True):
                t[name] = start
        if p.score_function is not DOT:
            unit = power_below(p.score_function.weights)  # or their sums might overflow
            t["function_scale"] = np.float64(scale) * unit
            t["additive_weights"] = self.address(
                (p.score_function.weights / unit).astype(p.accumulator)
            )
        t["tile_rows"] = rows = tile.TILE_BYTES // p.accumulator.itemsize
        t["tiles"] = tiles = -(-fold * p.n_queries // rows)
        for operand, x in (("q", p.q), ("k", p.k), ("v", p.v), ("out", result)):
            t[f"{operand}_format"] = (
                numbers.REAL if x.dtype == p.accumulator else numbers.STORED[x.dtype.name]
            )
        self.items = tiles * int(np.prod(p.batch, dtype=np.int64)) * p.heads // fold
        flops = 2 * rows * visible_keys(p) * (p.head_dim + p.value_dim)
        most = self.items // (LAUNCHES * self.threads)
        self.step = max(1, min(LAUNCH_FLOPS // max(flops, 1), most))
        for operand in ("q", "k", "v"):
            self.point(p, operand, getattr(p, operand))
        for operand, scales in (("k_scales", p.k_scales), ("v_scales", p.v_scales)):
            if scales is not None:
                self.point(p, operand, scales)
        if p.block_table is not None:
            table = np.broadcast_to(p.block_table, (*p.batch, p.block_table.shape[1]))
            t["block_table"] = self.address(np.ascontiguousarray(table))
            t["table_pages"], t["page"] = table.shape[1], p.k.shape[2]
        self.point(p, "out", result)
        intervals = p.key_range.bounds()
        if intervals is not None:
            for side, x in zip(("start", "stop"), intervals, strict=True):
                self.point(p, side, x[..., None])
        if p.mask is not None:
            self.point(p, "mask", p.mask)
        bias = p.bias if p.relative_bias is None else diagonals(p)
        t["reach"] = -1 if p.relative_bias is None else p.relative_bias.shape[1] // 2
        if bias is not None:
            self.point(p, "bias", bias)
            direct = bias.dtype == p.accumulator and bias.flags.aligned
            self.bias = numbers.REAL if direct else numbers.format_of(bias.dtype)
            t["bias_swapped"] = not bias.dtype.isnative
        if p.block_mask is not None:
            blocks = p.block_mask.blocks
            batched = blocks.shape[0] > 1
            shape = p.batch if batched else (1,) * len(p.batch)
            self.point(p, "blocks", blocks.reshape(*shape, *blocks.shape[1:]))
        if weights is not None:
            self.point(p, "weights", weights)
        if lse is not None:
            self.point(p, "lse", lse[..., None])
        if row_max is not None:
            self.point(p, "max_result", row_max[..., None])
        if p.alibi is not None or p.relative_bias is not None:
            offset = p.q_offset if isinstance(p.q_offset, int) else p.q_offset[..., None, :]
            self.point(p, "position", (np.arange(p.n_queries) + offset)[..., None])
        if p.alibi is not None:
            t["alibi"] = self.address(p.alibi)
        if p.sinks is not None:
            t["sinks"] = self.address(p.sinks)

    def address(self, array: np.ndarray) -> int:
        self.keep.append(array)
        return array.__array_interface__["data"][0]

    def point(self, p: Problem, operand: str, array: np.ndarray) -> None:
        """Let the record find an array of (batch, heads, rows, dims), whose axes may broadcast."""
        of_keys = operand in ("k", "v", "k_scales", "v_scales")
        heads = p.kv_heads if of_keys else p.heads
        of_places = operand == "bias" and p.relative_bias is not None
        own_rows = of_keys or of_places or operand == "blocks"
        rows = array.shape[-2] if own_rows else p.n_queries
        if of_keys and p.block_table is not None:
            self.record[f"{operand}_page"] = array.strides[0]
            # The page numbered 0, which need not be there.
            array = np.lib.stride_tricks.as_strided(array, array.shape[1:], array.strides[1:])
        array = np.broadcast_to(array, (*p.batch, heads, rows, array.shape[-1]))
        table = np.array(self.address(array), np.int64)
        for n, stride in zip(array.shape[:-2], array.strides[:-2], strict=True):
            table = table[..., None] + np.arange(n) * stride
        self.record[operand] = self.address(np.ascontiguousarray(table))
        self.record[f"{operand}_row"], self.record[f"{operand}_dim"] = array.strides[-2:]

    def run(self) -> None:
        """Carry out all tiles, on this thread and on others."""
        self.launch(self.record, 0, 0)  # compiles, where that is to be done, on this thread alone
        share(self.items, self.step, self.threads, self.start)

    def launch(self, tile: np.ndarray, begin: int, end: int) -> None:
        self.kernel(
            tile.ctypes.data, begin, end, self.scale, self.score_function, self.bias,
            self.dropout, *self.hooks,
        )  # fmt: skip

    def start(self) -> Callable[[int, int], None]:
        """A thread's own launch, with a scratch of its own."""
        tile = self.record.copy()
        sizes = {part: -(-size // 64) * 64 for part, size in self.sizes.items()}
        scratch = np.empty(sum(sizes.values()) + 64, np.uint8)
        at = -(-self.address(scratch) // 64) * 64
        for part, size in sizes.items():
            tile[part] = at
            at += size
        return partial(self.launch, tile)


def diagonals(p: Problem) -> np.ndarray:
    """The relative bias as a bias of places x keys, of each place -reach..n_keys + reach on the key
    axis: a view of one number for each distance, along which a place later is a step back.
    """
    assert p.relative_bias is not None
    reach = p.relative_bias.shape[1] // 2
    places = p.n_keys + 2 * reach + 1
    distance = np.arange(1 - places, p.n_keys) + reach
    numbers = p.relative_bias.astype(p.accumulator)[:, np.clip(distance, -reach, reach) + reach]
    stride, step = numbers.strides
    first, shape = numbers[:, places - 1 :], (p.heads, places, p.n_keys)
    return np.lib.stride_tricks.as_strided(first, shape, (stride, -step, step), writeable=False)


def power_below(weights: np.ndarray) -> float:
    """A power of 2 near the largest magnitude."""
    largest = np.abs(weights).max(initial=0)
    return float(2.0 ** np.floor(np.log2(largest))) if 0 < largest < np.inf else 1.0


def visible_keys(problem: Problem) -> int:
    """How many keys a query sees, about."""
    p = problem
    if p.block_mask is not None:
        visible = p.n_keys * (p.block_mask.blocks != NONE)
    elif (intervals := p.key_range.bounds()) is not None:
        start, stop = intervals
        visible = np.maximum(stop - start, 0)
    else:
        return p.n_keys
    return int(visible.mean()) if visible.size else 0


def threads(problem: Problem) -> int:
    """How many threads `problem` is worth; what it computes does not depend on it."""
    if flops(problem) < ONE_THREAD_FLOPS:
        return 1
    return thread_count(problem.threads, openmp_setting())


def describe(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    from . import tile, vectors

    given = {name: getattr(problem, name) for name in ("score_mod", "mask_mod", "block_mask")}
    functions = {
        name: getattr(x, "__name__", repr(x)) for name, x in given.items() if x is not None
    }
    return {
        "kernel": f"queries in lanes, {problem.accumulator}, compiled by Numba",
        "instruction set": f"{vectors.INSTRUCTION_SET}, vectors of {vectors.VECTOR_BYTES} bytes",
        "tile": f"{tile.TILE_BYTES // problem.accumulator.itemsize} queries, "
        f"{tile.BLOCK_K} keys a block",
        "threads": str(threads(problem)),
        **functions,
    }
