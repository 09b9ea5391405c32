"""The compiled kernels of ``csrc``: queries in the lanes of vectors, tiles on several threads."""

from __future__ import annotations

import math

import numpy as np

from ..backward_problem import Backward
from ..cells import nothing_seen
from ..problem import DOT, Problem, empty_like
from ..threads import worth_threads
from . import numpy_backward

try:
    import fastattn._kernels as _kernels
except ModuleNotFoundError:
    _kernels = None  # type: ignore[assignment]
    _missing = "the extension was not built"
except ImportError as error:
    _kernels = None  # type: ignore[assignment]
    _missing = f"the extension cannot be loaded ({error})"

name = "cython"

# Below this many flops a second thread costs more than it brings: starting one takes some 5 us.
ONE_THREAD_FLOPS = 2_000_000
# How many multiply-adds of a product take as long as one term of an additive score.
ADDITIVE_FLOPS = 10

# Of an lse beyond this float32 keeps so few digits that weights made again from it are off by more
# than their own rounding: it is made again too, in float64, at the price of a forward pass.
LARGE_LSE = 256.0

if _kernels is not None:
    _kernels.instruction_set()  # a wrong FASTATTN_DISABLE_CPU_FEATURES is an error from the start


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    p = problem
    if _kernels is None:
        return _missing
    if p.is_flex:
        return "a score_mod or mask_mod cannot be compiled into it"
    if p.bias is not None and not _readable(p.bias.dtype):
        return f"no kernel for a bias of {p.bias.dtype}"
    return None


def _readable(dtype: np.dtype) -> bool:
    return dtype.kind in "iu" or dtype.name in _BIAS_FLOATS


_BIAS_FLOATS = ("float16", "bfloat16", "float32", "float64", np.dtype(np.longdouble).name)


