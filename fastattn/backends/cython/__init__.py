"""The compiled kernels of ``csrc``: queries in the lanes of vectors, tiles on several threads."""

from __future__ import annotations

import numpy as np

from ...core import extension
from ...core.arguments import broadcast_shapes
from ...core.bins import no_top_keys
from ...core.problem import DOT, Problem
from ..numpy import weight_maps
from . import kernel_args, sparse
from .backward import prepare_backward, run_backward
from .kernel_args import attend, compute_dtype, kernels, threads
from .tangents import no_kernel_for_tangents, run_dual, run_forward_mode

__all__ = [
    "broken", "describe", "left_to_numpy", "name", "prepare", "prepare_backward", "run",
    "run_backward", "run_dual", "run_forward_mode", "run_map", "run_top", "unsupported",
    "unsupported_backward", "unsupported_forward_mode",
]  # fmt: skip

name = "cython"


def broken() -> str | None:
    """Why the extension, which is there, cannot be loaded, or None."""
    return extension.missing if extension.broken else None


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    p = problem
    if extension.missing is not None:
        return extension.missing
    if p.score_mod is not None or p.mask_mod is not None:
        return "a score_mod or mask_mod cannot be compiled into it"
    if p.bias is not None and not _readable(p.bias.dtype):
        return f"no kernel for a bias of {p.bias.dtype}"
    return None


def _readable(dtype: np.dtype) -> bool:
    return dtype.kind in "iu" or dtype.name in _BIAS_FLOATS


_BIAS_FLOATS = ("float16", "bfloat16", "float32", "float64", np.dtype(np.longdouble).name)


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows(), p.accumulator) if p.return_lse else None
    weights = np.zeros(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    row_max = np.empty(p.rows(), p.accumulator) if p.return_max else None
    call = sparse.attend if p.mask is not None and p.is_sparse else attend
    call(p, result, lse, weights, row_max=row_max)
    return lse, row_max, weights


def prepare(problem: Problem, of_cache: bool = False):
    """A plan that runs further calls of this kind, or None."""
    return None if problem.is_sparse else kernel_args.prepare(problem, of_cache)


def run_map(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """The weights summed over cells, float64 (batch, heads, rows, columns)."""
    p = problem
    sums = np.zeros((*p.batch, p.heads, rows, columns))
    call = sparse.attend if p.is_sparse else attend
    call(p, np.empty(p.rows(0), p.accumulator), sums=sums)
    return sums


def run_top(problem: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n)."""
    p = problem
    if p.is_sparse:
        return weight_maps.run_top(p, n)
    indices, weights = no_top_keys(p, n)
    kept = slice(min(n, p.n_keys))
    attend(
        p, np.empty(p.rows(0), p.accumulator),
        weights=weights[..., kept], indices=indices[..., kept],
    )  # fmt: skip
    return indices, weights


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    return unsupported(problem)


def unsupported_forward_mode(problem: Problem) -> str | None:
    """Why this backend cannot push tangents through `problem`, or None."""
    return unsupported(problem) or no_kernel_for_tangents(problem)


def left_to_numpy(problem: Problem) -> dict[str, str]:
    """What NumPy computes of `problem` inside of this backend or after it, and why."""
    no_kernel = no_kernel_for_tangents(problem)
    return sparse.left_to_numpy(problem) | ({"tangents": no_kernel} if no_kernel else {})


def describe(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    p = problem
    if p.is_sparse:
        return {
            "kernel": f"keys gathered, summed in {p.accumulator}",
            "instruction set": kernels.instruction_set(),
            "threads": str(sparse.threads(p)),
            "entries": str(p.mask.n_entries),
        }
    together = max(1, p.group * p.n_queries)
    kind = compute_dtype(p), together, p.head_dim, p.value_dim, p.score_function is DOT
    queries, micropanel, keys = kernels.tile_size(*kind)
    return {
        "kernel": f"{p.dtype}, multiplied as {kernels.matmul_dtype(*kind)}",
        "instruction set": kernels.instruction_set(),
        "tile": f"{queries} queries, {keys} keys a block",
        "threads": str(threads(p)),
        "skipped": f"{_share_skipped(p, micropanel):.0%} of the tiles"
        + (", and those that the mask hides" if p.mask is not None else ""),
    }


def _share_skipped(p: Problem, queries: int) -> float:
    """The share of the scores that are skipped, as no query of a micropanel sees the key."""
    intervals = p.key_range.bounds()
    if intervals is None or not p.n_queries or not p.n_keys:
        return 0.0
    shape = broadcast_shapes(*(x.shape for x in intervals), (p.n_queries,))
    start, stop = (np.broadcast_to(x, shape) for x in intervals)
    step = max(1, queries // p.group)
    edges = np.arange(0, p.n_queries, step)
    first = np.minimum.reduceat(np.where(start < stop, start, p.n_keys), edges, axis=-1)
    last = np.maximum.reduceat(np.where(start < stop, stop, 0), edges, axis=-1)
    return float(1 - np.mean(np.maximum(last - first, 0)) / p.n_keys)
