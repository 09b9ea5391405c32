"""Vectors as a Numba type, and the operations that Numba lacks.

LLVM finds neither the register tile nor most of the softmax in plain loops, so these are emitted as
vector instructions. What stands here depends on the instruction set; nothing else does.
Operations that are marked as generic take vectors and scalars alike.
"""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = ["INSTRUCTION_SET", "TILE_ROWS", "TILE_VECS", "VECTOR_BYTES", "Vector"]


def _instruction_set() -> tuple[str, int, int, int]:
    """``(name, bytes of a vector, rows, vectors of a register tile)`` of Numba's target.

    Accumulators, operands and one broadcast value fill the register file of 32 or 16 vectors.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = features.split(",")
    if "+avx512f" in enabled and "+avx512dq" in enabled:
        return "avx512", 64, 8, 3
    if "+avx2" in enabled and "+fma" in enabled:
        return "avx2", 32, 6, 2
    if triple.startswith(("aarch64", "arm64")):
        return "neon", 16, 8, 3
    return "baseline", 16, 6, 2


INSTRUCTION_SET, VECTOR_BYTES, TILE_ROWS, TILE_VECS = _instruction_set()


# How a function is compiled that only other compiled ones call: its wrappers would take as long.
compiled = njit(  # type: ignore[call-overload]
    error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False
)


class Vector(types.Type):
    """As many lanes of `dtype` as fill a register of floats that wide; bool: a comparison's."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        bits = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        item = bits.get(vector.dtype, ir.IntType(1))
        super().__init__(manager, vector, ir.VectorType(item, vector.lanes))