def run(problem: Problem):
    """Fill ``problem.result``; return ``(lse, weights)``, None for what was not asked for."""
    p = problem
    lse = np.empty(p.rows()) if p.return_lse else None
    weights = np.zeros(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    _attend(p, p.result, lse, weights)
    if lse is not None:
        with np.errstate(over="ignore"):
            lse = lse.astype(p.accumulator, copy=False)
    return lse, weights


def _attend(p: Problem, result, lse=None, weights=None, **survey):
    start, stop = _bounds(p)
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    order = None if stop is None else _longest_first(p, start, stop)
    _kernels.attend(
        p.q, p.k, p.v, p.k_scales, p.v_scales, result, p.batch, p.heads, p.kv_heads,
        p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop, p.mask,
        lse, weights, order, product(p), threads(p), False, p.measure.name, p.measure.weights,
        **survey,
    )  # fmt: skip


def _bounds(p: Problem):
    """The intervals of a problem, of (heads, queries) at least, or ``(None, None)``."""
    intervals = p.intervals()
    return (None, None) if intervals is None else tuple(map(np.atleast_2d, intervals))


def _longest_first(p: Problem, start, stop):
    """The flattened batch entries in the order of what they see, or None where all see the same:
    a run that ends in small pieces leaves no thread waiting for another.
    """
    if max(p.batch, default=1) < 2 or (start.ndim < 3 and stop.ndim < 3):
        return None
    seen = (stop - start).max(axis=(-2, -1), initial=0)
    return np.argsort(-np.broadcast_to(seen, p.batch).ravel(), kind="stable")


def product(problem: Problem) -> str:
    """Whose kernels multiply, as the character of a dtype."""
    p = problem
    if p.dtype.char == "f" and p.precision == "bfloat16":
        return "E"
    if p.k_scales is not None and p.dtype.char != "d":
        return "f"  # scaled numbers are no halves
    return p.dtype.char


def threads(problem: Problem) -> int:
    """How many threads `problem` is worth; what it computes does not depend on it."""
    cost = ADDITIVE_FLOPS if problem.measure.name == "additive" else 1
    return worth_threads(problem, _kernels.openmp_threads, ONE_THREAD_FLOPS // cost)


def run_map(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """The weights summed over cells, float64 (batch, heads, rows, columns)."""
    p = problem
    sums = np.zeros((*p.batch, p.heads, rows, columns))
    _attend(p, np.empty(p.rows(0), p.accumulator), sums=sums)
    return sums


def run_top(problem: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n)."""
    p = problem
    indices, weights = nothing_seen(p, n)
    kept = slice(min(n, p.n_keys))
    _attend(
        p, np.empty(p.rows(0), p.accumulator),
        weights=weights[..., kept], indices=indices[..., kept],
    )  # fmt: skip
    return indices, weights


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    if problem.measure is not DOT:
        return "no kernel for the gradients of distances and additive scores"
    return unsupported(problem)


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, each with every axis of the batch
    and of the heads; that of a bias of queries x keys has the bias's own.
    """
    b, p = backward, backward.problem
    if np.any(np.abs(b.lse) > 1 / np.finfo(p.accumulator).eps, where=np.isfinite(b.lse)):
        # No digit of such an lse is left for the number of keys: the softmax must be taken anew.
        return numpy_backward.run_backward(b)
    found = {
        "q": np.zeros((*p.batch, p.heads, *p.q.shape[-2:]), p.accumulator),
        "k": np.empty((*p.batch, p.kv_heads, *p.k.shape[-2:]), p.accumulator),
        "v": np.empty((*p.batch, p.kv_heads, *p.v.shape[-2:]), p.accumulator),
    }
    of_queries = (*range(len(p.batch)), -1)
    start, stop = _bounds(p)
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    scores = (p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop, p.mask)
    grad_slope = np.zeros(p.rows(3)) if b.wants("alibi") else None
    with np.errstate(all="ignore"):
        lse = _lse(b, scores)
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
    _kernels.differentiate(
        p.q, p.k, p.v, b.grad_out, lse, delta, found["q"], found["k"], found["v"], p.batch, p.heads,
        p.kv_heads, *scores, threads(p), grad_bias, grad_slope, key_heads,
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


def _lse(b: Backward, scores) -> np.ndarray:
    """The lse in float64, made again where it is too coarse by the kernels that make the gradients.

    That of a `merge` is not what this call would return, and stays what it is.
    """
    p, lse = b.problem, b.lse.astype(np.float64)
    coarse = np.abs(lse) > LARGE_LSE
    if not np.any(coarse, where=np.isfinite(lse)):
        return lse
    again = np.empty(p.rows())
    _kernels.attend(
        p.q, p.k, p.v, None, None, np.empty(p.rows(p.value_dim), p.dtype), p.batch, p.heads, p.kv_heads, *scores, again, None, None,
        p.accumulator.char, threads(p), True,
    )  # fmt: skip
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
    all keys of a row it is `rest`, the sum of those of the row's scores. Returns the flattened key heads, (items, sharers): those that
    have their place of it in common must come one after another.
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


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    p = problem
    together = max(1, p.group * p.n_queries)
    kind = product(p), together, p.measure.name
    queries, panel, keys = _kernels.tile_size(*kind)
    return {
        "kernel": f"{p.dtype}, multiplied as {_kernels.multiplied_as(*kind)}",
        "instruction set": _kernels.instruction_set(),
        "tile": f"{queries} queries, {keys} keys a pass",
        "threads": str(threads(p)),
        "skipped": f"{_share_skipped(p, panel):.0%} of the tiles"
        + (", and those that the mask hides" if p.mask is not None else ""),
    }


def _share_skipped(p: Problem, queries: int) -> float:
    """The share of the square that lies outside the intervals of whole panels of queries."""
    intervals = p.intervals()
    if intervals is None or not p.n_queries or not p.n_keys:
        return 0.0
    start, stop, _ = np.broadcast_arrays(*intervals, np.empty(p.n_queries))
    step = max(1, queries // p.group)
    edges = np.arange(0, p.n_queries, step)
    first = np.minimum.reduceat(np.where(start < stop, start, p.n_keys), edges, axis=-1)
    last = np.maximum.reduceat(np.where(start < stop, stop, 0), edges, axis=-1)
    return float(1 - np.mean(np.maximum(last - first, 0)) / p.n_keys)
