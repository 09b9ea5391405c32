"""Forward mode: tangents against central differences of the function itself, in float64."""

import numpy as np
import pytest

import fastattn

STEP = 1e-6
RNG = np.random.default_rng(0)
ARRAYS = tuple(RNG.standard_normal(s) for s in ((2, 4, 9, 8), (2, 2, 700, 8), (2, 2, 700, 5)))
TANGENTS = tuple(RNG.standard_normal(x.shape) for x in ARRAYS)
ADDITIVE = {name: RNG.standard_normal(s) for name, s in (("w_q", (8, 6)), ("w_k", (8, 6)),
                                                         ("w", 6), ("b", 6))}  # fmt: skip
CASES = {
    "scaled_dot": (fastattn.scaled_dot, {}),
    "every option": (fastattn.scaled_dot, {
        "scale": 0.2, "softcap": 2.0, "sinks": np.arange(4.0), "alibi": np.ones(4) * 0.01,
        "causal": True, "window": 300, "bias": np.cos(np.arange(700)),
        "mask": np.arange(700) % 3 > 0,
    }),
    "dot": (fastattn.dot, {"kv_lengths": [20, 0]}),
    "euclidean": (fastattn.euclidean, {"scale": 0.3}),
    "additive": (fastattn.additive, ADDITIVE),
}  # fmt: skip


def differences(function, arrays, tangents):
    """The derivatives of each result along the tangents."""
    sides = []
    for step in (STEP, -STEP):
        moved = (x if t is None else x + step * t for x, t in zip(arrays, tangents, strict=True))
        sides.append(function(*moved))
    # An lse of -inf stays.
    return tuple(
        np.subtract(a, b, out=np.zeros_like(a), where=a != b) / (2 * STEP)
        for a, b in zip(*sides, strict=True)
    )


@pytest.mark.parametrize("moving", ["qkv", "q", "k", "v", ""])
@pytest.mark.parametrize("case", CASES)
def test_against_differences(case, moving):
    function, options = CASES[case]
    tangents = [t if name in moving else None for name, t in zip("qkv", TANGENTS, strict=True)]

    def call(*arrays):
        return function(*arrays, return_lse=True, **options)

    results, found = fastattn.jvp(function, ARRAYS, tangents, return_lse=True, **options)
    for got, alone in zip(results, call(*ARRAYS), strict=True):
        assert np.array_equal(got, alone)
    # Results are of size 1 and rounded at 1e-16, so differences of 2e-6 are good to 1e-10 or so.
    for got, expected in zip(found, differences(call, ARRAYS, tangents), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-8)


def test_pool():
    x, w = RNG.standard_normal((3, 7, 5)), RNG.standard_normal((5, 2))
    tangents = (2 * x + 1, w - 1)
    _, got = fastattn.jvp(fastattn.pool, (x, w), tangents, kv_lengths=[7, 3, 0])
    (expected,) = differences(
        lambda x, w: (fastattn.pool(x, w, kv_lengths=[7, 3, 0]),), (x, w), tangents
    )
    np.testing.assert_allclose(got, expected, atol=2e-8)


def test_varlen():
    arrays = tuple(x[0].swapaxes(0, 1)[:9] for x in ARRAYS)
    tangents = tuple(x[0].swapaxes(0, 1)[:9] for x in TANGENTS)
    for options in ({"causal": True}, {"alibi": np.ones(4), "q_offset": [0, 3]}):
        options |= {"lengths": [4, 5]}
        _, got = fastattn.jvp(fastattn.varlen, arrays, tangents, **options)
        (expected,) = differences(
            lambda *x, o=options: (fastattn.varlen(*x, **o),), arrays, tangents
        )
        np.testing.assert_allclose(got, expected, atol=2e-8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtypes(dtype):
    arrays, tangents = (tuple(x.astype(dtype) for x in y) for y in (ARRAYS, TANGENTS))
    _, got = fastattn.jvp(fastattn.scaled_dot, arrays, tangents)
    wide = (tuple(x.astype(np.float64) for x in y) for y in (arrays, tangents))
    _, expected = fastattn.jvp(fastattn.scaled_dot, *wide)
    assert got.dtype == dtype
    # A sum of 700 terms kept in float32, then rounded to the result's dtype.
    atol = max(float(np.finfo(dtype).eps), 1e-6) * abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=atol)


def test_hidden_keys_touch_nothing():
    q, k, v = (x.copy() for x in ARRAYS)
    tangents = tuple(t.copy() for t in TANGENTS)
    expected = fastattn.jvp(fastattn.scaled_dot, (q, k, v), tangents, kv_lengths=600)[1]
    for x in (k, v, *tangents[1:]):
        x[:, :, 600:] = np.nan
    got = fastattn.jvp(fastattn.scaled_dot, (q, k, v), tangents, kv_lengths=600)[1]
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("arguments, options, error, message", [
    ((len, ARRAYS, TANGENTS), {}, TypeError, "function: expected one of"),
    ((fastattn.scaled_dot, ARRAYS[0], TANGENTS), {}, TypeError, "arrays: expected a tuple"),
    ((fastattn.scaled_dot, ARRAYS, TANGENTS[:2]), {}, ValueError, "tangents: expected 3"),
    ((fastattn.scaled_dot, ARRAYS, (TANGENTS[1], None, None)), {}, ValueError,
     "tangents[0]: expected shape"),
    ((fastattn.scaled_dot, ARRAYS, ("a", None, None)), {}, TypeError, "tangents[0]: "),
    ((fastattn.scaled_dot, ARRAYS, TANGENTS), {"return_weights": True}, ValueError,
     "return_weights: expected False"),
    ((fastattn.scaled_dot, ARRAYS, TANGENTS), {"out": np.empty(3)}, ValueError, "out: expected"),
])  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error) as caught:
        fastattn.jvp(*arguments, **options)
    assert str(caught.value).startswith(message)
