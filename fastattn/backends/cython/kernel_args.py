"""The compiled extension, and what it takes of a problem that is no field of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ...core.extension import kernels
from ...core.problem import Problem
from ...core.threads import flops, thread_count

if TYPE_CHECKING:
    from ..._kernels import Plan

__all__ = [
    "attend", "can_prepare", "compute_dtype", "from_relative_bias_rows", "kernels", "prepare",
    "relative_bias_rows", "threads", "threads_pay",
]  # fmt: skip

_PAD = 16  # MAX_LANES of csrc/tile_sizes.h

# Below this many flops a second thread costs more than it brings: starting one takes some 5 us.
ONE_THREAD_FLOPS = 2_000_000
# Of the results of a call that is worth a plan, at most.
PLAN_BYTES = 1 << 20
# How many multiply-adds of a product take as long as one term of an additive score.
ADDITIVE_FLOPS = 10


def attend(
    p: Problem, result, lse=None, weights=None, sums=None, indices=None, row_max=None
) -> None:
    """Run the forward kernels: `fastattn._kernels.attend` says what is filled."""
    kernels.attend(
        p, compute_dtype(p), threads(p), result, lse, row_max, weights, sums, indices,
        relative_bias_rows(p),
    )  # fmt: skip


def prepare(p: Problem, of_cache: bool = False) -> Plan | None:
    """A plan for calls that differ from `p` in the elements of `q`, `k` and `v` alone; those of a
    cache also in its block table, lengths, offsets and scales, which come behind them. None where
    results are no new arrays of one layout.
    """
    if (p.block_table is None) is of_cache:
        return None
    shape = (*p.batch, p.heads, p.n_queries, p.value_dim)[p.one_head :]
    q = p.q[0] if p.one_head else p.q
    like_q = shape == q.shape
    placed = like_q or q.flags.c_contiguous
    nbytes = math.prod(shape) * p.dtype.itemsize
    if not can_prepare(p, nbytes) or p.return_weights or not placed:
        return None
    result = np.empty_like(q, p.dtype) if like_q else np.empty(shape, p.dtype)
    lse = np.empty(shape[:-1], p.accumulator) if p.return_lse else None
    row_max = np.empty(shape[:-1], p.accumulator) if p.return_max else None
    outputs = [(result, 0 if like_q else -1, False, True)]
    outputs += [(rows, -1, False, True) for rows in (lse, row_max) if rows is not None]
    if p.one_head:
        result = result[None]
        lse, row_max = (x if x is None else x[None] for x in (lse, row_max))
    plan = kernels.Plan(outputs, threads_pay(p))
    kernels.attend(
        p, compute_dtype(p), threads(p), result, lse, row_max,
        relative_bias=relative_bias_rows(p), plan=plan,
    )  # fmt: skip
    return plan


def can_prepare(p: Problem, nbytes: int) -> bool:
    """Does a call like `p`, with results of so many bytes, read its arrays where they lie, and is
    there something to compute? A plan saves microseconds, and takes such results to be made.
    """
    read_in_place = p.block_table is None or p.block_table.flags.c_contiguous
    return read_in_place and not p.copied and nbytes <= PLAN_BYTES and flops(p) > 0


def relative_bias_rows(p: Problem) -> np.ndarray | None:
    """The relative bias as the kernels read it, (kv_heads, rows, group): row ``R + PAD + n`` is for
    keys n places before the query.
    """
    if p.relative_bias is None:
        return None
    distances = p.relative_bias.shape[1]
    reach = distances // 2
    before = np.arange(-reach - _PAD, reach + _PAD + 1)
    x = p.relative_bias.reshape(p.kv_heads, p.group, distances)[
        ..., np.clip(-before, -reach, reach) + reach
    ]
    with np.errstate(under="ignore"):
        return np.ascontiguousarray(x.swapaxes(1, 2), p.accumulator)


def from_relative_bias_rows(p: Problem, grad) -> np.ndarray:
    """The gradient of the relative bias, (heads, 2 R + 1), from that of its rows."""
    grad[:, _PAD] += grad[:, :_PAD].sum(axis=1)
    grad[:, -_PAD - 1] += grad[:, -_PAD:].sum(axis=1)
    x = grad[:, -_PAD - 1 : _PAD - 1 : -1]
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(p.heads, x.shape[1])


def compute_dtype(problem: Problem) -> str:
    """What the kernels multiply in, as NumPy's character for a dtype."""
    p = problem
    if p.dtype.char == "f" and p.precision == "bfloat16":
        return "E"
    if p.k.dtype.itemsize == 1 and p.dtype.char != "d":
        return "f"  # what a cache stores in a byte or less is widened
    return p.dtype.char


def threads(problem: Problem) -> int:
    """How many threads `problem` gets; what it computes does not depend on it."""
    return thread_count(problem.threads, kernels.openmp_threads()) if threads_pay(problem) else 1


def threads_pay(problem: Problem) -> bool:
    """Is there enough work in `problem` for more than one thread?"""
    cost = ADDITIVE_FLOPS if problem.score_function.name == "additive" else 1
    return flops(problem) >= ONE_THREAD_FLOPS // cost
