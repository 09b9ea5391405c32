"""The cuda backend's kernel of tensor cores: its maps, and in the simulator the kernel itself, with
the instructions of a warp done by its threads together, fragment by fragment.
"""

import importlib
import os
from functools import cache

import numpy as np
import pytest
from helpers.cuda_compiler import assemble, compile_ptx, need_compiler
from helpers.oracles import assert_solves, check, same_bits
from helpers.problems import Shape, float_type, options
from helpers.targets import Target

import fastattn
from fastattn.backends import cuda as backend
from fastattn.core.problem import make_problem

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
TARGET = Target("cuda")
HALVES = ("float16", "bfloat16")
# In the simulator several tiles both ways with ragged ends, two slices of v, copies element by
# element; then one whose rows are copied 16 bytes at a time, the last one padded.
RAGGED = Shape(1, 1, 19, 37, 20, value_dim=18)
SMOOTH = Shape(1, 1, 17, 33, 24, value_dim=8)
SMALL = Shape(1, 2, 5, 11, 8)
FEW = Shape(2, 2, 1, 40, 8, kv_heads=1)

runs = pytest.mark.skipif(
    backend.missing() is not None, reason=f"{backend.missing()}; test_cuda.py runs it simulated"
)


def part(name):
    return importlib.import_module(f"fastattn.backends.cuda.{name}")


# -------------------------------------------------------------------------------------- maps


@pytest.fixture
def maps():
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    return part("fragments")


LANES = np.arange(32)


