"""Calls that are made again and again on arrays of the same layout, prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .core.extension import kernels
from .core.threads import thread_count

__all__ = ["keep_plan", "plan_key", "plans", "run_plan"]

# More layouts than this are hardly in use at once; a plan takes 20 KB.
MOST = 256

# By the key of a call: what runs it, None where there was one such call only (a plan takes longer
# to make than it saves once), or False where the backend that serves it has none.
plans: dict[bytes | None, Any] = {}

# What decides how a call is computed, of its arrays and its options: see fastattn/_kernels.pyi.
plan_key = (lambda arrays, options: None) if kernels is None else kernels.plan_key


def keep_plan(key: bytes, prepare: Callable[..., Any], *arguments) -> None:
    """Prepare for further calls of that key, from the second one on: `prepare` makes the plan, or
    returns None.
    """
    if key not in plans:
        if len(plans) >= MOST:
            plans.clear()
        plans[key] = None
    elif plans.get(key) is None:  # another thread may have cleared them
        plans[key] = prepare(*arguments) or False


def run_plan(plan, arrays: tuple, threads: int | None):
    """What the call returns for these arrays, on so many threads as are asked for."""
    n = thread_count(threads, kernels.openmp_threads()) if plan.uses_threads else 1
    return plan.run(arrays, n)
