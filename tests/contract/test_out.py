"""``out=`` is filled and returned (contract, section 1, "Result")."""

import numpy as np
import pytest
from helpers.layouts import LAYOUTS
from helpers.oracles import assert_solves, check
from helpers.problems import Shape

import fastattn
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 18, 18, 8)
OUT = (2, 4, 18, 8)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n not in ("list", "read-only")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_filled_and_returned(target, layout, dtype):
    """Any strides; byte-swapped or misaligned still ends up right."""
    out = LAYOUTS[layout](np.full(OUT, np.nan, dtype))
    arrays = SHAPE.arrays(dtype)
    results = target.attend(*arrays, out=out, return_lse=True)
    assert results[0] is out
    assert target.attend(*arrays, out=out) is out
    native = out.astype(out.dtype.newbyteorder("="))
    assert_solves((native, results[1]), make_problem(*arrays, return_lse=True))


def test_of_two_axes(target):
    arrays = [x[0, 0] for x in SHAPE.arrays()]
    out = np.full((18, 8), np.nan, np.float32)
    assert target.attend(*arrays, out=out) is out
    assert_solves(out, make_problem(*arrays))


def test_gaps_are_left_alone(target):
    around = np.full((2, 4, 18, 24), 7, np.float32)
    target.attend(*SHAPE.arrays(), out=around[..., 8:16])
    np.testing.assert_array_equal(around[..., :8], 7)
    np.testing.assert_array_equal(around[..., 16:], 7)


def test_queries_without_keys_are_filled(target):
    out = np.full(OUT, np.nan, np.float32)
    target.attend(*SHAPE.arrays(), out=out, kv_lengths=[0, 18])
    np.testing.assert_array_equal(out[0], 0)
    out = np.full(OUT, np.nan, np.float32)
    q, k, v = SHAPE.arrays()
    np.testing.assert_array_equal(target.attend(q, k[:, :, :0], v[:, :, :0], out=out), 0)


@pytest.mark.parametrize("dtype", ["int64", "bool", ">f4"])
def test_promoted_dtype_is_what_counts(target, dtype):
    q, k, v = SHAPE.arrays()
    out = np.empty(OUT, "f4" if dtype == ">f4" else "f8")
    assert target.attend(q, k.astype(dtype), v, out=out) is out


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_that_is_an_input(target, name):
    """One that overlaps an input still ends up right."""
    arrays = dict(zip("qkv", SHAPE.arrays(), strict=True))
    p = make_problem(**{n: x.copy() for n, x in arrays.items()})
    out = arrays[name]
    assert target.attend(**arrays, out=out) is out
    assert_solves(out, p)


@pytest.mark.parametrize("shift", [1, 8, 8 * 18])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_that_overlaps_an_input_in_part(target, name, shift):
    arrays = dict(zip("qkv", SHAPE.arrays(), strict=True))
    p = make_problem(**arrays)
    buffer = np.zeros(np.prod(OUT) + shift, np.float32)
    part = buffer[:-shift].reshape(OUT)
    part[...] = arrays[name]
    arrays[name], out = part, buffer[shift:].reshape(OUT)
    target.attend(**arrays, out=out)
    assert_solves(out, p)


def test_that_overlaps_in_reverse(target):
    q, k, v = SHAPE.arrays()
    p = make_problem(q.copy(), k, v)
    out = q[:, :, ::-1, ::-1]
    target.attend(q, k, v, out=out)
    assert_solves(out.copy(), p)


def test_that_overlaps_bias(target):
    q, k, v = SHAPE.arrays()
    bias = np.random.default_rng(0).standard_normal((2, 4, 18, 18)).astype(np.float32)
    p = make_problem(q, k, v, bias=bias.copy())
    out = bias[..., 4:12]
    target.attend(q, k, v, bias=bias, out=out)
    assert_solves(out.copy(), p)


