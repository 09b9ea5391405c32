"""The compiled kernels of ``csrc``: queries in the lanes of vectors, tiles on several threads."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from ..threads import thread_count

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

if _kernels is not None:
    _kernels.instruction_set()  # a wrong FASTATTN_DISABLE_CPU_FEATURES is an error from the start


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`, or None."""
    p = problem
    if _kernels is None:
        return _missing
    if p.dtype.char not in "fd":
        return f"no kernel for {p.dtype}"
    if p.mask is p.bias is p.alibi is p.softcap is p.sinks is None and not p.return_weights:
        return None
    names = ("mask", "bias", "alibi", "softcap", "sinks")
    wanted = [name for name in names if getattr(p, name) is not None]
    wanted += ["return_weights"] * p.return_weights
    return f"no kernel for {', '.join(wanted)}"


def run(problem: Problem):
    """Fill ``problem.result``; return ``(lse, None)``, None for an lse that was not asked for."""
    p = problem
    intervals = p.intervals()
    start, stop = (None, None) if intervals is None else map(np.atleast_2d, intervals)
    lse = np.empty(p.rows()) if p.return_lse else None
    _kernels.attend(
        p.q, p.k, p.v, p.result, p.batch, p.heads, p.kv_heads, p.scale,
        start, stop, lse, threads(p),
    )  # fmt: skip
    return lse if lse is None else lse.astype(p.accumulator, copy=False), None


def threads(problem: Problem) -> int:
    """How many threads `problem` is worth; what it computes does not depend on it."""
    p = problem
    flops = 2 * p.n_queries * p.n_keys * (p.head_dim + p.value_dim) * p.heads
    for n in p.batch:
        flops *= n
    if flops < ONE_THREAD_FLOPS:
        return 1
    return thread_count(p.threads, _kernels.openmp_threads())
