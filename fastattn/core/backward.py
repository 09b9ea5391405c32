"""One backward pass, validated: the call by `make_problem`, the incoming gradients here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .arguments import shaped
from .dtypes import FLOAT32, FLOAT64
from .problem import Problem

__all__ = ["Backward", "make_backward_problem"]

# Numbers of a head, operands and scores, that are solved in float64 besides: see `of_few_scores`.
FEW = 8192


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

    def of_few_scores(self) -> bool:
        """Are gradients wanted of parameters, single numbers or one for each head, of a float32
        problem so small that a copy of it in float64 costs next to nothing?

        Where its terms cancel, a parameter's gradient is less than their rounding in float32, and
        the error of plain NumPy's single number may be 0 by luck. The number of heads does not
        count, so that a slice of heads has the bits of the whole.
        """
        p = self.problem
        if not any(g.name not in "qkv" and g.name != "bias" for g in p.gradients):
            return False
        other = p.is_flex or p.on_device or p.precision is not None or p.k_scales is not None
        if p.dtype is not FLOAT32 or other:
            return False
        numbers = p.n_queries * p.n_keys
        numbers += (p.n_queries + p.n_keys) * (p.head_dim + p.value_dim)
        return math.prod(p.batch) * numbers <= FEW and max(p.k.size, p.v.size) <= FEW * p.kv_heads

    def in_float64(self, run) -> tuple[Backward, np.ndarray]:
        """The same from operands and results in float64, the latter found by the backend's `run`;
        and the heads, (heads,), of which those given are such results, of these keys alone.
        """
        p = self.problem
        q, k, v = (x.astype(FLOAT64) for x in (p.q, p.k, p.v))
        wide = replace(p, q=q, k=k, v=v, dtype=FLOAT64, return_lse=True, return_max=False,
                       return_weights=False, out=None)  # fmt: skip
        out = wide.new_result()
        lse, _, _ = run(wide, out)
        with np.errstate(all="ignore"):
            size = np.where(np.isfinite(lse), np.maximum(1, np.abs(lse)), 1)
            of_out = np.abs(v).max(initial=0) * (1 if p.dropout is None else p.dropout.factor)
            rounding = 4 * np.finfo(np.float32).eps * size[..., None]
            same = (self.lse == lse)[..., None] | (np.abs(self.lse - lse)[..., None] <= rounding)
            same = same & (np.abs(self.out - out) <= rounding * of_out)
        others = (*range(len(p.batch)), -2, -1)
        grad_lse = None if self.grad_lse is None else self.grad_lse.astype(FLOAT64)
        backward = Backward(wide, out, lse, self.grad_out.astype(FLOAT64), grad_lse)
        return backward, same.all(axis=others)

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
    """Check the other arguments of a backward pass through `problem`.

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
