"""Which backend serves a problem: the first of `BACKENDS` that can, or the one that was named."""

from __future__ import annotations

from . import reference
from .backends import cython, numba, numpy
from .environment import getenv
from .problem import Problem

__all__ = ["BACKENDS", "NAMED_ONLY", "named", "select"]

# In the order tried. A backend is a module with a `name`, `unsupported(problem)` -> why it cannot
# serve, in words, or None, `run(problem)`, which fills `problem.result` -> (lse, weights), and
# `plan(problem)`, what it says of itself to `explain`.
BACKENDS = (cython, numba, numpy)

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
        reasons = {}
        for candidate in BACKENDS:
            reasons[candidate.name] = reason = candidate.unsupported(problem)
            if reason is None:
                return candidate
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"backend: none can serve this call: {told}")
    chosen = named(backend, origin)
    reason = chosen.unsupported(problem)
    if reason is not None:
        able = [b.name for b in BACKENDS + NAMED_ONLY if b.unsupported(problem) is None]
        raise ValueError(
            f"{origin}: {chosen.name!r} given, which cannot serve this call: {reason}; "
            f"these can: {', '.join(able)}"
        )
    return chosen


def named(backend: str, origin: str = "backend"):
    """The backend module called `backend`."""
    if not isinstance(backend, str):
        raise TypeError(f"{origin}: {type(backend).__name__} given, a name wanted")
    every = {b.name: b for b in BACKENDS + NAMED_ONLY}
    if backend not in every:
        raise ValueError(f"{origin}: {backend!r} given, one of {', '.join(every)} wanted")
    return every[backend]
