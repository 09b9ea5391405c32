"""The compiled extension as backends call it: what a problem is to it."""

from __future__ import annotations

import numpy as np

from ..extension import kernels
from ..problem import DOT, Problem
from ..threads import worth_threads

__all__ = ["attend", "bounds", "kernels", "product", "threads"]

# Below this many flops a second thread costs more than it brings: starting one takes some 5 us.
ONE_THREAD_FLOPS = 2_000_000
# How many multiply-adds of a product take as long as one term of an additive score.
ADDITIVE_FLOPS = 10


def attend(
    p: Problem, result, lse=None, weights=None, for_gradients=False, sums=None, indices=None
) -> None:
    """Run the forward kernels: `fastattn._kernels.attend` says what is filled."""
    start, stop = bounds(p)
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    order = None if start is None else _longest_first(p, start, stop)
    kernels.attend(
        p.q, p.k, p.v, p.k_scales, p.v_scales, result, p.batch, p.heads, p.kv_heads,
        p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop, p.mask,
        lse, weights, order, product(p), threads(p), for_gradients,
        None if p.measure is DOT else p.measure, sums, indices,
    )  # fmt: skip


def bounds(p: Problem):
    """The intervals of a problem, of (heads, queries) at least, or ``(None, None)``."""
    intervals = p.intervals()
    return (None, None) if intervals is None else tuple(map(np.atleast_2d, intervals))


def _longest_first(p: Problem, start, stop) -> np.ndarray | None:
    """The flattened batch entries in the order of what they see, or None where all see the same:
    a run that ends in small pieces leaves no thread waiting for another.
    """
    if max(p.batch, default=1) < 2 or (start.ndim < 3 and stop.ndim < 3):
        return None
    seen = (stop - start).max(axis=(-2, -1), initial=0)
    return np.argsort(-np.broadcast_to(seen, p.batch).ravel(), kind="stable")


def product(problem: Problem) -> str:
    """Whose kernels multiply, as the character of a dtype."""
    p = problem
    if p.dtype.char == "f" and p.precision == "bfloat16":
        return "E"
    if p.k_scales is not None and p.dtype.char != "d":
        return "f"  # scaled numbers are no halves
    return p.dtype.char


def threads(problem: Problem) -> int:
    """How many threads `problem` is worth; what it computes does not depend on it."""
    cost = ADDITIVE_FLOPS if problem.measure.name == "additive" else 1
    return worth_threads(problem, kernels.openmp_threads, ONE_THREAD_FLOPS // cost)
