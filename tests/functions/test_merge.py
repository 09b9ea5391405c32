"""Attention over disjoint sets of keys, put together (contract, section 3)."""

import itertools

import numpy as np
import pytest
from helpers.problems import Shape, float_type

import fastattn

SHAPE = Shape(2, 4, 50, 90, 64, kv_heads=1)


def parts_of(target, q, k, v, cuts, **options):
    offset = k.shape[-2] - q.shape[-2]
    edges = [0, *cuts, k.shape[-2]]
    for begin, end in itertools.pairwise(edges):
        keys = slice(begin, end)
        yield target.attend(
            q, k[..., keys, :], v[..., keys, :], q_offset=offset - begin, return_lse=True, **options
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cuts", [(), (40,), (10, 11, 89)])
def test_union_of_key_sets(target, cuts, causal):
    q, k, v = SHAPE.arrays()
    out, lse = fastattn.merge(*parts_of(target, q, k, v, cuts, causal=causal))
    whole, whole_lse = target.attend(q, k, v, causal=causal, return_lse=True)
    # Each part and the merging itself round once more than the whole: a few ulp.
    np.testing.assert_allclose(out, whole, atol=8 * np.finfo(np.float32).eps * np.abs(whole).max())
    np.testing.assert_allclose(lse, whole_lse, rtol=4 * np.finfo(np.float32).eps)
    assert (out.dtype, lse.dtype) == (whole.dtype, whole_lse.dtype)


def test_sinks_in_one_part(target):
    q, k, v = SHAPE.arrays()
    sinks = np.arange(4.0)
    first, second = parts_of(target, q, k, v, (30,))
    with_sinks = target.attend(q, k[..., :30, :], v[..., :30, :], sinks=sinks, return_lse=True)
    assert not np.array_equal(first[0], with_sinks[0])
    whole = target.attend(q, k, v, sinks=sinks)
    np.testing.assert_allclose(fastattn.merge(with_sinks, second)[0], whole, atol=2e-6)


def test_a_sink_of_inf_takes_all(target):
    q, k, v = SHAPE.arrays()
    sinks = np.array([np.inf, 0, 1, np.inf])
    _, second = parts_of(target, q, k, v, (30,))
    first = target.attend(q, k[..., :30, :], v[..., :30, :], sinks=sinks, return_lse=True)
    for parts in ((first, second), (second, first), (first,)):
        out, lse = fastattn.merge(*parts)
        assert np.isfinite(out).all() and not out[:, [0, 3]].any() and out[:, 1:3].all()
        np.testing.assert_array_equal(lse[:, [0, 3]], np.inf)


def test_parts_that_see_nothing():
    nothing = np.full((3, 2), np.nan, np.float32), np.full(3, -np.inf, np.float32)
    something = np.ones((3, 2), np.float32), np.zeros(3, np.float32)
    np.testing.assert_array_equal(fastattn.merge(nothing, something)[0], 1)
    out, lse = fastattn.merge(nothing, nothing)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [(("int64", "int64"), "float64"), (("float16", "bfloat16"), "float32"),
     (("float16", "float16"), "float16"), (("bfloat16", "float32"), "float32")],
)  # fmt: skip
def test_dtype_of_parts(dtypes, expected):
    """Promoted as in `scaled_dot`; integers keep the fractions that they merge to."""
    lse = np.zeros(1, np.float32)
    first, second = map(float_type, dtypes)
    parts = np.array([[1, 2]]).astype(first), np.array([[2, 3]]).astype(second)
    out, _ = fastattn.merge(*((part, lse) for part in parts))
    assert out.dtype == expected and out.tolist() == [[1.5, 2.5]]


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "parts: expected at least one"),
        ((np.zeros((2, 2)),), TypeError, "part 0: expected a pair"),
        (((1, 2, 3),), TypeError, "part 0: expected a pair .*, got 3 of them"),
        (((np.zeros((2, 2)), np.zeros(3)),), ValueError, "part 0: expected shapes"),
        (((np.zeros((2, 2)), np.zeros(2)), (np.zeros((3, 2)), np.zeros(3))), ValueError, "part 1"),
        (((np.zeros((2, 2), complex), np.zeros(2)),), TypeError, "part 0, out: "),
        (((np.zeros((2, 2)), np.zeros(2, complex)),), TypeError, "part 0, lse: "),
        (((np.ma.zeros((2, 2)), np.zeros(2)),), TypeError, "part 0, out: .* a masked array"),
        (((np.zeros((2, 2)), np.ma.zeros(2)),), TypeError, "part 0, lse: .* a masked array"),
    ],
)
def test_errors(parts, error, message):
    with pytest.raises(error, match="^" + message):
        fastattn.merge(*parts)
