"""The user's functions, compiled; what they may not be is told in words."""

from __future__ import annotations

from functools import lru_cache

from numba import float32, float64, int64, njit, types
from numba.core.dispatcher import Dispatcher
from numba.core.errors import NumbaError
from numba.core.registry import cpu_target

__all__ = ["mask_function", "score_function"]


def score_function(function, itemsize: int):
    """A `score_mod` for scores of that size, or None."""
    real = float32 if itemsize == 4 else float64
    wanted = (types.Float, types.Integer)
    return function and _compiled("score_mod", function, (real, *[int64] * 4), wanted)


def mask_function(function):
    """A `mask_mod`, or None."""
    return function and _compiled(
        "mask_mod", function, (int64,) * 4, (types.Boolean, types.Integer)
    )


@lru_cache(64)
def _compiled(name: str, function, arguments, wanted):
    compiled = _as_dispatcher(function)
    called = getattr(function, "__name__", "?")
    try:
        context = cpu_target.typing_context
        result = context.resolve_function_type(
            types.Dispatcher(compiled), arguments, {}
        ).return_type
    except (NumbaError, TypeError) as error:
        raise TypeError(f"{name}: {called!r} cannot be compiled by Numba: {error}") from error
    if not isinstance(result, wanted):
        raise TypeError(f"{name}: {called!r} returns {result}, {_WORDS[name]} wanted")
    return compiled


_WORDS = {"score_mod": "a real number", "mask_mod": "a bool"}


@lru_cache(64)
def _as_dispatcher(function):
    if isinstance(function, Dispatcher):
        return function
    # Dividing by 0 as NumPy does: a branch to an exception would not be vectorised.
    return njit(error_model="numpy")(getattr(function, "py_func", function))