def vector_of(real) -> Vector:
    return Vector(real, VECTOR_BYTES * 8 // real.bitwidth)


def _operator(function, emit, result=lambda vector: vector):
    """Teach Numba an operator of two vectors."""

    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and args[0] == args[1] and isinstance(args[0], Vector):
                return signature(result(args[0]), *args)
            return None

    @lower_builtin(function, Vector, Vector)
    def lower(context, builder, sig, args):
        return emit(builder, *args)


def flags_of(vector):
    return Vector(types.boolean, vector.lanes)


for _symbol, _emit in {
    operator.add: ir.IRBuilder.fadd,
    operator.sub: ir.IRBuilder.fsub,
    operator.mul: ir.IRBuilder.fmul,
    operator.truediv: ir.IRBuilder.fdiv,
    operator.and_: ir.IRBuilder.and_,
    operator.or_: ir.IRBuilder.or_,
}.items():
    _operator(_symbol, _emit)


for _symbol, _text in {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.eq: "=="
}.items():  # fmt: skip
    _operator(_symbol, lambda b, x, y, text=_text: b.fcmp_ordered(text, x, y), flags_of)
_operator(operator.ne, lambda b, x, y: b.fcmp_unordered("!=", x, y), flags_of)


@infer_global(operator.neg)
class _Negative(AbstractTemplate):
    def generic(self, args, kws):
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negative(context, builder, sig, args):
    return builder.fneg(*args)


def emit_splat(builder, value, kind):
    if not isinstance(kind, ir.VectorType):
        return value
    first = builder.insert_element(kind(ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.VectorType(ir.IntType(32), kind.count)
    return builder.shuffle_vector(first, kind(ir.Undefined), lanes(None))


def emit_llvm(builder, name, *args):
    """Call the LLVM intrinsic of that name and of the type of its first argument."""
    kind = args[0].type
    vector = isinstance(kind, ir.VectorType)
    suffix = f"v{kind.count}{kind.element.intrinsic_name}" if vector else kind.intrinsic_name
    function = ir.FunctionType(kind, [x.type for x in args])
    return builder.call(
        cgutils.get_or_insert_function(builder.module, function, f"{name}.{suffix}"), args
    )


@intrinsic
def splat(typingctx, number):
    """A vector of one number."""
    vector = vector_of(number)

    def emit(context, builder, sig, args):
        return emit_splat(builder, args[0], context.get_value_type(vector))

    return vector(number), emit


def per_type(float32: float, float64: float):
    """``f(like)``: a number that depends on the precision of `like`. Generic."""

    @intrinsic
    def number(typingctx, like):
        def emit(context, builder, sig, args):
            kind = args[0].type
            item = kind.element if isinstance(kind, ir.VectorType) else kind
            value = float64 if isinstance(item, ir.DoubleType) else float32
            return emit_splat(builder, item(value), kind)

        return like(like), emit

    return number


@intrinsic
def constant(typingctx, value, like):
    """A double, rounded to the type of `like`, in every lane of it. Generic."""

    def emit(context, builder, sig, args):
        kind = args[1].type
        item = kind.element if isinstance(kind, ir.VectorType) else kind
        value = args[0] if isinstance(item, ir.DoubleType) else builder.fptrunc(args[0], item)
        return emit_splat(builder, value, kind)

    return like(types.float64, like), emit


def _generic(name, arity):
    @intrinsic
    def unary(typingctx, a):
        return a(a), lambda context, builder, sig, args: emit_llvm(builder, name, *args)

    @intrinsic
    def binary(typingctx, a, b):
        return a(a, a), lambda context, builder, sig, args: emit_llvm(builder, name, *args)

    @intrinsic
    def ternary(typingctx, a, b, c):
        return a(a, a, a), lambda context, builder, sig, args: emit_llvm(builder, name, *args)

    return (unary, binary, ternary)[arity - 1]


magnitude = _generic("llvm.fabs", 1)
square_root = _generic("llvm.sqrt", 1)
with_sign_of = _generic("llvm.copysign", 2)
multiply_add = _generic("llvm.fmuladd", 3)  # one instruction where there is one, else two


swap_bytes = _generic("llvm.bswap", 1)


@intrinsic
def choose(typingctx, condition, yes, no):
    """`yes` where the condition holds, else `no`. Generic."""

    def emit(context, builder, sig, args):
        return builder.select(*args)

    return yes(condition, yes, yes), emit


@intrinsic
def larger(typingctx, a, b):
    """The larger of two; `b` where one is a NaN. Generic."""

    def emit(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, a), emit


@intrinsic
def any_lane(typingctx, condition):
    """Does it hold in a lane of the vector?"""

    def emit(context, builder, sig, args):
        bits = ir.IntType(condition.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(condition), emit


@intrinsic
def lanes(typingctx, like):
    """How many numbers of the type of `like`, a scalar, fill a vector."""
    count = vector_of(like).lanes
    return types.intp(like), lambda context, builder, sig, args: ir.IntType(64)(count)


@intrinsic
def from_bits(typingctx, bits, like):
    """The number of the type of `like` that has the low bits of `bits`."""

    def emit(context, builder, sig, args):
        kind = args[1].type
        if isinstance(kind, ir.DoubleType):
            return builder.bitcast(args[0], kind)
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), kind)

    return like(types.int64, like), emit


@intrinsic
def to_bits(typingctx, x):
    """The bits of a float32."""

    def emit(context, builder, sig, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), emit


@intrinsic
def to_exponent(typingctx, sum):
    """2**n of a sum 1.5 * 2**mantissa + bias + n, whose lowest bits are the exponent. Generic."""

    def emit(context, builder, sig, args):
        kind = args[0].type
        vector = isinstance(kind, ir.VectorType)
        item = kind.element if vector else kind
        bits, mantissa = (64, 52) if isinstance(item, ir.DoubleType) else (32, 23)
        whole = ir.IntType(bits)
        if vector:
            whole = ir.VectorType(whole, kind.count)
        shift = emit_splat(builder, ir.IntType(bits)(mantissa), whole)
        return builder.bitcast(builder.shl(builder.bitcast(args[0], whole), shift), kind)

    return sum(sum), emit


# tools/minimax.py: 2**f - 1 = f * polynomial(f) for |f| <= 1/2, highest power first.
_POLYNOMIAL = {
    types.float32: (
        0.000154035121869, 0.00133906973649, 0.00961823735112, 0.0555035750476, 0.240226497968,
        0.693147187912,
    ),
    types.float64: (
        4.445536079096291314e-10, 7.07254999038397057e-9, 1.017812125892926574e-7,
        1.321544278264547651e-6, 0.00001525273370140623868, 0.0001540353044138512039,
        0.001333355814653136969, 0.009618129107607122348, 0.05550410866482123764,
        0.240226506959100978, 0.6931471805599453112,
    ),
}  # fmt: skip


@intrinsic
def polynomial(typingctx, f):
    """``(2**f - 1) / f`` for ``|f| <= 1/2``; largest error 1.1e-8, or 1.8e-17. Generic."""
    coefficients = _POLYNOMIAL[f.dtype if isinstance(f, Vector) else f]

    def emit(context, builder, sig, args):
        kind = args[0].type
        item = kind.element if isinstance(kind, ir.VectorType) else kind
        terms = [emit_splat(builder, item(c), kind) for c in coefficients]
        value = terms[0]
        for term in terms[1:]:
            value = emit_llvm(builder, "llvm.fmuladd", value, args[0], term)
        return value

    return f(f), emit
