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
    vectors apart. Both products of attention have this form. At most `block` steps are summed from
    0 before they join the sum of those before. Rows from `rows` on repeat the last one: the same
    code serves any number of them.
    """

    @intrinsic
    def tile(typingctx, a, a_row, a_step, rows, steps, block, b, c, accumulate):
        vector = vector_of(b.dtype)

        def emit(context, builder, sig, args):
            _emit_register_tile(context, builder, vector, vecs, *args)
            return context.get_dummy_value()

        whole = types.int64
        args = (*[whole] * 6, b, b, types.boolean)
        return types.void(*args), emit

    return tile


def _emit_register_tile(
    context, builder, vector, vecs, a, a_row, a_step, rows, steps, block, b, c, accumulate
):
    whole = ir.IntType(64)
    kind = context.get_value_type(vector)
    pitch = TILE_VECS * VECTOR_BYTES
    last = builder.sub(rows, whole(1))
    inside = [builder.icmp_signed("<=", whole(r), last) for r in range(TILE_ROWS)]
    row_of = [builder.select(some, whole(r), last) for r, some in enumerate(inside)]
    a_rows = [builder.add(a, builder.mul(r, a_row)) for r in row_of]
    c_start = builder.ptrtoint(c, whole)
    targets = []
    for r in row_of:
        row = builder.add(c_start, builder.mul(r, whole(pitch)))
        targets.append([builder.add(row, whole(n * VECTOR_BYTES)) for n in range(vecs)])

    def loaded(address):
        value = builder.load(builder.inttoptr(address, kind.as_pointer()))
        value.align = VECTOR_BYTES
        return value

    def store(value, address):
        stored = builder.store(value, builder.inttoptr(address, kind.as_pointer()))
        stored.align = VECTOR_BYTES

    starts = [[builder.select(accumulate, loaded(x), kind(None)) for x in row] for row in targets]
    b_start = builder.ptrtoint(b, whole)
    before = builder.block
    begin, body, first, later, after, end = (
        builder.append_basic_block(f"matmul.{part}")
        for part in ("block", "step", "first", "later", "next", "end")
    )
    builder.branch(begin)

    builder.position_at_end(begin)
    block_step, block_offset, block_at = (builder.phi(whole) for _ in range(3))
    for phi, value in ((block_step, whole(0)), (block_offset, whole(0)), (block_at, b_start)):
        phi.add_incoming(value, before)
    sums_before = [[builder.phi(kind) for _ in row] for row in starts]
    for phi, start in _pairs(sums_before, starts):
        phi.add_incoming(start, before)
    block_end = builder.add(block_step, block)
    block_end = builder.select(builder.icmp_signed("<", block_end, steps), block_end, steps)
    builder.branch(body)

    builder.position_at_end(body)
    step, offset, operand_at = (builder.phi(whole) for _ in range(3))
    for phi, value in ((step, block_step), (offset, block_offset), (operand_at, block_at)):
        phi.add_incoming(value, begin)
    sums = [[builder.phi(kind) for _ in row] for row in starts]
    for phi, value in _pairs(sums, sums_before):
        phi.add_incoming(value, begin)
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
    for phi, value in _pairs(sums, nexts):
        phi.add_incoming(value, body)
    next_step, next_offset = builder.add(step, whole(1)), builder.add(offset, a_step)
    next_at = builder.add(operand_at, whole(pitch))
    for phi, value in ((step, next_step), (offset, next_offset), (operand_at, next_at)):
        phi.add_incoming(value, body)
    block_done = builder.append_basic_block("matmul.joined")
    builder.cbranch(builder.icmp_signed("<", next_step, block_end), body, block_done)

    builder.position_at_end(block_done)
    builder.cbranch(builder.icmp_signed("==", block_step, whole(0)), first, later)
    builder.position_at_end(first)
    for value, address in _pairs(nexts, targets):
        store(value, address)
    builder.branch(after)
    builder.position_at_end(later)
    for some, values, addresses in zip(inside, nexts, targets, strict=True):
        for value, address in zip(values, addresses, strict=True):
            once = builder.select(some, value, kind(None))  # not again by what repeats the row
            store(builder.fadd(loaded(address), once), address)
    builder.branch(after)

    builder.position_at_end(after)
    for phi, value in ((block_step, next_step), (block_offset, next_offset), (block_at, next_at)):
        phi.add_incoming(value, after)
    for row in sums_before:
        for phi in row:
            phi.add_incoming(kind(None), after)
    builder.cbranch(builder.icmp_signed("<", next_step, steps), begin, end)
    builder.position_at_end(end)


def _pairs(one, other):
    """What stands at the same places of two lists of rows."""
    return ((x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))
