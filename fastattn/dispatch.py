"""Which backend serves a problem: the first of `BACKENDS` that can, or the one that was named."""

from __future__ import annotations

import numpy as np

from . import reference
from .backends import cuda, cython, numpy
from .environment import getenv
from .problem import Problem

__all__ = ["BACKENDS", "NAMED_ONLY", "ON_HOST", "named", "select", "unsupported"]

# In the order tried. A backend is a module with a `name`, `unsupported(problem)` -> why it cannot
# serve, in words, or None, `run(problem)`, which fills `problem.result` -> (lse, weights), and
# `plan(problem)`, what it says of itself to `explain`.
BACKENDS = (cython, cuda, numpy)

# Those that arrays in the host's memory are given to; copying them to a device is for the user to
# decide. Arrays that are on a device are given to nobody but `cuda`.
ON_HOST = tuple(backend for backend in BACKENDS if backend is not cuda)

_ndarray = np.ndarray

# The reference makes queries x keys arrays, so it runs only where somebody asks for it.
NAMED_ONLY = (reference,)


def select(problem: Problem, backend: str | None = None):
    """The backend module for `problem`.

    ``backend`` wins, then the environment's ``FASTATTN_BACKEND``, then the order of `BACKENDS`.
    A backend that is named and cannot serve is an error, never a silent fall-back.
    """
    origin = "backend"
    if backend is None:
        backend, origin = getenv("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if backend is None:
        if type(problem.q) is not _ndarray:
            reason = cuda.unsupported(problem)
            if reason is not None:
                raise ValueError(f"q: on a CUDA device, where nothing can run: {reason}")
            return cuda
        for candidate in ON_HOST[:-1]:
            if candidate.unsupported(problem) is None:
                return candidate
        return ON_HOST[-1]  # serves everything
    chosen = named(backend, origin)
    reason = unsupported(chosen, problem)
    if reason is not None:
        able = [b.name for b in BACKENDS if unsupported(b, problem) is None]
        raise ValueError(
            f"{origin}: {chosen.name!r} given, which cannot serve this call: {reason}; "
            f"these can: {', '.join(able) or 'none'}"
        )
    return chosen


def unsupported(backend, problem: Problem) -> str | None:
    """Why `backend` cannot serve `problem`, in words, or None."""
    if problem.on_device and backend is not cuda:
        return "the arrays are on a CUDA device"
    return backend.unsupported(problem)


def named(backend: str, origin: str = "backend"):
    """The backend module called `backend`."""
    if not isinstance(backend, str):
        raise TypeError(f"{origin}: {type(backend).__name__} given, a name wanted")
    every = {b.name: b for b in BACKENDS + NAMED_ONLY}
    if backend not in every:
        raise ValueError(f"{origin}: {backend!r} given, one of {', '.join(every)} wanted")
    return every[backend]
