"""Tangents by the compiled kernels: an online softmax that carries them, of multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...core.output import empty_like
from ...core.problem import DOT, Problem
from ..numpy import tangents as numpy_tangents
from .kernel_args import compute_dtype, kernels, relative_bias_rows, threads

__all__ = ["no_kernel_for_tangents", "run_dual", "run_forward_mode"]

_NARROW = ("float16", "bfloat16", "float32")


def no_kernel_for_tangents(p: Problem) -> str | None:
    """Why tangents of q, k and v cannot be pushed through `p` here, or None."""
    if p.is_sparse:
        return "no kernel for tangents under a sparse mask"
    if p.block_table is not None:
        return "no kernel for tangents of pages"
    if p.score_function is not DOT:
        return f"no kernel for tangents of {p.score_function.name} scores"
    return None


def run_forward_mode(
    problem: Problem, tangents: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)``, as of the ``numpy`` backend, which those of options are
    left to.
    """
    if not tangents.keys() <= {"q", "k", "v"}:
        return numpy_tangents.run_forward_mode(problem, tangents)
    return _push(problem, tangents, None, None)


def run_dual(
    problem: Problem, tangents: Mapping[str, np.ndarray], result: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill `result`; ``(lse, tangent of out, tangent of lse)`` along those of q, k and v."""
    lse = np.empty(problem.rows(), problem.accumulator)
    return lse, *_push(problem, tangents, result, lse)


def _push(p: Problem, tangents, out, lse) -> tuple[np.ndarray, np.ndarray]:
    """Both tangents; fills `out` and `lse` unless they are None."""
    d_out = empty_like(p.q, p.rows(p.value_dim), p.dtype) if out is None else np.empty_like(out)
    d_lse = np.empty(p.rows(), p.accumulator)
    d_q, d_k, d_v = (_readable(p, tangents.get(name)) for name in "qkv")
    kernels.push_forward(
        p, compute_dtype(p), threads(p), d_q, d_k, d_v, out, lse, d_out, d_lse,
        relative_bias_rows(p),
    )  # fmt: skip
    return d_out, d_lse


def _readable(p: Problem, tangent):
    """As the kernels read it: of what they sum in, or a narrower float."""
    if tangent is None:
        return None
    dtype = tangent.dtype
    narrow = dtype == p.accumulator or dtype.name in _NARROW
    if narrow and dtype.isnative and tangent.flags.aligned:
        return tangent
    with np.errstate(all="ignore"):
        return tangent.astype(p.accumulator)
