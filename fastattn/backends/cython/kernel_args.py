"""The compiled extension as backends call it: what a problem is to it."""

from __future__ import annotations

import numpy as np

from ...core.extension import kernels
from ...core.problem import DOT, Problem
from ...core.threads import worth_threads

__all__ = ["attend", "compute_dtype", "kernels", "threads"]

# Below this many flops a second thread costs more than it brings: starting one takes some 5 us.
ONE_THREAD_FLOPS = 2_000_000
# How many multiply-adds of a product take as long as one term of an additive score.
ADDITIVE_FLOPS = 10


def attend(p: Problem, result, lse=None, weights=None, sums=None, indices=None) -> None:
    """Run the forward kernels: `fastattn._kernels.attend` says what is filled."""
    table = None if p.block_table is None else np.ascontiguousarray(p.block_table)
    kernels.attend(
        p.q, p.k, p.v, p.k_scales, p.v_scales, result, p.batch, p.heads, p.kv_heads,
        p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, p.key_range, p.mask,
        lse, weights, p.key_range.longest_first(p.batch), compute_dtype(p), threads(p),
        None if p.score_function is DOT else p.score_function, sums, indices, table, p.dropout,
    )  # fmt: skip


def compute_dtype(problem: Problem) -> str:
    """What the kernels multiply in, as NumPy's character for a dtype."""
    p = problem
    if p.dtype.char == "f" and p.precision == "bfloat16":
        return "E"
    if p.k.dtype.itemsize == 1 and p.dtype.char != "d":
        return "f"  # what a cache stores in a byte or less is widened
    return p.dtype.char


def threads(problem: Problem) -> int:
    """How many threads `problem` is worth; what it computes does not depend on it."""
    cost = ADDITIVE_FLOPS if problem.score_function.name == "additive" else 1
    return worth_threads(problem, kernels.openmp_threads, ONE_THREAD_FLOPS // cost)
