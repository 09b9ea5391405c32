"""Attention under a sparse mask by the compiled kernels, and its gradients."""

from __future__ import annotations

import numpy as np

from ...core.backward import Backward
from ...core.problem import Problem
from ...core.sparse_mask import SparseMask
from ...core.threads import thread_count
from .kernel_args import kernels, relative_bias_rows

__all__ = ["attend", "can_differentiate", "left_to_numpy", "prepare_bias", "threads"]

# Below this many flops a second thread costs more than it brings.
ONE_THREAD_FLOPS = 2_000_000


def attend(p: Problem, result, lse=None, weights=None, sums=None, row_max=None) -> None:
    """As `kernel_args.attend`."""
    rows = relative_bias_rows(p)
    kernels.attend_sparse(p, threads(p), result, lse, row_max, weights, sums, rows)


def can_differentiate(b: Backward) -> bool:
    """Is every row of every gradient that of one query, or of one key?"""
    p = b.problem
    own = {"q": p.rows(), "k": (*p.batch, p.kv_heads, p.n_keys)}
    own["v"] = own["k"]
    shared = any(p.with_axes(getattr(p, name).shape)[:-1] != own[name] for name in own)
    return not shared and not b.wants("w") and (_has_own_bias(b) or not _has_keys(b))


def left_to_numpy(p: Problem) -> dict[str, str]:
    """What of `p` NumPy computes inside of this backend, and why, for `fastattn.explain`."""
    if not p.is_sparse:
        return {}
    left = {"top_keys": "no kernel under a sparse mask"}
    nothing = np.empty(0)
    if not can_differentiate(Backward(p, nothing, nothing, nothing, None)):
        left["gradients"] = "no kernel for those of arrays that broadcast under a sparse mask"
    return left


def _bias_shape(b: Backward) -> tuple[int, ...]:
    """That of the gradient of the bias; of none, the one of a constant."""
    shapes = [g.shape for g in b.problem.gradients if g.name == "bias"]
    return b.problem.with_axes(shapes[0] if shapes else ())


def _has_own_bias(b: Backward) -> bool:
    return b.wants("bias") and _bias_shape(b) == b.problem.rows(b.problem.n_keys)


def _has_keys(b: Backward) -> bool:
    """Is the gradient of a bias wanted that differs from key to key?"""
    return _bias_shape(b)[-1] != 1


def prepare_bias(b: Backward) -> tuple[np.ndarray | None, np.ndarray]:
    """As of the dense kernels: where the gradient of a bias of queries x keys is to be summed."""
    p = b.problem
    grad_bias = np.zeros(p.rows(p.n_keys), p.accumulator) if _has_own_bias(b) else None
    return grad_bias, np.empty((0, 0), np.int64)


def threads(p: Problem) -> int:
    """How many threads `p` is worth; what it computes does not depend on it."""
    mask: SparseMask = p.mask
    entries = mask.n_entries // max(1, len(mask.starts)) * int(np.prod(p.batch))
    flops = 2 * (entries + p.n_queries) * p.heads * (p.head_dim + p.value_dim)
    return 1 if flops < ONE_THREAD_FLOPS else thread_count(p.threads, kernels.openmp_threads())
