"""The register tile, the inner loop of both products of attention.

LLVM does not find it in plain loops, so it is emitted as vector instructions: accumulators that
are phi nodes of a loop stay in registers.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .vectors import TILE_ROWS, TILE_VECS, VECTOR_BYTES, emit_llvm, emit_splat, vector_of


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
        factor = emit_splat(builder, builder.load(address), kind)
        nexts.append(
            [
                emit_llvm(builder, "llvm.fmuladd", factor, x, total)
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
