"""Which backend serves a problem: the first of `BACKENDS` that can, or the one that was named."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from . import reference
from .backends import cuda, cython, numba, numpy
from .core.environment import getenv
from .core.problem import Problem

__all__ = [
    "BACKENDS",
    "NAMED_ONLY",
    "ON_HOST",
    "cannot_run",
    "named",
    "select",
    "unsupported",
    "unsupported_backward",
    "unsupported_forward_mode",
    "unsupported_map",
]

# In the order tried. A backend is a module with a `name`, `unsupported(problem)` -> why it cannot
# serve, in words, or None, `run(problem, result)`, which fills `result` -> (lse, row_max, weights),
# and `describe(problem)`, what it says of itself to `explain`. One that computes gradients also has
# `unsupported_backward(problem)` and `run_backward(backward)` -> {name of an argument: gradient},
# with each axis along which the argument broadcasts either in full or summed already. One whose
# calls can be prepared has `prepare(problem, of_cache)` and `prepare_backward(backward, arrays)`
# -> a plan, of which `run(arrays, threads)` is the call on other arrays of that layout, or None.
# One that pushes tangents forward has `unsupported_forward_mode(problem)` and
# `run_forward_mode(problem, tangents)`, these by the names of their operands -> (tangent of out,
# tangent of lse); if one pass gives results and tangents, `run_dual(problem, tangents, result)`,
# which fills `result` -> (lse, tangent of out, tangent of lse). One that makes maps of the weights
# has `run_map(problem, rows, columns)` -> their sums over cells, and `run_top(problem, n)` ->
# (indices, weights) of each query's strongest keys.
# One that may be there without working has `broken()`, which says why, or None.
BACKENDS = (cython, cuda, numba, numpy)

# Those that arrays in the host's memory are given to; copying them to a device is for the user to
# decide. Arrays on a device are given to `cuda` alone.
ON_HOST = tuple(backend for backend in BACKENDS if backend is not cuda)

_ndarray = np.ndarray

# The reference makes queries x keys arrays, so it runs only where it is named.
NAMED_ONLY = (reference,)


def unsupported(backend, problem: Problem) -> str | None:
    """Why the module `backend` cannot serve `problem`, in words, or None."""
    if type(problem.q) is not _ndarray and backend is not cuda:
        return "the arrays are on a CUDA device"
    return backend.unsupported(problem)


def unsupported_backward(backend, problem: Problem) -> str | None:
    """Why the module `backend` cannot compute the gradients of `problem`, or None."""
    if not hasattr(backend, "run_backward"):
        return "it computes no gradients"
    if type(problem.q) is not _ndarray and backend is not cuda:
        return "the arrays are on a CUDA device"
    return backend.unsupported_backward(problem)


def unsupported_forward_mode(backend, problem: Problem) -> str | None:
    """Why the module `backend` cannot push tangents through `problem`, or None."""
    if not hasattr(backend, "run_forward_mode"):
        return "it computes no tangents"
    if type(problem.q) is not _ndarray:
        return "the arrays are on a CUDA device"
    return backend.unsupported_forward_mode(problem)


def unsupported_map(backend, problem: Problem) -> str | None:
    """Why the module `backend` cannot make maps of the weights of `problem`, or None."""
    if not hasattr(backend, "run_map"):
        return "it makes no maps of the weights"
    return unsupported(backend, problem)


def select(problem: Problem, backend: str | None = None, unsupported=unsupported, *, any_one=False):
    """The backend module for `problem`: forward, or what another `unsupported` is about.

    ``backend`` wins, then the environment's ``FASTATTN_BACKEND`` unless `any_one` will do, then the
    order of `BACKENDS`.
    A backend that is named and cannot serve is an error, never a silent fall-back.
    """
    origin = "backend"
    if backend is None and not any_one:
        backend, origin = getenv("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if backend is None:
        reasons: list[tuple[Any, str]] = []
        for candidate in ON_HOST if type(problem.q) is _ndarray else (cuda,):
            reason = unsupported(candidate, problem)
            if reason is None:
                for other, why in reasons:
                    _warn_if_broken(other, why)
                return candidate
            reasons.append((candidate, reason))
        told = "; ".join(f"{candidate.name}: {reason}" for candidate, reason in reasons)
        subject = "q: on a CUDA device, where" if problem.on_device else "backend:"
        raise ValueError(f"{subject} none can serve this call: {told}")
    chosen = named(backend, origin)
    reason = unsupported(chosen, problem)
    if reason is not None:
        able = [b.name for b in BACKENDS + NAMED_ONLY if unsupported(b, problem) is None]
        raise ValueError(
            f"{origin}: {chosen.name!r} given, which cannot serve this call: {reason}; "
            f"these can: {', '.join(able) or 'none'}"
        )
    return chosen


def cannot_run(backend, problem: Problem) -> str | None:
    """Why the module `backend` cannot run `problem` as things are, or None: what `unsupported`
    says, or what is wrong with a setting of the environment, which is an error of the call.
    """
    reason = unsupported(backend, problem)
    try:
        if reason is None and hasattr(backend, "describe"):
            backend.describe(problem)
    except ValueError as error:
        return str(error)
    return reason


_told: set[str] = set()  # the backends that a warning has been about


def _warn_if_broken(backend, reason: str) -> None:
    """Say once that calls fall past a backend that is there and does not work."""
    if hasattr(backend, "broken") and backend.broken() == reason and backend.name not in _told:
        _told.add(backend.name)
        warnings.warn(f"fastattn: {backend.name} is passed over: {reason}", RuntimeWarning, 5)


def named(backend: str, origin: str = "backend"):
    """The backend module called `backend`."""
    if not isinstance(backend, str):
        raise TypeError(f"{origin}: expected a name, got {type(backend).__name__}")
    every = {b.name: b for b in BACKENDS + NAMED_ONLY}
    if backend not in every:
        raise ValueError(f"{origin}: expected one of {', '.join(every)}, got {backend!r}")
    return every[backend]
