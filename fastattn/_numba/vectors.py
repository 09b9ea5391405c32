"""Vectors as a Numba type, the operations that Numba lacks, and the register tile.

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

__all__ = ["INSTRUCTION_SET", "TILE_VECS", "VECTOR_BYTES", "Vector"]


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
compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)


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


def _as_flags(vector):
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
    _operator(_symbol, lambda b, x, y, text=_text: b.fcmp_ordered(text, x, y), _as_flags)
_operator(operator.ne, lambda b, x, y: b.fcmp_unordered("!=", x, y), _as_flags)


@infer_global(operator.neg)
class _Negative(AbstractTemplate):
    def generic(self, args, kws):
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _negative(context, builder, sig, args):
    return builder.fneg(*args)


# ----------------------------------------------------------------------------------- memory


def _pointer_intrinsic(item):
    """``f(address)``: the address, an int64, as a pointer that can be indexed."""

    @intrinsic
    def pointer(typingctx, address):
        def emit(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(item)(types.int64), emit

    return pointer


ints = _pointer_intrinsic(types.int64)
uint64s = _pointer_intrinsic(types.uint64)
doubles = _pointer_intrinsic(types.float64)
flags = _pointer_intrinsic(types.uint8)
halfwords = _pointer_intrinsic(types.uint16)


@intrinsic
def reals(typingctx, address, like):
    """The address as a pointer to numbers of the type of `like`, a scalar."""

    def emit(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return types.CPointer(like)(types.int64, like), emit


def record_of(kind):
    """``f(address)``: the record of that type that lies there."""

    @intrinsic
    def at(typingctx, address):
        def emit(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), emit

    return at


@intrinsic
def ahead(typingctx, pointer, count):
    """The pointer, `count` items further on."""

    def emit(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), emit


def _peek_intrinsic(item):
    """``f(address)``: the number of that type that lies there, aligned or not."""

    @intrinsic
    def peek(typingctx, address):
        def emit(context, builder, sig, args):
            value = context.get_value_type(item)
            loaded = builder.load(builder.inttoptr(args[0], value.as_pointer()))
            loaded.align = 1
            return loaded

        return item(types.int64), emit

    return peek


peek_uint8, peek_uint16, peek_uint32, peek_uint64 = (
    _peek_intrinsic(x) for x in (types.uint8, types.uint16, types.uint32, types.uint64)
)


def _as_vector_pointer(builder, pointer, vector):
    return builder.bitcast(pointer, vector.as_pointer())


def _load_intrinsic(align):
    """``f(pointer)``: a vector of the numbers that begin there."""

    @intrinsic
    def load(typingctx, pointer):
        vector = vector_of(pointer.dtype)

        def emit(context, builder, sig, args):
            kind = context.get_value_type(vector)
            loaded = builder.load(_as_vector_pointer(builder, args[0], kind))
            loaded.align = align
            return loaded

        return vector(pointer), emit

    return load


load = _load_intrinsic(VECTOR_BYTES)
load_unaligned = _load_intrinsic(1)


@intrinsic
def store(typingctx, pointer, value):
    def emit(context, builder, sig, args):
        pointer, value = args
        stored = builder.store(value, _as_vector_pointer(builder, pointer, value.type))
        stored.align = VECTOR_BYTES
        return context.get_dummy_value()

    return types.void(pointer, value), emit


@intrinsic
def load_flags(typingctx, pointer, like):
    """Which of the bytes that begin there are not 0, for as many lanes as `like` has."""
    wanted = _as_flags(like)

    def emit(context, builder, sig, args):
        kind = ir.VectorType(ir.IntType(8), wanted.lanes)
        loaded = builder.load(_as_vector_pointer(builder, args[0], kind))
        loaded.align = 1
        return builder.icmp_unsigned("!=", loaded, kind(None))

    return wanted(pointer, like), emit


@intrinsic
def nonzero_bytes(typingctx, address):
    """Bit j: is byte j not 0? Of 64 bytes."""

    def emit(context, builder, sig, args):
        kind = ir.VectorType(ir.IntType(8), 64)
        loaded = builder.load(builder.inttoptr(args[0], kind.as_pointer()))
        loaded.align = 1
        return builder.bitcast(builder.icmp_unsigned("!=", loaded, kind(None)), ir.IntType(64))

    return types.uint64(types.int64), emit


def _transpose_intrinsic(from_rows: bool):
    """``f(rows, offset, columns)``: copy a square of as many rows as a vector has lanes, `offset`
    bytes behind the addresses `rows`, to columns that lie TILE_VECS vectors apart; or back.
    """

    @intrinsic
    def transpose(typingctx, rows, offset, columns):
        vector = vector_of(columns.dtype)

        def emit(context, builder, sig, args):
            rows, offset, columns = args
            kind = context.get_value_type(vector)
            at_rows, at_columns = [], []
            for i in range(vector.lanes):
                row = builder.load(builder.gep(rows, [ir.IntType(64)(i)]))
                at_rows.append(builder.inttoptr(builder.add(row, offset), kind.as_pointer()))
                column = builder.gep(columns, [ir.IntType(64)(i * TILE_VECS * vector.lanes)])
                at_columns.append(_as_vector_pointer(builder, column, kind))
            source, target = (at_rows, at_columns) if from_rows else (at_columns, at_rows)
            square = [builder.load(at) for at in source]
            for x in square:
                x.align = 1
            for at, x in zip(target, _transposed(builder, square), strict=True):
                builder.store(x, at).align = 1
            return context.get_dummy_value()

        return types.void(rows, types.int64, columns), emit

    return transpose


def _transposed(builder, square):
    """Rows to columns: log2(lanes) rounds in which row i is zipped with row i + lanes / 2."""
    lanes, index = len(square), ir.IntType(32)
    low = [n for i in range(lanes // 2) for n in (i, i + lanes)]
    masks = [
        ir.Constant(ir.VectorType(index, lanes), [n + shift for n in low])
        for shift in (0, lanes // 2)
    ]
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(square[: lanes // 2], square[lanes // 2 :], strict=True)
        square = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
    return square


rows_to_columns = _transpose_intrinsic(True)
columns_to_rows = _transpose_intrinsic(False)


# ------------------------------------------------------------------------------- arithmetic


def _splat(builder, value, kind):
    if not isinstance(kind, ir.VectorType):
        return value
    first = builder.insert_element(kind(ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.VectorType(ir.IntType(32), kind.count)
    return builder.shuffle_vector(first, kind(ir.Undefined), lanes(None))


def _llvm(builder, name, *args):
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
        return _splat(builder, args[0], context.get_value_type(vector))

    return vector(number), emit


def per_type(float32: float, float64: float):
    """``f(like)``: a number that depends on the precision of `like`. Generic."""

    @intrinsic
    def number(typingctx, like):
        def emit(context, builder, sig, args):
            kind = args[0].type
            item = kind.element if isinstance(kind, ir.VectorType) else kind
            value = float64 if isinstance(item, ir.DoubleType) else float32
            return _splat(builder, item(value), kind)

        return like(like), emit

    return number


@intrinsic
def constant(typingctx, value, like):
    """A double, rounded to the type of `like`, in every lane of it. Generic."""

    def emit(context, builder, sig, args):
        kind = args[1].type
        item = kind.element if isinstance(kind, ir.VectorType) else kind
        value = args[0] if isinstance(item, ir.DoubleType) else builder.fptrunc(args[0], item)
        return _splat(builder, value, kind)

    return like(types.float64, like), emit


def _generic(name, arity):
    @intrinsic
    def unary(typingctx, a):
        return a(a), lambda context, builder, sig, args: _llvm(builder, name, *args)

    @intrinsic
    def binary(typingctx, a, b):
        return a(a, a), lambda context, builder, sig, args: _llvm(builder, name, *args)

    @intrinsic
    def ternary(typingctx, a, b, c):
        return a(a, a, a), lambda context, builder, sig, args: _llvm(builder, name, *args)

    return (unary, binary, ternary)[arity - 1]


magnitude = _generic("llvm.fabs", 1)
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
        shift = _splat(builder, ir.IntType(bits)(mantissa), whole)
        return builder.bitcast(builder.shl(builder.bitcast(args[0], whole), shift), kind)

    return sum(sum), emit


# csrc/minimax.py: 2**f - 1 = f * polynomial(f) for |f| <= 1/2, highest power first.
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
        terms = [_splat(builder, item(c), kind) for c in coefficients]
        value = terms[0]
        for term in terms[1:]:
            value = _llvm(builder, "llvm.fmuladd", value, args[0], term)
        return value

    return f(f), emit


# ---------------------------------------------------------------------------- register tile


def register_tile(vecs: int):
    """The product of up to TILE_ROWS rows with `vecs` vectors, accumulated in registers.

    ``c[r][lane] = (accumulate ? c[r][lane] : 0) + sum over t of a[r, t] * b[t][lane]``, where
    ``a[r, t]`` lies at ``a + r * a_row + t * a_step`` bytes, and rows of `b` and `c` are TILE_VECS
    vectors apart. Both products of attention have this form. Rows from `rows` on repeat the last
    one: the same code serves any number of them.
    """

    @intrinsic
    def tile(typingctx, a, a_row, a_step, rows, steps, b, c, accumulate):
        vector = vector_of(b.dtype)

        def emit(context, builder, sig, args):
            _emit_register_tile(context, builder, vector, vecs, *args)
            return context.get_dummy_value()

        whole = types.int64
        args = (whole, whole, whole, whole, whole, b, b, types.boolean)
        return types.void(*args), emit

    return tile


def _emit_register_tile(
    context, builder, vector, vecs, a, a_row, a_step, rows, steps, b, c, accumulate
):
    whole = ir.IntType(64)
    kind = context.get_value_type(vector)
    pitch = TILE_VECS * VECTOR_BYTES
    last = builder.sub(rows, whole(1))
    row_of = []
    for r in range(TILE_ROWS):
        inside = builder.icmp_signed("<", whole(r), last)
        row_of.append(builder.select(inside, whole(r), last))
    a_rows = [builder.add(a, builder.mul(r, a_row)) for r in row_of]
    c_start = builder.ptrtoint(c, whole)
    targets = []
    for r in row_of:
        row = builder.add(c_start, builder.mul(r, whole(pitch)))
        targets.append([builder.add(row, whole(n * VECTOR_BYTES)) for n in range(vecs)])

    def at(address):
        return builder.inttoptr(address, kind.as_pointer())

    def loaded(address):
        value = builder.load(at(address))
        value.align = VECTOR_BYTES
        return value

    starts = [[builder.select(accumulate, loaded(x), kind(None)) for x in row] for row in targets]

    b_start = builder.ptrtoint(b, whole)
    before = builder.block
    body = builder.append_basic_block("product")
    after = builder.append_basic_block("product.end")
    builder.branch(body)
    builder.position_at_end(body)
    step, offset, operand_at = (builder.phi(whole) for _ in range(3))
    step.add_incoming(whole(0), before)
    offset.add_incoming(whole(0), before)
    operand_at.add_incoming(b_start, before)
    sums = [[builder.phi(kind) for _ in row] for row in starts]
    for row, start in zip(sums, starts, strict=True):
        for phi, value in zip(row, start, strict=True):
            phi.add_incoming(value, before)
    operands = [loaded(builder.add(operand_at, whole(n * VECTOR_BYTES))) for n in range(vecs)]
    nexts = []
    for r in range(TILE_ROWS):
        address = builder.inttoptr(builder.add(a_rows[r], offset), kind.element.as_pointer())
        factor = _splat(builder, builder.load(address), kind)
        nexts.append(
            [
                _llvm(builder, "llvm.fmuladd", factor, x, total)
                for x, total in zip(operands, sums[r], strict=True)
            ]
        )
    for row, new in zip(sums, nexts, strict=True):
        for phi, value in zip(row, new, strict=True):
            phi.add_incoming(value, body)
    next_step = builder.add(step, whole(1))
    step.add_incoming(next_step, body)
    offset.add_incoming(builder.add(offset, a_step), body)
    operand_at.add_incoming(builder.add(operand_at, whole(pitch)), body)
    builder.cbranch(builder.icmp_signed("<", next_step, steps), body, after)
    builder.position_at_end(after)
    for row, new in zip(targets, nexts, strict=True):
        for address, value in zip(row, new, strict=True):
            stored = builder.store(value, at(address))
            stored.align = VECTOR_BYTES


@intrinsic
def widest_vectors(typingctx):
    """Let LLVM use vectors of this width in the plain loops of the function where this stands; for
    AVX-512 it prefers half of it.
    """

    def emit(context, builder, sig, args):
        # `add` of the set itself: llvmlite's own knows only attributes without a value.
        width = f'"prefer-vector-width"="{8 * VECTOR_BYTES}"'
        set.add(builder.function.attributes, width)
        return context.get_dummy_value()

    return types.void(), emit
