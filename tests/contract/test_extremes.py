"""Numbers beyond the range of sums act as its largest; what is not finite touches its own row and
column alone (contract, section 1, "Result").
"""

import warnings

import numpy as np
import pytest
from helpers.oracles import check, same_bits
from helpers.problems import Shape

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem
from fastattn.dispatch import named, unsupported_map

SHAPES = {"few": Shape(1, 2, 3, 70, 16), "many": Shape(1, 2, 50, 70, 16, kv_heads=1)}
LARGEST = np.finfo(np.longdouble).max  # that of float64 where long double is no wider
LARGE = (1e39, 1e300, np.finfo(np.float32).max, np.finfo(np.float64).max, LARGEST)
SMALL = (1e-42, 1e-300)


def quiet_check(target, *arrays, **options):
    """As `check`, in which no call warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.attend(*arrays, return_lse=True, **options)
    return check(target, *arrays, **options)


def filled(shape, size):
    """An array of nothing else, as wide as it has to be."""
    return np.full(shape, size, np.result_type(np.float64, size))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
class TestBeyondTheRange:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_scale(self, target, shape, dtype, sign):
        for size in (*LARGE, *SMALL):
            out, lse = quiet_check(target, *shape.arrays(dtype), scale=sign * size)
            assert np.isfinite(out).all() and np.isfinite(lse).all()

    @pytest.mark.parametrize("scale", [1.0, 1e37])
    def test_softcap(self, target, shape, dtype, scale):
        for size in (*LARGE, *SMALL):
            quiet_check(target, *shape.arrays(dtype), softcap=size, scale=scale)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_alibi(self, target, shape, dtype, sign):
        """Where every key is far away, all of them are as far as can be."""
        for size in (*LARGE, *SMALL):
            for q_offset in (0, 300):
                alibi = filled(shape.heads, sign * size)
                quiet_check(target, *shape.arrays(dtype), alibi=alibi, q_offset=q_offset)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_sinks(self, target, shape, dtype, sign):
        for size in (*LARGE, *SMALL):
            sinks = filled(shape.heads, sign * size)
            quiet_check(target, *shape.arrays(dtype), sinks=sinks)
            quiet_check(target, *shape.arrays(dtype), sinks=sinks, kv_lengths=0)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("bias_dtype", ["float32", "float64", "longdouble", ">f8"])
    def test_bias(self, target, shape, dtype, sign, bias_dtype):
        arrays, grid = shape.arrays(dtype), (shape.n_queries, shape.n_keys)
        most = np.finfo(bias_dtype).max.astype(np.longdouble)
        for size in {sign * min(np.longdouble(x), most) for x in LARGE}:
            bias = np.full(grid, size).astype(bias_dtype)
            quiet_check(target, *arrays, bias=bias)
            bias[::2] = 0
            quiet_check(target, *arrays, bias=bias, causal=True)
            bias[...] = 0
            bias[:, 33] = size
            quiet_check(target, *arrays, bias=bias)
            bias[:, ::2], bias[:, 1::2] = size, -size
            quiet_check(target, *arrays, bias=bias, return_weights=True)

    def test_score(self, target, shape, dtype):
        """Of finite vectors, whose sum may leave the range on the way to a score within it."""
        q, k, v = shape.arrays(dtype)
        root = q.dtype.type(np.sqrt(np.finfo(dtype).max)) * 3
        out, lse = quiet_check(target, q * root, k * root, v, return_weights=True)[:2]
        assert np.isfinite(out).all() and np.isfinite(lse).all()
        q[..., 1], k[..., 1] = q[..., 0] * root, -k[..., 0] * root  # these two cancel out
        q[..., 0], k[..., 0] = q[..., 0] * root, k[..., 0] * root
        out, lse = target.attend(q, k, v, return_lse=True)
        assert np.isfinite(out).all() and np.isfinite(lse).all()

    def test_opposite_ends(self, target, shape, dtype):
        """Steps that leave the range in opposite directions are each drawn in."""
        arrays, most = shape.arrays(dtype), np.finfo(dtype).max
        bias = np.full((shape.n_queries, shape.n_keys), -most)
        quiet_check(target, *arrays, bias=bias, alibi=np.full(shape.heads, most))
        quiet_check(target, *arrays, bias=-bias, alibi=np.full(shape.heads, most))
        quiet_check(target, *arrays, bias=bias, sinks=np.full(shape.heads, -most))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
class TestInfinity:
    def test_bias(self, target, shape, dtype):
        """Makes its row NaN, and its lse +Inf."""
        bias = np.zeros((shape.n_queries, shape.n_keys), dtype)
        bias[1, 5] = np.inf
        out, lse, weights = quiet_check(
            target, *shape.arrays(dtype), bias=bias, return_weights=True
        )
        assert np.isnan(out[:, :, 1]).all() and np.isposinf(lse[:, :, 1]).all()
        assert np.isfinite(np.delete(out, 1, axis=2)).all()
        assert np.isnan(weights[:, :, 1, 5]).all()

    def test_sinks(self, target, shape, dtype):
        """Take all the weight: ``out = 0`` and ``lse = inf``."""
        sinks = np.zeros(shape.heads)
        sinks[0] = np.inf
        out, lse = quiet_check(target, *shape.arrays(dtype), sinks=sinks)
        assert not out[:, 0].any() and np.isposinf(lse[:, 0]).all()

    @pytest.mark.parametrize("first", [3, 60])
    def test_beside_nan(self, target, shape, dtype, first):
        """A row that sees both a score of +Inf and a NaN is NaN."""
        q, k, v = shape.arrays(dtype)
        bias = np.zeros((shape.n_queries, shape.n_keys), dtype)
        bias[1, [first, 63 - first]] = np.inf, np.nan
        _, lse, weights = check(target, q, k, v, bias=bias, return_weights=True)
        assert np.isnan(lse[:, :, 1]).all() and np.isnan(weights[:, :, 1]).all()
        q[:, :, 1, 2], k[:, :, first, 2] = np.inf, 0
        check(target, q, k, v, return_weights=True)


# ----------------------------------------------------------------- what is untouched keeps its bits

POISON = [np.nan, np.inf, -np.inf]
TOUCHED = {
    "few": Shape(1, 2, 5, 1200, 16, kv_heads=1),
    "many": Shape(1, 4, 70, 700, 64, kv_heads=2),
    "parts": Shape(1, 1, 150, 300, 64),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", TOUCHED.values(), ids=TOUCHED)
@pytest.mark.parametrize("poison", POISON, ids=str)
class TestBits:
    def test_beside_a_query(self, target, shape, dtype, poison):
        arrays = shape.arrays(dtype)
        wanted = target.attend(*arrays, return_lse=True, return_weights=True)
        arrays[0][0, 1 % shape.heads, 2, 3] = poison
        got = target.attend(*arrays, return_lse=True, return_weights=True)
        for a, b in zip(got, wanted, strict=True):
            a[0, 1 % shape.heads, 2] = b[0, 1 % shape.heads, 2]
            assert same_bits(a, b)

    def test_beside_a_value(self, target, shape, dtype, poison):
        arrays = shape.arrays(dtype)
        wanted = target.attend(*arrays, return_lse=True)
        arrays[2][0, 0, 30, 3] = poison
        got = target.attend(*arrays, return_lse=True)
        assert not np.isfinite(got[0][0, 0, :, 3].astype(np.float32)).any()
        got[0][..., 3] = wanted[0][..., 3]
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))

    def test_beside_a_bias(self, target, shape, dtype, poison):
        """Of dense biases: one of -Inf has the rest of its row to itself."""
        arrays = shape.arrays(dtype)
        bias = np.zeros((shape.n_queries, shape.n_keys), np.float32)
        wanted = target.attend(*arrays, return_lse=True, bias=bias)
        bias[2, 30] = poison
        got = target.attend(*arrays, return_lse=True, bias=bias)
        for a, b in zip(got, wanted, strict=True):
            a[:, :, 2] = b[:, :, 2]
            assert same_bits(a, b)

    def test_beside_a_key(self, target, shape, dtype, poison):
        """That the last queries alone see."""
        arrays = shape.arrays(dtype)
        wanted = target.attend(*arrays, return_lse=True, causal=True)
        arrays[1][..., -2, 3] = poison
        got = target.attend(*arrays, return_lse=True, causal=True)
        sees = reference.visible(make_problem(*arrays, causal=True))[0, 0, :, -2]
        assert 0 < sees.sum() < len(sees)
        assert all(
            same_bits(a[:, :, ~sees], b[:, :, ~sees]) for a, b in zip(got, wanted, strict=True)
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", TOUCHED.values(), ids=TOUCHED)
def test_infinity_among_values_that_overflow(target, shape, dtype):
    """The sum of huge values is taken again; an Inf among them stays what it is."""
    q, k, v = shape.arrays(dtype)
    v *= np.finfo(dtype).max / 8
    quiet_check(target, q, k, v)
    v[..., 30, 3] = np.inf
    v[..., 50, 5] = np.nan
    out, _ = quiet_check(target, q, k, v)
    assert np.isposinf(out[..., 3]).all() and np.isnan(out[..., 5]).all()
    v[...] = np.finfo(dtype).max
    out, _ = quiet_check(target, q, k, v)
    assert np.isfinite(out).all()


def test_top_keys_of_nan(target):
    """Every weight of the row is NaN, behind the last key too."""
    q, k, v = Shape(1, 1, 3, 4, 8).arrays()
    reason = unsupported_map(named(target.backend), make_problem(q, k, v))
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    q[0, 0, 1] = np.nan
    indices, weights = fastattn.top_keys(q, k, 6, backend=target.backend)
    assert (indices[0, 0, 1] == -1).all() and np.isnan(weights[0, 0, 1]).all()
    assert (indices[0, 0, 0, 4:] == -1).all() and not weights[0, 0, 0, 4:].any()
