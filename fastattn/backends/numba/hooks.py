"""The user's functions: compiled, and called for vectors of rows. What they may not be is told in
words.
"""

from __future__ import annotations

from functools import lru_cache

from llvmlite import ir
from numba import float32, float64, int64, njit, types
from numba.core import cgutils
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from .numbers import rounded
from .vectors import vector_of

__all__ = ["POSITIVE", "as_score", "for_rows", "mask_function", "score_function"]

# An index masked with this is known not to count from the end of an array: what lies in a row can
# be loaded as a vector.
POSITIVE = (1 << 63) - 1


def score_function(function, itemsize: int, name="score_mod"):
    """A `score_mod`, or its `score_grad`, for scores of that size, or None."""
    real = float32 if itemsize == 4 else float64
    wanted = (types.Float, types.Integer)
    return function and _compiled(name, function, (real, *[int64] * 4), wanted)


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
    except MemoryError:
        raise
    except Exception as error:  # Numba's own are of many types, nor is it only they that it raises
        raise TypeError(f"{name}: {called!r} cannot be compiled by Numba: {error}") from error
    if not isinstance(result, wanted):
        raise TypeError(f"{name}: expected {_WORDS[name]} from {called!r}, got {result}")
    return compiled


_WORDS = {"score_mod": "a real number", "score_grad": "a real number", "mask_mod": "a bool"}


@lru_cache(64)
def _as_dispatcher(function):
    if isinstance(function, Dispatcher):
        return function
    # Dividing by 0 as NumPy does: a branch to an exception would not be vectorised.
    return njit(error_model="numpy")(getattr(function, "py_func", function))


def as_score(x, like):
    """What a `score_mod` returned, in the type of scores; a finite number stays finite."""


@overload(as_score, inline="always")
def _as_score(x, like):
    if x == float64 and like == float32:
        return lambda x, like: rounded(x, like)
    return lambda x, like: x


@intrinsic
def for_rows(typingctx, body, first, count, like, *args):
    """Call ``body(lane, i, *args)`` for the row i = first + lane of each lane below `count`, as
    many lanes at once as `like`, a scalar, has. LLVM would unroll a loop as short as this one, or
    use vectors of half the width.
    """
    whole = types.int64
    call = typingctx.resolve_function_type(body, (whole, whole, *args), {})

    def emit(context, builder, sig, values):
        function, before = context.get_function(body, call), builder.basic_block
        test, inside, after = (
            builder.append_basic_block(f"rows.{part}") for part in ("test", "body", "end")
        )
        zero, one = (ir.IntType(64)(n) for n in (0, 1))
        first = builder.and_(values[1], ir.IntType(64)(POSITIVE))
        builder.branch(test)
        builder.position_at_end(test)
        lane, i = builder.phi(zero.type), builder.phi(zero.type)
        builder.cbranch(builder.icmp_signed("<", lane, values[2]), inside, after)
        builder.position_at_end(inside)
        function(builder, (lane, i, *cgutils.unpack_tuple(builder, values[4])))
        for phi, start in ((lane, zero), (i, first)):
            phi.add_incoming(start, before)
            phi.add_incoming(builder.add(phi, one, flags=("nsw",)), builder.basic_block)
        _vectorise(builder.module, builder.branch(test), vector_of(like).lanes)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(body, whole, whole, like, types.BaseTuple.from_types(args)), emit


def _vectorise(module, latch, lanes: int) -> None:
    """Tell LLVM with how many lanes the loop is to be vectorised that ends in this branch."""
    hints = [
        module.add_metadata([ir.MetaDataString(module, f"llvm.loop.{name}"), ir.IntType(32)(n)])
        for name, n in (("vectorize.width", lanes), ("interleave.count", 1))
    ]
    loop = module.add_metadata(hints)
    if loop.operands[0] is not loop:
        loop.operands = (loop, *loop.operands)  # as LLVM knows it from other metadata
    latch.set_metadata("llvm.loop", loop)
