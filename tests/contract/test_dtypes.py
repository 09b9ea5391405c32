"""Dtypes: what goes in, what comes out, what sums are kept in (contract, section 1)."""

import itertools

import numpy as np
import pytest
from helpers.oracles import check, finfo, plain_numpy, rms, same_bits, ulp
from helpers.problems import DTYPES, Shape, float_type

import fastattn
from fastattn import reference
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 9, 21, 8, kv_heads=2)
INTEGERS = ("bool", "int8", "uint8", "int32", "uint64", "int64")


@pytest.mark.parametrize("names", list(itertools.product(DTYPES, repeat=3)), ids="-".join)
def test_promotion(target, names):
    """The widest of q, k and v wins; float16 with bfloat16 makes float32."""
    q, k, v = (x.astype(float_type(n)) for x, n in zip(SHAPE.arrays(), names, strict=True))
    if "float64" in names:
        wanted = "float64"
    elif "float32" in names or len(set(names)) > 1:
        wanted = "float32"
    else:
        wanted = names[0]
    out, lse = check(target, q, k, v)
    assert out.dtype == float_type(wanted)
    assert lse.dtype == (np.float64 if wanted == "float64" else np.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 2, 130, 600, 64, value_dim=37), Shape(2, 4, 1, 130, 20, 2), Shape(1, 1, 3, 5000, 8)],
    ids=["many queries", "few queries", "parts of keys"],
)
def test_mixed_dtypes_give_the_bits_of_converted_copies(target, shape, transposed):
    """A narrower operand is widened as it is read, which changes no number."""
    arrays = shape.arrays()
    for m, n in itertools.product(range(4), repeat=2):  # each pair at each two operands
        names = DTYPES[m], DTYPES[n], DTYPES[(m + n) % 4]
        mixed = [x.astype(float_type(n)) for x, n in zip(arrays, names, strict=True)]
        if transposed:
            mixed = [np.asfortranarray(x) for x in mixed]
        wide = np.float64 if "float64" in names else np.float32
        found, wanted = (
            target.attend(*x, causal=True, return_lse=True)
            for x in (mixed, [x.astype(wide) for x in mixed])
        )
        assert all(map(same_bits, found, wanted)), names


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("which", ["q", "k", "v", "qkv"])
def test_integers_and_bools_become_float64(target, name, which):
    """As in `numpy.mean`; so any one of them makes the result float64."""
    rng = np.random.default_rng(2)
    given = dict(zip("qkv", SHAPE.arrays(), strict=True))
    for x in which:
        given[x] = rng.integers(0, 2, given[x].shape).astype(name)
    out, lse = check(target, **given)
    assert out.dtype == lse.dtype == np.float64


@pytest.mark.parametrize("name", DTYPES)
def test_weights_have_the_promoted_dtype(target, name):
    _, weights = target.attend(*SHAPE.arrays(name), return_weights=True)
    assert weights.dtype == float_type(name)
    check(target, *SHAPE.arrays(name), return_weights=True)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("option", ["bias", "alibi", "sinks"])
def test_options_change_no_dtype(target, name, option):
    """``bias``, ``alibi`` and ``sinks`` may have any real dtype and change none of this."""
    value = {"bias": np.ones((9, 21), np.longdouble), "alibi": np.ones(4), "sinks": np.ones(4)}
    out, lse = check(target, *SHAPE.arrays(name), **{option: value[option]})
    assert out.dtype == float_type(name)
    assert lse.dtype == (np.float64 if name == "float64" else np.float32)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("n_queries", [1, 40])
def test_sums_of_half_precision_are_kept_in_float32(target, name, n_queries):
    """Only the result is rounded; bfloat16 may round the weights as well."""
    q, k, v = Shape(1, 2, n_queries, 5000, 16).arrays(name)
    v = (v + np.ones((), v.dtype)).astype(v.dtype)
    out = target.attend(q, k, v)
    p = make_problem(q, k, v)
    exact = reference.attend(p)[0]
    error = rms(out.astype(float) - exact)
    # Rounding is off by 1/sqrt(12) ulp in the mean; each rounded weight moves v / 5000 by less.
    allowed = 2 * rms(plain_numpy(p, "float32")[0] - exact) + ulp(np.abs(exact).max(), v.dtype)
    assert error <= allowed


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_largest_numbers_of_the_dtype(target, name):
    """An average of values near the largest number is a number."""
    q, k, v = SHAPE.arrays(name)
    v = np.full_like(v, float(finfo(v.dtype).max) / 2)
    out, _ = check(target, q, k, v)
    assert np.isfinite(out.astype(float)).all()


@pytest.mark.dtypes("float16")
def test_scores_of_float16_pass_its_largest_number(target):
    """Scores are sums, so they are kept in float32 and may pass 65504."""
    q, k, v = (x.astype("float16") for x in SHAPE.arrays())
    _, lse = target.attend(q * np.float16(1000), k * np.float16(1000), v, return_lse=True)
    assert lse.max() > 65504 and np.isfinite(lse).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_inputs(target, dtype):
    """Subnormal values are numbers: sums of them are not flushed to 0."""
    q, k, v = SHAPE.arrays(dtype)
    tiny = np.finfo(dtype).smallest_subnormal * 1000
    check(target, q, k, np.full_like(v, tiny), return_lse=True)
    out = target.attend(q, k, np.full_like(v, tiny))
    np.testing.assert_allclose(out / tiny, 1, atol=0.02)  # 20 of 1000 steps


@pytest.mark.parametrize(
    "dtype", ["complex64", "complex128", "object", "U3", "S3", "datetime64[s]", "timedelta64[s]",
              "longdouble", "f4,f4", "V2", "V4", [("bfloat16", "u2")]],
)  # fmt: skip
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_dtypes_are_refused(name, dtype):
    if dtype == "longdouble" and np.dtype(dtype) == np.float64:
        pytest.skip("long double is float64 here")
    arguments = dict(zip("qkv", SHAPE.arrays(), strict=True))
    arguments[name] = np.zeros(arguments[name].shape, dtype)
    with pytest.raises(TypeError, match=rf"^{name}: "):
        fastattn.scaled_dot(**arguments)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_other_dtypes_of_ml_dtypes_are_refused(name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    with pytest.raises(TypeError, match=r"^q: "):
        fastattn.scaled_dot(*(x.astype(dtype) for x in SHAPE.arrays()))
    for name in ("bias", "relative_bias", "alibi", "sinks", "scale"):
        x = np.zeros((2, 1) if name == "relative_bias" else 2, dtype)
        with pytest.raises(TypeError, match=rf"^{name}: expected .* got {dtype}"):
            fastattn.scaled_dot(*SHAPE.arrays(), **{name: x})
