"""Forward mode: tangents against central differences of the function itself, in float64."""

from functools import partial

import numpy as np
import pytest

import fastattn

STEP = 1e-6


def bent(score, batch, head, i, j):
    return score * (1 + 0.1 * head) + 0.05 * score * score - 0.001 * j


def slope_of_bent(score, batch, head, i, j):
    return 1 + 0.1 * head + 0.1 * score


def in_turn(batch, head, i, j):
    return (i + j) % 3 != 0


def nearby(batch, head, i, j):
    return j < 40 + i


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
        "relative_bias": np.sin(np.arange(20.0)).reshape(4, 5), "mask": np.arange(700) % 3 > 0,
    }),
    "scales and dropout": (fastattn.scaled_dot, {"scale": np.arange(4.0), "dropout": (0.3, 1)}),
    "dot": (fastattn.dot, {"kv_lengths": [20, 0]}),
    "cosine": (fastattn.cosine, {"temperature": 0.2, "sinks": np.zeros(4), "softcap": 3.0}),
    "gaussian": (fastattn.gaussian, {"alpha": 0.1, "sinks": np.zeros(4)}),
    "gaussian sums": (fastattn.gaussian, {"alpha": 0.1, "normalize": False}),
    "gaussian of others": (fastattn.gaussian, {
        "alpha": 0.1, "exclude_self": True, "q_offset": 1, "causal": True, "sinks": np.zeros(4),
    }),
    "euclidean": (fastattn.euclidean, {"scale": 0.3}),
    "additive": (fastattn.additive, ADDITIVE),
    "flex": (fastattn.flex, {
        "score_mod": bent, "score_grad": slope_of_bent, "mask_mod": in_turn, "softcap": 2.0,
        "causal": True,
    }),
    "flex in blocks": (fastattn.flex, {"block_mask": nearby}),
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
    if function is fastattn.flex:
        pytest.importorskip("numba", reason="only Numba compiles a function of the user's")
    if "block_mask" in options:
        options = {"block_mask": fastattn.block_mask(options["block_mask"], 9, 700)}
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


@pytest.mark.parametrize("given", [1, 2, 3])
def test_layers(given):
    layer = fastattn.MultiHeadAttention(8, 4, kv_heads=2, key_dim=6, value_dim=5, dtype="float64")
    if given < 3:
        layer = fastattn.MultiHeadAttention(8, 4, kv_heads=2, dtype="float64")
    layer.b_q, layer.b_o = np.arange(8.0), np.ones(8)
    widths = (8, layer.key_dim, layer.value_dim)[:given]
    arrays = tuple(RNG.standard_normal((3, 7, width)) for width in widths)
    tangents = tuple(map(np.cos, arrays))

    def call(*arrays):
        return layer(*arrays, causal=True, return_lse=True)

    results, found = fastattn.jvp(layer, arrays, tangents, causal=True, return_lse=True)
    for got, alone in zip(results, call(*arrays), strict=True):
        assert np.array_equal(got, alone)
    for got, expected in zip(found, differences(call, arrays, tangents), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-8)
    _, still = fastattn.jvp(layer, arrays, (None,) * given)
    assert not still.any()


def test_masks_of_many_queries():
    """In as many blocks as the call without tangents."""
    q, k, v = (x[0, :1, :600] for x in (ARRAYS[1], *ARRAYS[1:]))
    mask = RNG.random((600, 600)) < 0.5
    call = partial(fastattn.scaled_dot, mask=mask)
    _, got = fastattn.jvp(fastattn.scaled_dot, (q, k, v), (k, None, None), mask=mask)
    (expected,) = differences(lambda *x: (call(*x),), (q, k, v), (k, None, None))
    np.testing.assert_allclose(got, expected, atol=2e-8)


