"""The exact results of some rows of a case."""

from __future__ import annotations

import numpy as np

from .. import reference
from ..core.backward import Backward
from ..core.problem import make_problem
from .cases import Case

__all__ = ["exact_rows"]

# The error is measured on this many queries of every head: the exact result of all of them would
# take longer than the ranking. Float64 is judged in long double, which no BLAS speeds up.
EXACT_ROWS = {"float64": 16}
EXACT_ROWS_DEFAULT = 64


def exact_rows(case: Case, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """``(rows, exact)``: the exact results of some queries, spread over the whole length, or
    the gradients or tangents of these where they are the work; a largest score is one number
    more. With an option, which may count the queries, they follow each other.
    """
    n = min(case.n_queries, EXACT_ROWS.get(case.dtype, EXACT_ROWS_DEFAULT))
    rows = np.unique(np.linspace(0, case.n_queries - 1, n).astype(int))
    if case.option:
        rows = np.arange(n) + (case.n_queries - n) // 2
    start, stop = case.intervals()
    spans = start[rows], stop[rows]
    score_mod, bias = case.functions(np.asarray).get("score_mod"), None
    if score_mod is not None:  # these add
        head = np.arange(case.heads)[:, None, None]
        bias = score_mod(0.0, 0, head, rows[:, None], np.arange(case.n_keys))
    options = case.options(slice(rows[0], rows[-1] + 1))
    if case.option == "graph":  # the keys that none of the queries sees take no part
        seen, places = np.unique(options["mask"].indices, return_inverse=True)
        k, v = k[..., seen, :], v[..., seen, :]
        mask = options["mask"]
        options["mask"] = type(mask)((mask.data, places, mask.indptr), (n, len(seen)))
    problem = make_problem(q[..., rows, :], k, v, spans=spans, bias=bias, gradients=True, **options)
    real = np.longdouble if case.dtype == "float64" else np.float64
    out, lse, weights = reference.attend(problem, real)
    if case.option == "return_max" and case.work == "forward":
        largest = lse + np.log(weights.max(axis=-1))
        return rows, np.concatenate([out, largest[..., None]], axis=-1)
    if case.work == "forward":
        return rows, out
    if case.forward_mode:
        dq, *others = case.tangents()
        arrays = [x.astype(real) for x in (q[..., rows, :], k, v)]
        tangents = [x.astype(real) for x in (dq[..., rows, :], *others)]
        return rows, tangent(arrays, tangents, weights, out)
    backward = Backward(problem, out, lse, case.grad_out()[..., rows, :], None)
    return rows, reference.gradients(backward, real)["q"]


def tangent(arrays, tangents, weights, out) -> np.ndarray:
    """The derivative of `out` along tangents of q, k and v, or of q, with the default scale."""
    q, k, v = arrays
    dq, dk, dv = tangents if len(tangents) == 3 else (*tangents, np.zeros_like(k), np.zeros_like(v))
    group = q.shape[1] // k.shape[1]
    k, v, dk, dv = (np.repeat(x, group, axis=1) for x in (k, v, dk, dv))
    ds = (dq @ k.swapaxes(-1, -2) + q @ dk.swapaxes(-1, -2)) / np.sqrt(out.dtype.type(q.shape[-1]))
    moved = weights * ds
    return weights @ dv + moved @ v - moved.sum(axis=-1, keepdims=True) * out