def test_maps_are_those_of_the_manual(maps):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16": rows ``groupID = lane >> 2`` and so on."""
    group, thread = LANES >> 2, LANES & 3
    for i in range(8):  # a0 to a7, b0 to b3, c0 to c3 in the manual's words
        row, column = maps.a_element(LANES, i // 2, i % 2)
        assert (row == group + (0 if i in (0, 1, 4, 5) else 8)).all()
        assert (column == thread * 2 + (i & 1) + (8 if i >= 4 else 0)).all()
    for i in range(4):
        row, column = maps.b_element(LANES, i // 2, i % 2)
        assert (row == thread * 2 + (i & 1) + (8 if i >= 2 else 0)).all()
        assert (column == group).all()
        row, column = maps.c_element(LANES, i)
        assert (row == group + (8 if i >= 2 else 0)).all()
        assert (column == thread * 2 + (i & 1)).all()


def test_scores_lie_where_weights_are_wanted(maps):
    """The sums of two products, of 8 keys each, are the left side of one over these 16 keys."""
    for register in range(4):
        for half in range(2):
            row, key = maps.a_element(LANES, register, half)
            of, number = register // 2, register % 2 * 2 + half
            its_row, its_key = maps.c_element(LANES, number)
            assert (row == its_row).all() and (key == 8 * of + its_key).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_loaded_matrices_are_right_sides(maps, transposed):
    address = maps.value_address if transposed else maps.key_address
    for matrix in range(4):
        key, other = address(8 * matrix)
        for half in range(2):
            row, column = maps.loaded(LANES, half, transposed)
            k, n = maps.b_element(LANES, matrix % 2, half)
            n = n + 8 * (matrix // 2)
            if transposed:  # keys are what is summed over
                assert (k == key + row).all() and (n == other + column).all()
            else:
                assert (n == key + row).all() and (k == other + column).all()


@pytest.mark.parametrize("dims", [1, 8, 16, 17, 64, 96, 128, 256])
def test_rows_read_at_once_lie_in_different_banks(maps, dims):
    chunks = maps.row_chunks(dims)
    assert 8 * chunks >= 16 * -(-dims // 16)
    assert sorted(row * chunks % 8 for row in range(8)) == list(range(8))


@pytest.mark.parametrize("rows", [16, 64])
def test_swizzled_tiles_are_what_descriptors_name(maps, rows):
    """Each element lies where the manual's layout, with its descriptor and the offset of its step,
    has it: 8 rows of 128 bytes, whose chunks are exchanged by the row's number.
    """
    row, dim = (x.ravel() for x in np.mgrid[:rows, :128])
    place = 2 * maps.swizzled(row, dim, rows)
    assert sorted(place) == list(range(0, 2 * place.size, 2))
    for transposed in (False, True):
        described = maps.descriptor(rows, transposed)
        next_rows, next_block = (16 * (described >> bit & 0x3FFF) for bit in (32, 16))
        assert described >> 62 == 1 and described & 0xFFFF == 0
        start = 16 * maps.step_offset((row if transposed else dim) // 16, rows, transposed)
        if transposed:
            at = row % 16 // 8 * next_rows + dim // 64 * next_block + dim % 64 * 2
        else:
            at = row // 8 * next_rows + dim % 16 * 2
        at = at + start + row % 8 * 128
        assert (at ^ (at >> 7 & 7) << 4 == place).all()


@runs
def test_geometry_of_scores():
    cores, maps = part("tensor_tile"), part("fragments")
    for lane in range(32):
        for r in range(2):
            for c in range(16):
                row, column = maps.c_element(lane, 2 * r + c % 2)
                assert cores.row_of(r, lane // 4) == row
                assert cores.key_of(c, lane % 4) == c // 2 * 8 + column


# ---------------------------------------------------------------------------- in the simulator


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_several_tiles(dtype):
    check(TARGET, *RAGGED.arrays(dtype), return_max=True)
    check(TARGET, *SMOOTH.arrays(dtype), causal=True)


@runs
@pytest.mark.parametrize(
    "name",
    ["scales", "softcap", "bias", "-inf", "relative_bias", "-inf distances", "alibi", "sinks",
     "window", "q_offset", "kv_lengths", "spans", "mask"],
)  # fmt: skip
def test_one_option(name):
    opts = options([name], SMALL)
    if name == "scales":
        opts["scale"] = np.abs(opts["scale"])
    check(TARGET, *SMALL.arrays("bfloat16"), **opts, return_max=True)


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_many_options(dtype):
    names = ["scale", "softcap", "-inf", "relative_bias", "alibi", "sinks", "window", "mask"]
    shape = Shape(1, 2, 5, 19, 8, kv_heads=1, value_dim=18)
    check(TARGET, *shape.arrays(dtype), **options(names, shape), return_max=True)


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_wgmma(dtype):
    call, cuda = part("call"), part("toolkit").cuda
    arrays = Shape(1, 1, 5, 18, 72, value_dim=20).arrays(dtype)
    p = make_problem(*arrays, causal=True, return_lse=True)
    out = p.new_result()
    given = call.Call(p, out, cuda.default_stream())
    lse, _, _ = given.answer(given.kinds()[0]._replace(wgmma=True), redo=False)
    assert_solves((out, lse), p)


@runs
def test_layouts():
    q, k, v = (x.swapaxes(1, 2).copy().swapaxes(1, 2)[..., ::-1] for x in SMALL.arrays("float16"))
    check(TARGET, q, k, v)
    check(TARGET, q, k[:, :1], np.broadcast_to(v[:, :1], v.shape))


@runs
def test_parts():
    check(TARGET, *FEW.arrays("bfloat16"), return_max=True)
    opts = options(["sinks", "-inf", "alibi"], FEW)
    check(TARGET, *FEW.arrays("float16"), **opts, kv_lengths=[0, 33], q_offset=[0, 32])


@runs
def test_tiles_that_nobody_sees_are_not_read():
    """Numbers that are not finite would show as flags."""
    q, k, v = Shape(1, 1, 16, 64, 8).arrays("bfloat16")
    mask = np.arange(64) % 64 >= 32
    clean = fastattn.scaled_dot(q, k, v, mask=mask, backend="cuda")
    k[..., :32, :], v[..., :32, :] = np.nan, np.inf
    assert same_bits(fastattn.scaled_dot(q, k, v, mask=mask, backend="cuda"), clean)
    assert same_bits(
        fastattn.scaled_dot(q, k, v, spans=(np.full(16, 32), np.full(16, 64)), backend="cuda"),
        fastattn.scaled_dot(q, k[..., 32:, :], v[..., 32:, :], backend="cuda"),
    )


@runs
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite(poison):
    q, k, v = Shape(1, 1, 18, 18, 8).arrays("bfloat16")
    k[..., 4, 1] = v[..., 2, 3] = poison
    for opts in ({"causal": True}, {"mask": np.arange(18) != 2}, {"kv_lengths": 2}, {}):
        check(TARGET, q, k, v, **opts)


@runs
def test_extremes():
    q, k, v = SMALL.arrays("bfloat16")
    most = np.finfo(np.float32).max
    check(TARGET, q, k, np.full_like(v, 3.3e38))
    check(TARGET, q, k, v, bias=np.full((5, 11), -most))
    check(TARGET, (q * 1e18).astype(q.dtype), (k * 1e18).astype(q.dtype), v)
    for sinks in ([500.0, -500.0], [np.inf, -np.inf], [most, -most]):
        check(TARGET, q, k, v, sinks=sinks)
        check(TARGET, q, k, v, sinks=sinks, kv_lengths=0)


@runs
def test_rows_by_themselves_have_the_same_bits():
    q, k, v = Shape(1, 2, 5, 19, 8, kv_heads=1).arrays("bfloat16")
    whole = fastattn.scaled_dot(q, k, v, backend="cuda")
    for h in range(2):
        assert same_bits(fastattn.scaled_dot(q[:, h : h + 1], k, v, backend="cuda"), whole[:, [h]])


# ----------------------------------------------------------------------------------- the choice


def kind_of(dtype="bfloat16", n_queries=5, vectors=True, **options):
    call, cores = part("call"), part("tensor_tile")
    p = make_problem(*Shape(1, 2, n_queries, 11, 8).arrays(dtype), **options)
    return cores.TensorSpec(call.spec_of(p), dtype, vectors)


@runs
@pytest.mark.parametrize("n_queries", [1, 5])
def test_a_trial_agrees(n_queries):
    opts = options(["softcap", "bias", "sinks", "mask"], Shape(1, 2, n_queries, 11, 8))
    kind = kind_of(n_queries=n_queries, **opts, return_lse=True)
    assert part("engine").compared(kind) is None


@runs
@pytest.mark.parametrize("bias", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("n_queries", [1, 5])
def test_a_trial_is_of_the_same_kind(bias, n_queries):
    shape = Shape(1, 2, n_queries, 11, 8)
    opts = options(["softcap", "bias", "relative_bias", "alibi", "sinks", "mask"], shape)
    opts["bias"] = opts["bias"].astype(float_type(bias))
    kind = kind_of(n_queries=n_queries, **opts, return_lse=True, return_max=True)
    assert part("call").spec_of(part("engine").example(kind)) == kind.spec


@runs
def test_a_trial_that_fails_leaves_it_to_multiply_adds(monkeypatch):
    engine, cores = part("engine"), part("tensor_cores")
    right = cores.weigh_maker

    def wrong(b):
        weigh = right(b)

        def late(s, seen, top, total, saw, unit, acc):
            weigh(s, seen, top, total, saw, unit, acc)
            s[0, 0] = s[0, 1]

        return late

    monkeypatch.setattr(cores, "weigh_maker", wrong)
    monkeypatch.setattr(engine, "trial", cache(lambda device, kind: engine.compared(kind)))
    cores.compiled.cache_clear()
    try:
        q, k, v = Shape(1, 2, 1, 11, 8).arrays("bfloat16")
        plan = fastattn.explain(q, k, v, backend="cuda").plan
        assert "no tensor cores: a trial of them differed from multiply-adds by" in plan["kernel"]
        check(TARGET, q, k, v)
    finally:
        cores.compiled.cache_clear()


@runs
@pytest.mark.parametrize(
    ("opts", "why"),
    [({"scale": -1.0}, "scale"), ({"scale": 1e-9}, "scale"), ({"return_weights": True}, "weights")],
    ids=str,
)
def test_what_is_left_to_multiply_adds(opts, why):
    q, k, v = SMALL.arrays("float16")
    said = part("engine").describe(make_problem(q, k, v, **opts))["kernel"]
    assert "multiply-adds" in said and why in said
    assert "tensor cores (mma.sync)" in fastattn.explain(q, k, v, backend="cuda").plan["kernel"]
    assert "they multiply" in part("engine").unfit(make_problem(q, k, v.astype(np.float32)))


# --------------------------------------------------------------------------------- the compiler


# Of kernels that have not run on a device yet, what they may use: processor, head_dim, few ->
# registers, bytes spilled, bytes of shared memory.
MOST = {
    ("sm_80", 64, False): (128, 64, 24_200),
    ("sm_80", 128, False): (168, 128, 37_800),
    ("sm_80", 256, False): (255, 100, 28_500),
    ("sm_80", 128, True): (255, 0, 35_600),
    ("sm_90", 128, False): (168, 128, 37_800),
    ("sm_90a", 64, False): (200, 0, 22_200),
    ("sm_90a", 128, False): (232, 0, 38_600),
}


@pytest.mark.skipif(SIMULATED, reason="the simulator compiles nothing")
@pytest.mark.parametrize(("processor", "head_dim", "few"), MOST, ids=str)
def test_what_a_kernel_uses(monkeypatch, tmp_path, processor, head_dim, few):
    need_compiler()
    cores, tile, wgmma = part("tensor_cores"), part("tile"), processor == "sm_90a"
    spec = tile.Spec(
        "float32", head_dim, min(head_dim, 128), "qkv" if few else "qkvo", few=few, partial=few
    )
    kind = part("tensor_tile").TensorSpec(spec, "bfloat16", True, wgmma)
    out = "[float32]" if few else "[uint16]"
    capability = (int(processor[3]), int(processor[4]))
    ptx = compile_ptx(monkeypatch, cores.compiled(kind), arguments(out), capability)
    for name in ("wgmma",) if wgmma else ("mma.sync.aligned.m16n8k16", "ldmatrix"):
        assert name in ptx
    assert "cp.async" in ptx and ".f64" not in ptx and ".local" not in ptx
    registers = part("tensor_tile").blocks_of(kind).registers
    used = assemble(ptx, processor, registers, tmp_path)
    assert all(n <= most for n, most in zip(used, MOST[processor, head_dim, few], strict=True)), (
        used
    )


@pytest.mark.skipif(SIMULATED, reason="the simulator compiles nothing")
@pytest.mark.parametrize("dtype", HALVES)
def test_compiles_with_everything(monkeypatch, dtype):
    need_compiler()
    cores, tile = part("tensor_cores"), part("tile")
    halves = "qkvo" if dtype == "bfloat16" else ""
    flags = ("softcap", "bias", "clamp_bias", "relative_bias", "alibi", "sinks", "mask", "lse",
             "row_max")  # fmt: skip
    spec = tile.Spec("float32", 33, 200, halves, **dict.fromkeys(flags, True))
    kind = part("tensor_tile").TensorSpec(spec, dtype, False)
    out = "[uint16]" if halves else "[float16]"
    compile_ptx(monkeypatch, cores.compiled(kind), arguments(out, "[float64]"), (8, 0), False)


def arguments(out, bias="[float32]"):
    halves = ["[uint16]"] * 3
    return (
        *halves, out, "[uint8]", bias, "[int64]", "[int64]", "[float32]", "[float32]", "[int64]",
        "[float32]", "[int64]", "[int32]", "float32", "int64",
    )  # fmt: skip
