"""Small calls that are made again and again on arrays of the same layout, prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .core.extension import kernels

__all__ = ["keep_plan", "plan_key", "plans"]

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
    elif plans[key] is None:
        plans[key] = prepare(*arguments) or False
