"""One backward pass, validated: `problem.pose` for the call, and here what arrives from above."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arguments import plain
from .dtypes import float_dtype
from .problem import Problem

__all__ = ["Backward", "pose_backward"]


class Backward(NamedTuple):
    """A validated backward problem: the call, what it returned, and the gradients of that.

    Every array is native and aligned, of any strides; `out` and `grad_out` are of the dtype of
    the problem, `lse` and `grad_lse` of its accumulator.
    """

    problem: Problem
    out: np.ndarray  # (batch, heads, queries, value_dim)
    lse: np.ndarray  # (batch, heads, queries)
    grad_out: np.ndarray  # (batch, heads, queries, value_dim)
    grad_lse: np.ndarray | None  # (batch, heads, queries)

    def wants(self, name: str) -> bool:
        """Is the gradient of the argument `name` asked for?"""
        return any(gradient.name == name for gradient in self.problem.gradients)


def pose_backward(problem: Problem, grad_out, out, lse, grad_lse=None) -> Backward:
    """Check what a backward pass through `problem` is given besides.

    Raises
    ------
    TypeError, ValueError
        The message begins with the name of the offending argument.
    """
    p = problem
    rows, results = p.rows(), p.rows(p.value_dim)
    return Backward(
        p,
        _array("out", out, p, results, p.dtype),
        _array("lse", lse, p, rows, p.accumulator),
        _array("grad_out", grad_out, p, results, p.dtype),
        None if grad_lse is None else _array("grad_lse", grad_lse, p, rows, p.accumulator),
    )


def _array(name, value, p: Problem, shape, dtype) -> np.ndarray:
    x = plain(name, value)
    float_dtype(name, x)
    wanted = shape[1:] if p.one_head else shape
    if x.shape != wanted:
        raise ValueError(f"{name}: shape {x.shape} given, {wanted} wanted")
    if x.dtype is not dtype or not x.flags.aligned:
        with np.errstate(all="ignore"):
            x = np.require(x, dtype, "A")
    return x[None] if p.one_head else x