def test_that_overlaps_mask(target):
    q, k, v = SHAPE.arrays()
    buffer = np.zeros(OUT, np.float32)
    mask = buffer.view(np.uint8).view(bool)[0, 0, :, :18]
    mask[...] = np.random.default_rng(0).random((18, 18)) < 0.7
    p = make_problem(q, k, v, mask=mask.copy())
    target.attend(q, k, v, mask=mask, out=buffer)
    assert_solves(buffer, p)


def test_that_overlaps_small_options(target):
    q, k, v = SHAPE.arrays("float64")
    out = np.zeros(OUT)
    sinks = out[0, 0, 0, :4]
    sinks[...] = [1, 2, 3, 4]
    spans = out[1, 3, :, 3].view(np.int64)
    spans[...] = np.arange(18)
    lengths = out[1, 0, 0, :2].view(np.int64)
    lengths[...] = [7, 15]
    alibi = out[1, 2, 1, :4]
    alibi[...] = [0.5, 0.25, 0.1, 0]
    offset = out[1, 0, 1, :2].view(np.int64)
    offset[...] = [3, -4]
    small = {"sinks": sinks, "kv_lengths": lengths, "alibi": alibi, "q_offset": offset}
    p = make_problem(q, k, v, spans=(0, spans.copy()), **{n: x.copy() for n, x in small.items()})
    target.attend(q, k, v, spans=(0, spans), **small, out=out)
    assert_solves(out, p)
    relative_bias = out.ravel()[:12].reshape(4, 3)
    relative_bias[...] = np.arange(12).reshape(4, 3)
    p = make_problem(q, k, v, relative_bias=relative_bias.copy())
    target.attend(q, k, v, relative_bias=relative_bias, out=out)
    assert_solves(out, p)


def test_memmap(target, tmp_path):
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=OUT)
    assert target.attend(*SHAPE.arrays(), out=out) is out
    assert_solves(np.array(out), make_problem(*SHAPE.arrays()))


REFUSED = {
    "longer": np.empty((2, 4, 19, 8), np.float32),
    "would broadcast": np.empty((1, 2, 4, 18, 8), np.float32),
    "fewer axes": np.empty((4, 18, 8), np.float32),
    "wider": np.empty(OUT, np.float64),
    "narrower": np.empty(OUT, np.float16),
    "integers": np.empty(OUT, np.int32),
    "one batch": np.lib.stride_tricks.as_strided(
        np.empty(OUT, np.float32), OUT, (0, 18 * 32, 32, 4)
    ),
    "rows by half": np.lib.stride_tricks.as_strided(
        np.empty(4000, np.float32), OUT, (18 * 64, 18 * 16, 16, 4)
    ),
}


@pytest.mark.parametrize("out", REFUSED.values(), ids=REFUSED)
def test_refused(out):
    """A wrong shape or dtype, or one that overlaps itself, is a ValueError before any work."""
    out[...] = 7
    with pytest.raises(ValueError, match=r"^out: "):
        fastattn.scaled_dot(*SHAPE.arrays(), out=out)
    np.testing.assert_array_equal(out, 7)


def test_interleaved_but_apart(target):
    """Axes may interleave as long as every element has a place of its own."""
    base = np.zeros(16, np.float32)
    out = np.lib.stride_tricks.as_strided(base, (3, 2), (8, 12))
    arrays = Shape(1, 1, 3, 5, 2).arrays()
    q, k, v = (x[0, 0] for x in arrays)
    check(target, q, k, v, out=out)


@pytest.mark.parametrize("out", [[[0.0]], 3, "out"], ids=repr)
def test_not_an_array(out):
    with pytest.raises((TypeError, ValueError), match=r"^out: "):
        fastattn.scaled_dot(*SHAPE.arrays(), out=out)


def test_read_only():
    out = np.empty(OUT, np.float32)
    out.flags.writeable = False
    with pytest.raises((TypeError, ValueError), match=r"^out: "):
        fastattn.scaled_dot(*SHAPE.arrays(), out=out)
