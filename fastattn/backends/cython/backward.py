"""Gradients by the compiled kernels: for a block of keys, all tiles of queries in turn."""

from __future__ import annotations

import math

import numpy as np

from ...core.backward import Backward
from ...core.output import empty_like
from ...core.problem import Problem
from ...core.row_sums import RowSums, sink_weights
from ..numpy import backward as numpy_backward
from . import sparse
from .kernel_args import (
    can_prepare,
    compute_dtype,
    from_relative_bias_rows,
    kernels,
    relative_bias_rows,
    threads,
    threads_pay,
)

__all__ = ["prepare_backward", "run_backward"]


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, with the axes of the problem;
    those of `q`, `k`, `v` and of a bias of queries x keys have length 1 where their arrays do.
    """
    b, p = backward, backward.problem
    if p.is_sparse and not sparse.can_differentiate(b):
        return numpy_backward.run_backward(b)
    arrays = {"q": p.q} if p.block_table is not None else {"q": p.q, "k": p.k, "v": p.v}
    found = {name: _room(p, name, x) for name, x in arrays.items()}
    found["q"].fill(0)
    grad_bias, key_heads = sparse.prepare_bias(b) if p.is_sparse else _prepare_bias(b)
    constant = b.wants("bias") and grad_bias is None
    sums = constant or b.wants("alibi") or b.wants("scale")
    row_sums = np.zeros(p.rows(6)) if sums else None
    relative_bias, of_relative_bias = relative_bias_rows(p), None
    if relative_bias is not None and b.wants("relative_bias"):
        of_relative_bias = np.zeros(relative_bias.shape)
    of_dim_weights = np.zeros(p.head_dim) if b.wants("w") else None
    rows = np.empty(p.rows(3))
    if p.is_sparse:
        kernels.differentiate_sparse(
            b, sparse.threads(p), rows, found["q"], found["k"], found["v"], grad_bias, row_sums,
            relative_bias, of_relative_bias,
        )  # fmt: skip
    else:
        kernels.differentiate(
            b, compute_dtype(p), threads(p), rows, found["q"], found.get("k"), found.get("v"),
            key_heads, grad_bias, row_sums, relative_bias, of_relative_bias, of_dim_weights,
        )  # fmt: skip
    if row_sums is not None or b.wants("sinks"):
        found |= _of_rows(b, rows, row_sums)
    if grad_bias is not None:
        found["bias"] = grad_bias
    if of_relative_bias is not None:
        found["relative_bias"] = from_relative_bias_rows(p, of_relative_bias)
    if of_dim_weights is not None:
        found["w"] = of_dim_weights
    for name, x in arrays.items():  # in the memory order of its array
        ordered = empty_like(x, found[name].shape, found[name].dtype)
        if ordered.strides != found[name].strides:
            ordered[...] = found[name]
            found[name] = ordered
    return found


def prepare_backward(backward: Backward, arrays: tuple):
    """A plan that runs further passes of this kind on such `arrays`, as `scaled_dot_backward` takes
    them; or None where a gradient is not what the kernel sums.
    """
    b, p = backward, backward.problem
    given = (b.grad_out, p.q, p.k, p.v, b.out, b.lse, b.grad_lse)
    copied = not all(map(np.may_share_memory, arrays, given))
    elsewhere = p.is_sparse or p.block_table is not None or len(p.gradients) > 3
    nbytes = sum(x.nbytes for x in arrays[1:4])
    if elsewhere or copied or p.dtype.itemsize == 2 or not can_prepare(p, nbytes):
        return None
    outputs = []
    for i, heads in ((1, p.heads), (2, p.kv_heads), (3, p.kv_heads)):
        new = np.empty_like(arrays[i], p.dtype)
        shared = new.shape[:-2] != (*p.batch, heads)[p.one_head :]
        gaps = new.shape[-1] > 1 and new.strides[-1] != new.itemsize
        if shared or gaps:
            return None
        outputs.append((new, i, i == 1, True))
    outputs.append((np.empty(p.rows(3)), -1, False, False))
    grad_q, grad_k, grad_v, rows = (x for x, *_ in outputs)
    if p.one_head:
        grad_q, grad_k, grad_v = grad_q[None], grad_k[None], grad_v[None]
    key_heads = np.arange(math.prod(p.batch) * p.kv_heads)[:, None]
    plan = kernels.Plan(outputs, threads_pay(p))
    kernels.differentiate(
        b, compute_dtype(p), threads(p), rows, grad_q, grad_k, grad_v, key_heads,
        relative_bias=relative_bias_rows(p), plan=plan,
    )  # fmt: skip
    return plan


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
            sink = sink_weights(sinks, np.exp((sinks - lse) - lse_rest))
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