@pytest.mark.parametrize("function, options", [
    (fastattn.scaled_dot, {
        "scale": np.arange(4.0), "softcap": 2.0, "sinks": np.arange(4.0), "dropout": (0.3, 1),
        "alibi": np.ones(4) * 0.01, "causal": True, "bias": np.cos(np.arange(700)),
        "relative_bias": np.sin(np.arange(20.0)).reshape(4, 5),
    }),
    (fastattn.cosine, {"temperature": 0.2}),
    (fastattn.gaussian, {"exclude_self": True, "normalize": False, "alpha": 0.1, "q_offset": 1}),
    (fastattn.additive, ADDITIVE),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
@pytest.mark.parametrize("moving", ["qkv", "v"])
def test_sparse_masks(function, options, moving):
    sparse = pytest.importorskip("scipy.sparse", reason="the masks are SciPy's")
    mask = RNG.random((9, 700)) < 0.1
    mask[2] = False
    tangents = [t if name in moving else None for name, t in zip("qkv", TANGENTS, strict=True)]
    dense, listed = (
        fastattn.jvp(function, ARRAYS, tangents, return_lse=True, mask=x, **options)[1]
        for x in (mask, sparse.csr_array(mask))
    )
    for got, expected in zip(listed, dense, strict=True):  # sums of 70 terms in another order
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_block_tables():
    """The tangents of pages are pages."""
    q, k, v = (x[0, :2] for x in ARRAYS)
    pools = [x.reshape(2, 7, 100, -1).swapaxes(0, 1) for x in (k, v)]
    table = np.array([[3, 0, 5], [1, 1, 2]])
    options = {"block_table": table, "kv_lengths": [300, 120]}
    arrays = q.reshape(2, 1, 9, 8).repeat(2, 1), *pools
    tangents = tuple(map(np.cos, arrays))
    _, got = fastattn.jvp(fastattn.scaled_dot, arrays, tangents, **options)
    (expected,) = differences(lambda *x: (fastattn.scaled_dot(*x, **options),), arrays, tangents)
    np.testing.assert_allclose(got, expected, atol=2e-8)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("function, options", [
    (fastattn.scaled_dot, {}), (fastattn.cosine, {}),
    (fastattn.gaussian, {"exclude_self": True, "alpha": 0.1}),
])  # fmt: skip
def test_dtypes(function, options, dtype):
    arrays, tangents = (tuple(x.astype(dtype) for x in y) for y in (ARRAYS, TANGENTS))
    _, got = fastattn.jvp(function, arrays, tangents, **options)
    wide = (tuple(x.astype(np.float64) for x in y) for y in (arrays, tangents))
    _, expected = fastattn.jvp(function, *wide, **options)
    assert got.dtype == dtype
    # A sum of 700 terms kept in float32, then rounded to the result's dtype.
    atol = max(float(np.finfo(dtype).eps), 2e-6) * abs(expected).max()
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
    ((fastattn.scaled_dot, ARRAYS[:2], TANGENTS[:2]), {}, ValueError, "arrays: expected 3, got 2"),
    ((fastattn.MultiHeadAttention(8, 2), (), ()), {}, ValueError, "arrays: expected 1 to 3, got 0"),
    ((fastattn.flex, ARRAYS, TANGENTS), {"score_mod": bent}, ValueError, "score_grad: expected"),
    ((fastattn.gaussian, ARRAYS, TANGENTS), {"return_max": True}, ValueError, "return_max: "),
    ((fastattn.cosine, ARRAYS, TANGENTS), {"scale": 1.0}, TypeError, "scale: expected None"),
    ((fastattn.key_importance, ARRAYS[:2], TANGENTS[:2]), {}, TypeError, "function: expected one"),
    ((fastattn.scaled_dot, ARRAYS, TANGENTS), {"return_weights": True}, ValueError,
     "return_weights: expected False"),
    ((fastattn.scaled_dot, ARRAYS, TANGENTS), {"out": np.empty(3)}, ValueError, "out: expected"),
    *(((function, ARRAYS, TANGENTS), {name: None}, TypeError,
       f"{name}: scaled_dot() has no such option")
      for function in (fastattn.scaled_dot, fastattn.euclidean) for name in ("score_mod", "held")),
])  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error) as caught:
        fastattn.jvp(*arguments, **options)
    assert str(caught.value).startswith(message)
