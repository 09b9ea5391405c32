"""Gradients by the compiled kernels: for a block of keys, all tiles of queries in turn."""

from __future__ import annotations

import math

import numpy as np

from ..backward_problem import Backward
from ..problem import DOT, Problem
from ..results import empty_like
from . import numpy_backward
from .cython_kernels import attend, bounds, kernels, product, threads

__all__ = ["run_backward"]

# Of an lse beyond this float32 keeps so few digits that weights made again from it are off by more
# than their own rounding: it is made again too, in float64, at the price of a forward pass.
LARGE_LSE = 256.0


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, each with every axis of the
    batch and of the heads; that of a bias of queries x keys has the bias's own.
    """
    b, p = backward, backward.problem
    if p.measure is not DOT:
        return numpy_backward.run_backward(b)
    if np.any(np.abs(b.lse) > 1 / np.finfo(p.accumulator).eps, where=np.isfinite(b.lse)):
        # No digit of such an lse is left for the number of keys: the softmax must be taken anew.
        return numpy_backward.run_backward(b)
    found = {
        "q": np.zeros((*p.batch, p.heads, *p.q.shape[-2:]), p.accumulator),
        "k": np.empty((*p.batch, p.kv_heads, *p.k.shape[-2:]), p.accumulator),
        "v": np.empty((*p.batch, p.kv_heads, *p.v.shape[-2:]), p.accumulator),
    }
    of_queries = (*range(len(p.batch)), -1)
    start, stop = bounds(p)
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    grad_slope = np.zeros(p.rows(3)) if b.wants("alibi") else None
    with np.errstate(all="ignore"):
        lse = _lse(b)
        out, grad_out = (x.astype(p.accumulator, copy=False) for x in (b.out, b.grad_out))
        mean = np.einsum("...d,...d->...", grad_out, out).astype(np.float64)
        delta = mean if b.grad_lse is None else mean - b.grad_lse
        sink = _sink_weights(p, lse)
        # Along a row the gradients of the scores add up to nothing but what passes by the keys.
        seen = np.where(lse == -np.inf, 0, 1 - sink)
        rest = np.where(seen == 0, 0, mean * sink + (mean - delta) * seen)
        if b.wants("sinks"):
            found["sinks"] = -(sink * delta).sum(axis=of_queries)
        key_heads = _prepare_bias(b, rest, found)
    grad_bias = found.get("bias")
    if grad_bias is not None and grad_bias.shape[-1] != p.n_keys:
        grad_bias = None  # filled already
    kernels.differentiate(
        p.q, p.k, p.v, b.grad_out, lse, delta, found["q"], found["k"], found["v"], p.batch, p.heads,
        p.kv_heads, p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop,
        p.mask, product(p), threads(p), grad_bias, grad_slope, key_heads,
    )  # fmt: skip
    if grad_slope is not None:
        # What the rounding of out made of every score's gradient shows in their sum.
        slope, total, distance = np.moveaxis(grad_slope, -1, 0)
        with np.errstate(all="ignore"):
            found["alibi"] = (slope + (total - rest) * distance).sum(axis=of_queries)
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if not x.flags.c_contiguous:  # in the memory order of its array
            ordered = empty_like(x, found[name].shape, p.accumulator)
            ordered[...] = found[name]
            found[name] = ordered
    return found


def _lse(b: Backward) -> np.ndarray:
    """The lse in float64, made again where it is too coarse by the kernels that make the gradients.

    That of a `merge` is not what this call would return, and stays what it is.
    """
    p, lse = b.problem, b.lse.astype(np.float64)
    coarse = np.abs(lse) > LARGE_LSE
    if not np.any(coarse, where=np.isfinite(lse)):
        return lse
    again = np.empty(p.rows())
    attend(p, np.empty(p.rows(p.value_dim), p.dtype), again, for_gradients=True)
    same = np.abs(again - lse) <= 4 * np.finfo(p.accumulator).eps * np.abs(lse)
    return np.where(same, again, lse)


def _sink_weights(p: Problem, lse):
    """What of each row's softmax its sink takes."""
    if p.sinks is None:
        return 0.0
    sinks = p.sinks[:, None]
    return np.where(sinks == -np.inf, 0, np.exp(sinks - lse))


def _prepare_bias(b: Backward, rest, found) -> np.ndarray:
    """Put into `found` where the gradient of the bias is to be summed; of one that is the same for
    all keys of a row it is `rest`, the sum of those of the row's scores.

    Returns the flattened key heads, (items, sharers): those that have their place of it in common
    must come one after another.
    """
    p = b.problem
    each = np.arange(math.prod(p.batch) * p.kv_heads)
    for gradient in p.gradients:
        if gradient.name != "bias":
            continue
        shape = (1,) * (3 + len(p.batch) - len(gradient.shape)) + gradient.shape
        if shape[-1] != p.n_keys:
            found["bias"] = rest[..., None]
        elif shape[-2] != p.n_queries or p.n_queries == 1:
            found["bias"] = np.zeros((*p.batch, p.heads, 1, p.n_keys))
        else:
            found["bias"] = np.zeros(shape, p.accumulator)
            common = [axis for axis, n in enumerate(shape[:-2]) if n == 1]
            grid = each.reshape(*p.batch, p.kv_heads)
            last = range(grid.ndim - len(common), grid.ndim)
            sharers = max(1, math.prod(grid.shape[axis] for axis in common))
            return np.ascontiguousarray(np.moveaxis(grid, common, last)).reshape(-1, sharers)
    return each[:, None]
