"""One backward pass, validated: the call by `make_problem`, the incoming gradients here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arguments import shaped
from .problem import Problem

__all__ = ["Backward", "make_backward_problem"]


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

    def coarse(self) -> np.ndarray:
        """The size of an lse from which on its rounding shows in the weights of its row: one for
        all rows, (), or that of each, (queries,).

        It moves all of them alike, where a softmax makes them sum to 1. Up to 4 that is within an
        epsilon. Beyond, it is no more than their own rounding where many keys share the weight; few
        of n random scores do where their lse is 2 log n or more (Derrida 1981, "Random-energy
        model").
        """
        p = self.problem
        if self.wants("relative_bias"):
            return np.zeros(())  # whose ends sum up many weights of each row
        digits = 2.0**13 if p.dtype.itemsize == 2 else 1.0  # that the result has less than an lse
        n_keys = p.n_keys if p.packing is None else np.subtract(*p.packing.spans()[::-1])
        return digits * np.maximum(4.0, 2 * np.log(np.maximum(1, n_keys)))

    def tolerance(self, lse):
        """How far the rounded weights of a softmax of this `lse` may be from a sum of 1."""
        return 4 * np.finfo(self.problem.accumulator).eps * (16 + np.abs(lse))

    def replaces(self, own, lse):
        """May the row sums of this call, of which `own` is the lse, stand for a coarse `lse`?

        Where that is of the same keys they differ by rounding only. One of 1 / eps or more has no
        digit left for the number of keys.
        """
        eps = np.finfo(self.problem.accumulator).eps
        return (np.abs(own - lse) <= 4 * eps * np.abs(lse)) | (np.abs(lse) > 1 / eps)


def make_backward_problem(problem: Problem, grad_out, out, lse, grad_lse=None) -> Backward:
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
    x = shaped(name, value, shape[1:] if p.one_head else shape)
    if x.dtype is not dtype or not x.flags.aligned:
        with np.errstate(all="ignore"):
            x = np.require(x, dtype, "A")
    return x[None] if p.one_head else x
