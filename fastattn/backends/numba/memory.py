"""Memory by its address: pointers that can be indexed, vectors to and from it."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...core.block_mask import BLOCK_KEYS, BLOCK_QUERIES
from .vectors import TILE_VECS, VECTOR_BYTES, flags_of, vector_of


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
floats = _pointer_intrinsic(types.float32)
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


def _own_intrinsic(size):
    """``f(like)``: room on the stack for `size` bytes of the type of `like`, a scalar.

    Nothing else points at it. A user function reads tables that could lie anywhere: were
    its result stored where they might be too, LLVM would take one number after the other.
    """

    @intrinsic
    def own(typingctx, like):
        def emit(context, builder, sig, args):
            room = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), size))
            room.align = VECTOR_BYTES
            return builder.bitcast(room, context.get_value_type(sig.return_type))

        return types.CPointer(like)(like), emit

    return own


own_vector = _own_intrinsic(VECTOR_BYTES)
own_flags = _own_intrinsic(BLOCK_QUERIES * BLOCK_KEYS)


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
    wanted = flags_of(like)

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
