"""Gradients by the compiled kernels: for a block of keys, all tiles of queries in turn."""

from __future__ import annotations

import math

import numpy as np

from ...core.backward import Backward
from ...core.output import empty_like
from ...core.problem import DOT, Problem
from ...core.row_sums import RowSums
from ..numpy import backward as numpy_backward
from . import sparse
from .kernel_args import (
    block_table,
    compute_dtype,
    from_relative_bias_rows,
    kernels,
    relative_bias_rows,
    scale_args,
    sequences,
    threads,
)

__all__ = ["run_backward"]


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, with the axes of the problem;
    those of `q`, `k`, `v` and of a bias of queries x keys have length 1 where their arrays do.
    """
    b, p = backward, backward.problem
    able = sparse.can_differentiate(b) if p.is_sparse else p.score_function is DOT
    if not able:
        return numpy_backward.run_backward(b)
    arrays = {"q": p.q} if p.block_table is not None else {"q": p.q, "k": p.k, "v": p.v}
    found = {name: _room(p, name, x) for name, x in arrays.items()}
    found["q"].fill(0)
    grad_bias, key_heads = sparse.prepare_bias(b) if p.is_sparse else _prepare_bias(b)
    constant = b.wants("bias") and grad_bias is None
    sums = constant or b.wants("alibi") or b.wants("scale")
    row_sums = np.zeros(p.rows(6)) if sums else None
    scale, scales = scale_args(p, per_head=b.wants("scale"))
    relative_bias, of_relative_bias = relative_bias_rows(p), None
    if relative_bias is not None and b.wants("relative_bias"):
        of_relative_bias = np.zeros(relative_bias.shape)
    rows = np.empty(p.rows(3))
    if p.is_sparse:
        sparse.differentiate(b, found, rows, row_sums, grad_bias)
    else:
        kernels.differentiate(
            p.q, p.k, p.v, b.out, b.lse, b.grad_out, b.grad_lse, rows, np.atleast_1d(b.coarse()),
            found["q"], found.get("k"), found.get("v"), p.batch, p.heads, p.kv_heads, scale,
            p.softcap or 0.0, p.bias, p.alibi, p.sinks, p.key_range, p.mask, compute_dtype(p),
            threads(p), grad_bias, row_sums, key_heads, p.dropout,
            scales, relative_bias, b.wants("scale"), of_relative_bias, sequences(p),
            block_table(p),
        )  # fmt: skip
    if row_sums is not None or b.wants("sinks"):
        found |= _of_rows(b, rows, row_sums)
    if grad_bias is not None:
        found["bias"] = grad_bias
    if of_relative_bias is not None:
        found["relative_bias"] = from_relative_bias_rows(p, of_relative_bias)
    for name, x in arrays.items():  # in the memory order of its array
        ordered = empty_like(x, found[name].shape, found[name].dtype)
        if ordered.strides != found[name].strides:
            ordered[...] = found[name]
            found[name] = ordered
    return found


def _room(p: Problem, name: str, x) -> np.ndarray:
    """Where the gradient of `q`, `k` or `v` is summed: in the memory order of its array, if that
    leaves no gaps between dims. That of a key or value which no other head adds to is summed in the
    kernel's scratch, and may be rounded at once.
    """
    shape = p.with_axes(x.shape)
    alone = name != "q" and shape[:-2] == (*p.batch, p.kv_heads)
    room = empty_like(x, shape, p.dtype if alone else p.accumulator)
    gaps = shape[-1] > 1 and room.strides[-1] != room.itemsize
    return np.empty(shape, room.dtype) if gaps else room


def _of_rows(b: Backward, rows, row_sums) -> dict[str, np.ndarray]:
    """The gradients that need no product: of sinks, slopes, and a bias constant along the keys."""
    p = b.problem
    lse, lse_rest, mean = np.moveaxis(rows, -1, 0)
    of_queries = (*range(len(p.batch)), -1)
    found, sink = {}, np.zeros(())
    with np.errstate(all="ignore"):
        from_lse = 0.0 if b.grad_lse is None else b.grad_lse.astype(np.float64)
        if p.sinks is not None:
            sinks = p.sinks[:, None]
            sink = np.where(sinks == -np.inf, 0, np.exp((sinks - lse) - lse_rest))
        if b.wants("sinks"):
            found["sinks"] = -(sink * (mean - from_lse)).sum(axis=of_queries)
        if row_sums is not None:
            weights, grads, *factors = np.moveaxis(row_sums, -1, 0)
            settled = mean, from_lse, sink, b.tolerance(lse)
            grads, slopes = RowSums(weights, grads, *factors[:2]).settled(*settled)
            _, of_scale = RowSums(weights, row_sums[..., 1], *factors[2:]).settled(*settled)
            found |= {"alibi": -slopes.sum(axis=of_queries), "bias": grads[..., None]}
            found["scale"] = of_scale.sum(axis=of_queries)
    return found


def _prepare_bias(b: Backward) -> tuple[np.ndarray | None, np.ndarray]:
    """Where the gradient of the bias is to be summed, or None; that of one that is the same for all
    keys of a row is the sum of those of the row's scores.

    Also the flattened key heads, (items, sharers): those that have their place of it in common
    must come one after another.
    """
    p = b.problem
    each = np.arange(math.prod(p.batch) * p.kv_heads)
    for gradient in p.gradients:
        if gradient.name != "bias":
            continue
        shape = (1,) * (3 + len(p.batch) - len(gradient.shape)) + gradient.shape
        if shape[-1] != p.n_keys:
            break
        if shape[-2] != p.n_queries or p.n_queries == 1:
            return np.zeros((*p.batch, p.heads, 1, p.n_keys)), each[:, None]
        common = [axis for axis, n in enumerate(shape[:-2]) if n == 1]
        grid = each.reshape(*p.batch, p.kv_heads)
        last = range(grid.ndim - len(common), grid.ndim)
        sharers = max(1, math.prod(grid.shape[axis] for axis in common))
        heads = np.ascontiguousarray(np.moveaxis(grid, common, last)).reshape(-1, sharers)
        return np.zeros(shape, p.accumulator), heads
    return None, each[:, None]
