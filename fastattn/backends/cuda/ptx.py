"""The instructions of tensor cores, those of compute capability 8.0 and `wgmma` of 9.0, in PTX.

Arrays are given with an index instead of an address. Local ones hold fragments: with indices that
are constant once loops are unrolled they are registers.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba.cuda import types

from .fragments import descriptor, step_offset
from .toolkit import cuda, device_function, intrinsic

__all__ = [
    "commit", "copy16", "exp2", "fence", "load_matrices", "mma_maker", "pack_maker", "shuffle_xor",
    "wait_all", "wgmma_maker",
]  # fmt: skip

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def assemble(builder, result, args, text, constraints, side_effect=False):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=side_effect), args)


def element(context, builder, sig, args, place, offset=0):
    """The pointer to the element at the index that comes after argument `place`, an array."""
    data = context.make_array(sig.args[place])(context, builder, args[place]).data
    index = args[place + 1]
    if offset:
        index = builder.add(index, ir.Constant(index.type, offset))
    return builder.gep(data, [index])


def shared_address(builder, pointer):
    """The address in shared memory, 32 bits wide, that a generic pointer is for."""
    text = "{ .reg .u64 t; cvta.to.shared.u64 t, $1; cvt.u32.u64 $0, t; }"
    return assemble(builder, I32, [builder.ptrtoint(pointer, I64)], text, "=r,l")


def statement(text):
    """A device function without arguments that is this PTX."""

    @intrinsic
    def run(typing):
        def generate(context, builder, sig, args):
            assemble(builder, ir.VoidType(), [], text, "~{memory}", True)
            return context.get_dummy_value()

        return types.void(), generate

    return run


commit = statement("cp.async.commit_group;")
wait_all = statement("cp.async.wait_group 0;")
# What cp.async has written, before wgmma reads it.
fence = statement("fence.proxy.async.shared::cta;")


@intrinsic
def copy16(typing, shared, to, x, at, count):
    """Begin to copy the 8 numbers of 16 bits from ``x[at]`` on; those from `count` on are 0."""

    def generate(context, builder, sig, args):
        address = shared_address(builder, element(context, builder, sig, args, 0))
        source = builder.ptrtoint(element(context, builder, sig, args, 2), I64)
        count = builder.trunc(args[4], I32) if args[4].type.width > 32 else args[4]
        size = builder.mul(count, ir.Constant(I32, 2))
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        assemble(builder, ir.VoidType(), [address, source, size], text, "r,l,r,~{memory}", True)
        return context.get_dummy_value()

    return types.void(shared, types.int64, x, types.int64, types.int32), generate


@cache
def matrix_loader(transposed):
    suffix = ".trans" if transposed else ""

    @intrinsic
    def load(typing, fragment, shared, at):
        def generate(context, builder, sig, args):
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            address = shared_address(builder, element(context, builder, sig, args, 1))
            text = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
            four = ir.LiteralStructType([I32] * 4)
            found = assemble(builder, four, [address], text, "=r,=r,=r,=r,r,~{memory}", True)
            for i in range(4):
                to = builder.gep(data, [ir.Constant(I64, i)])
                builder.store(builder.extract_value(found, i), to)
            return context.get_dummy_value()

        return types.void(fragment, shared, types.int64), generate

    return load


def load_matrices(transposed):
    """``load(fragment, shared, at)``: four 8 x 8 matrices, whose rows begin at the lanes' `at`."""
    return matrix_loader(transposed)


