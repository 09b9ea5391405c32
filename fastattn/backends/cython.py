"""The compiled kernels of ``csrc``: queries in the lanes of vectors, tiles on several threads."""

from __future__ import annotations

import numpy as np

from ..backward_problem import Backward
from ..problem import Problem, empty_like
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
    start, stop = _bounds(p)
    lse = np.empty(p.rows()) if p.return_lse else None
    weights = np.zeros(p.rows(p.n_keys), p.dtype) if p.return_weights else None
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    order = None if stop is None else _longest_first(p, start, stop)
    _kernels.attend(
        p.q, p.k, p.v, p.k_scales, p.v_scales, p.result, p.batch, p.heads, p.kv_heads,
        p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop, p.mask,
        lse, weights, order, product(p), threads(p),
    )  # fmt: skip
    if lse is not None:
        with np.errstate(over="ignore"):
            lse = lse.astype(p.accumulator, copy=False)
    return lse, weights


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
    return worth_threads(problem, _kernels.openmp_threads, ONE_THREAD_FLOPS)


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    for gradient in problem.gradients:
        if gradient.name in ("bias", "alibi"):
            return f"no kernel for the gradient of {gradient.name}"
    return unsupported(problem)


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments, each of the accumulator's dtype
    and with every axis of the batch and of the heads.
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
    lse = b.lse.astype(np.float64)
    start, stop = _bounds(p)
    with np.errstate(all="ignore"):
        out, grad_out = (x.astype(p.accumulator, copy=False) for x in (b.out, b.grad_out))
        delta = np.einsum("...d,...d->...", grad_out, out).astype(np.float64)
        if b.grad_lse is not None:
            delta -= b.grad_lse
        if b.wants("sinks") and p.sinks is not None:
            sinks = p.sinks[:, None]
            weights = np.where(sinks == -np.inf, 0, np.exp(sinks - lse))
            rest = (*range(len(p.batch)), -1)
            found["sinks"] = -(weights * delta).sum(axis=rest).astype(p.accumulator)
    q_offset = None if p.alibi is None else np.asarray(p.q_offset)
    if np.any(np.abs(lse) > LARGE_LSE, where=np.isfinite(lse)):
        _kernels.attend(
            p.q, p.k, p.v, None, None, np.empty(p.rows(p.value_dim), p.dtype), p.batch, p.heads,
            p.kv_heads, p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop,
            p.mask, lse, None, None, p.accumulator.char, threads(p), True,
        )  # fmt: skip
    _kernels.differentiate(
        p.q, p.k, p.v, b.grad_out, lse, delta, found["q"], found["k"], found["v"], p.batch, p.heads,
        p.kv_heads, p.scale, p.softcap or 0.0, p.bias, p.alibi, p.sinks, q_offset, start, stop,
        p.mask, threads(p),
    )  # fmt: skip
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if not x.flags.c_contiguous:  # in the memory order of its array
            ordered = empty_like(x, found[name].shape, p.accumulator)
            ordered[...] = found[name]
            found[name] = ordered
    return found


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    p = problem
    together = max(1, p.group * p.n_queries)
    queries, panel, keys = _kernels.tile_size(product(p), together)
    return {
        "kernel": f"{p.dtype}, multiplied as {_kernels.multiplied_as(product(p), together)}",
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