@cache
def mma_maker(dtype):
    """``mma(sums, n, a, a_at, b, b_at)`` adds the product of two fragments to the sums of 16 rows
    and 8 columns, of which this lane's are ``sums[r, n]`` and ``sums[r, n + 1]`` for r = 0, 1.
    """
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )

    @intrinsic
    def mma(typing, sums, n, a, a_at, b, b_at):
        def generate(context, builder, sig, args):
            data = context.make_array(sig.args[0])(context, builder, args[0])
            columns = builder.extract_value(data.shape, 1)
            places = []
            for r in range(2):
                first = builder.add(args[1], builder.mul(columns, ir.Constant(I64, r)))
                places += [builder.add(first, ir.Constant(I64, c)) for c in range(2)]
            pointers = [builder.gep(data.data, [place]) for place in places]
            left = [builder.load(element(context, builder, sig, args, 2, i)) for i in range(4)]
            right = [builder.load(element(context, builder, sig, args, 4, i)) for i in range(2)]
            before = [builder.load(pointer) for pointer in pointers]
            constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
            four = ir.LiteralStructType([F32] * 4)
            found = assemble(builder, four, left + right + before, text, constraints, True)
            for i, pointer in enumerate(pointers):
                builder.store(builder.extract_value(found, i), pointer)
            return context.get_dummy_value()

        index = types.int64
        return types.void(sums, index, a, index, b, index), generate

    return mma


@cache
def wgmma_maker(dtype, columns, steps, rows, transposed):
    """``multiply(sums, a, shared, at)``: the product of 64 rows of a warpgroup, 16 to a warp, and a
    swizzled tile of so many rows that begins at ``shared[at]``, summed over 16 for each step: of k,
    or of v, which is added to the sums. Each lane has ``sums[r, n]`` as of `mma_maker`.
    """
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    size, before = columns // 2, columns // 2 if transposed else 0
    first = size + before  # of the operands that are read
    out = ",".join(f"${i}" for i in range(size))
    lines = [
        "{ .reg .pred no, yes; .reg .b64 t; setp.ne.u32 no, 0, 0; setp.eq.u32 yes, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        left = ",".join(f"${first + 4 * step + i}" for i in range(4))
        adds = "yes" if transposed or step else "no"
        lines += [
            f"add.s64 t, ${first + 4 * steps}, {step_offset(step, rows, transposed)};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{out}}},",
            f"{{{left}}}, t, {adds}, 1, 1, {int(transposed)};",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0; }"]
    constraints = ["=&f"] * size + [str(i) for i in range(before)]
    constraints += ["r"] * (4 * steps) + ["l", "~{memory}"]

    @intrinsic
    def multiply(typing, sums, a, shared, at):
        def generate(context, builder, sig, args):
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            # By fours: two columns of a row, and of the row 8 below.
            places = (i % 4 // 2 * (columns // 4) + i // 4 * 2 + i % 2 for i in range(size))
            to = [builder.gep(data, [ir.Constant(I64, place)]) for place in places]
            left = context.make_array(sig.args[1])(context, builder, args[1]).data
            inputs = [builder.load(pointer) for pointer in to[:before]]
            for i in range(4 * steps):
                inputs.append(builder.load(builder.gep(left, [ir.Constant(I64, i)])))
            address = shared_address(builder, element(context, builder, sig, args, 2))
            start = builder.zext(builder.lshr(address, ir.Constant(I32, 4)), I64)
            inputs.append(builder.or_(start, ir.Constant(I64, descriptor(rows, transposed))))
            several = ir.LiteralStructType([F32] * size)
            found = assemble(
                builder, several, inputs, "\n".join(lines), ",".join(constraints), True
            )
            for i, pointer in enumerate(to):
                builder.store(builder.extract_value(found, i), pointer)
            return context.get_dummy_value()

        return types.void(sums, a, shared, types.int64), generate

    return multiply


@cache
def pack_maker(dtype):
    """``pack(low, high)``: two float32 rounded to the halves of a register."""
    kind = {"float16": "f16x2", "bfloat16": "bf16x2"}[dtype]

    @intrinsic
    def pack(typing, low, high):
        def generate(context, builder, sig, args):
            return assemble(builder, I32, args, f"cvt.rn.{kind}.f32 $0, $2, $1;", "=r,f,f")

        return types.uint32(types.float32, types.float32), generate

    return pack


@intrinsic
def exp2(typing, x):
    """Two to the power of `x`, with an error of 2 ulp; 0 where it is no normal number."""

    def generate(context, builder, sig, args):
        return assemble(builder, F32, args, "ex2.approx.ftz.f32 $0, $1;", "=f,f")

    return types.float32(types.float32), generate


@device_function
def shuffle_xor(x, mask):
    """The `x` of the lane whose number differs in the bits of `mask`."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, x, mask)
