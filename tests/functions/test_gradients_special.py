"""Gradients at NaN, Inf and the ends of the range: what is hidden stays hidden (contract, 1)."""

import numpy as np
import pytest
from helpers.gradients import check_gradients, exact_gradients, random_like
from helpers.hiding import HIDING, KEY, POISON
from helpers.oracles import same_bits
from helpers.problems import Shape

from fastattn import reference
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 70, 90, 16, kv_heads=2)
WIDE = SHAPE._replace(head_dim=64, value_dim=64)  # enough for float32 in parts

# The order of the sums may differ, their terms may not.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("hiding", HIDING)
def test_key_reaches_only_those_who_see_it(target, hiding, poison):
    """Neither the gradients of queries that do not see it, nor those of keys seen by others."""
    options = HIDING[hiding]
    q, k, v = WIDE.arrays()
    clean = check_gradients(target, q, k, v, **options)
    sees = np.broadcast_to(reference.visible(make_problem(q, k, v, **options)), (2, 4, 70, 90))[
        ..., KEY
    ]
    k[:, :, KEY, 3], v[:, :, KEY, 5] = poison, poison
    dq, dk, dv, *_ = check_gradients(target, q, k, v, **options)
    np.testing.assert_allclose(dq[~sees], clean[0][~sees], **CLOSE)
    assert sees.any() and not np.isfinite(dq[sees]).all()
    unrelated = ~(sees[..., None] & reference.visible(make_problem(q, k, v, **options))).any(axis=2)
    unrelated = unrelated.reshape(2, 2, 2, 90).all(axis=2)  # by no query head of the group
    for found, want in ((dk, clean[1]), (dv, clean[2])):
        np.testing.assert_allclose(found[unrelated], want[unrelated], **CLOSE)


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize(
    "hiding",
    [
        {"kv_lengths": [KEY, KEY]},
        {"mask": np.arange(90) < KEY},
        {"bias": np.where(np.arange(90) < KEY, 0, -np.inf)},
        {"spans": (0, KEY)},
        {"causal": True, "q_offset": KEY - 70},
    ],
    ids=lambda options: next(iter(options)),
)
def test_key_that_no_query_sees(target, hiding, poison):
    """Its gradients are exactly 0, and it reaches no other."""
    q, k, v = WIDE.arrays()
    clean = check_gradients(target, q, k, v, **hiding)
    k[:, :, KEY:], v[:, :, KEY:] = poison, poison
    found = check_gradients(target, q, k, v, **hiding)
    for got, want in zip(found, clean, strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
    for got in found[1:3]:
        np.testing.assert_array_equal(got[:, :, KEY:], 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_nobody_sees_touches_no_bit(target, dtype):
    """Not even by the choice of another sum: paddings of NaN and of 0 give the same gradients."""
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    q, k, v = WIDE.arrays(dtype)
    rows = np.arange(70)[:, None] < 60
    found = []
    for padding in (0, np.nan, np.inf):
        k[:, :, KEY:], v[:, :, KEY:], q[:, :, 60:] = padding, padding, padding
        results, pullback = target.vjp(q, k, v, mask=rows & (np.arange(90) < KEY))
        grad = random_like(results)
        grad[:, :, 60:] = padding
        found.append(pullback(grad))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, found[0], strict=True))


# Factors of k, v and the gradient that arrives: products of parts need care below 2**-100.
SIZES = [
    (1, 1, 1e-33),
    (1, 1e-33, 1),
    (1, 1e-16, 1e-18),
    (1e-32, 1, 1),
    (1, 1e20, 1e-36),
    (1, 1e30, 1e-25),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(target, sizes):
    """Gradients as exact as ever of small and large numbers, in some rows or in all."""
    for rows in (slice(None), slice(20, 50)):
        q, k, v = WIDE.arrays()
        for x, size in ((k, sizes[0]), (v, sizes[1])):
            x[:, :, rows] *= np.float32(size)
        check_gradients(target, q, k, v, grad_size=(rows, sizes[2]), with_lse=False)


@pytest.mark.parametrize("hiding", ["spans", "mask", "bias"])
def test_query_that_sees_no_key(target, hiding):
    """Its gradient is 0 and it gives none, whatever is in it and arrives at it."""
    rows = np.ones((70, 1), bool)
    rows[[3, 41]] = False
    options = {
        "spans": {"spans": (0, np.where(rows[:, 0], 90, 0))},
        "mask": {"mask": rows},
        "bias": {"bias": np.where(rows, 0.5, -np.inf), "wrt": ()},
    }[hiding]
    q, k, v = WIDE.arrays()
    results, pullback = target.vjp(q, k, v, return_lse=True, **options)
    grads = [random_like(x) for x in results]
    clean = pullback(*grads)
    np.testing.assert_array_equal(clean[0][:, :, [3, 41]], 0)
    q[:, :, 3], q[:, :, 41] = np.nan, np.inf
    for grad in grads:
        grad[:, :, [3, 41]] = np.nan
    _, pullback = target.vjp(q, k, v, return_lse=True, **options)
    for got, want in zip(pullback(*grads), clean, strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("hiding", HIDING)
def test_gradient_of_a_query_reaches_only_what_it_sees(target, hiding):
    """A NaN that arrives at one query."""
    options = HIDING[hiding]
    q, k, v = WIDE.arrays()
    results, pullback = target.vjp(q, k, v, **options)
    grad = random_like(results)
    clean = pullback(grad)
    sees = reference.visible(make_problem(q, k, v, **options))[0, 1, 30]
    assert sees.any() and not sees.all()
    grad[0, 1, 30, 2] = np.nan
    dq, dk, dv = pullback(grad)
    touched = np.zeros((2, 4, 70), bool)
    touched[0, 1, 30] = True
    np.testing.assert_array_equal(np.isnan(dq).all(axis=-1), touched)
    keys = np.zeros((2, 2, 90), bool)
    keys[0, 0] = sees
    np.testing.assert_array_equal(np.isnan(dk).any(axis=-1), keys)
    np.testing.assert_array_equal(np.isnan(dv[..., 2]), keys)
    for got, want, hit in zip((dq, dk, dv), clean, (touched, keys, keys), strict=True):
        np.testing.assert_allclose(got[~hit], want[~hit], **CLOSE)


def test_options_of_what_is_hidden(target):
    """The gradient of a bias is 0 where it hides, or where something else does."""
    q, k, v = WIDE.arrays()
    bias = np.random.default_rng(0).standard_normal((4, 70, 90)).astype(np.float32)
    bias[:, :, 7] = -np.inf
    k[:, :, 7] = np.nan
    v[:, :, 80:] = np.nan
    bias[:, :, 85:] = np.nan
    found = check_gradients(
        target, q, k, v, bias=bias, kv_lengths=80, alibi=np.ones(4), sinks=np.ones(4), q_offset=0
    )
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_array_equal(found[3][..., 7], 0)
    np.testing.assert_array_equal(found[3][..., 80:], 0)


def test_sinks_of_rows_without_keys(target):
    """There the sink has all the weight: lse is the sink."""
    q, k, v = SHAPE.arrays()
    sinks = np.array([0.5, -np.inf, 2.0, -3.0])
    (out, lse), pullback = target.vjp(
        q, k, v, sinks=sinks, wrt=("sinks",), kv_lengths=0, return_lse=True
    )
    *rest, dsinks = pullback(np.ones_like(out), np.ones_like(lse))
    np.testing.assert_array_equal(dsinks, [140, 0, 140, 140])  # 2 entries of the batch, 70 queries
    for found in rest:
        np.testing.assert_array_equal(found, 0)


def test_a_sink_of_inf_takes_all(target):
    """Its weight is 1, whatever the scores are, so it has the whole gradient of the lse."""
    q, k, v = SHAPE.arrays()
    sinks = np.array([0.5, np.inf, 2.0, -3.0])
    (out, lse), pullback = target.vjp(
        q, k, v, sinks=sinks, wrt=("sinks",), causal=True, return_lse=True
    )
    dq, dk, dv, dsinks = pullback(np.ones_like(out), np.ones_like(lse))
    assert dsinks[1] == 140 and not dq[:, 1].any()  # 2 entries of the batch, 70 queries
    assert all(np.isfinite(x).all() for x in (dq, dk, dv, dsinks))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_of_the_least_number(target, dtype):
    """Their lse has no digit left for the number of keys; their weights are those of a softmax."""
    q, k, v = SHAPE.arrays(dtype)
    q *= 0
    bias = np.zeros((70, 90), np.float64)
    bias[5:50] = np.finfo(np.float32 if dtype == "float16" else dtype).min
    results, pullback = target.vjp(q, k, v, bias=bias)
    grad = random_like(results)
    found = pullback(grad)
    # Equal scores again, by a bias that is nothing.
    wanted = exact_gradients(make_problem(q, k, v, gradients=True), grad)
    for got, want in zip(found, wanted, strict=True):
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(got.astype(float), want, rtol=4 * eps, atol=8 * eps)


def test_saturated_softcap(target):
    """Where tanh is 1 nothing flows back, and nothing is NaN."""
    q, k, v = SHAPE.arrays()
    dq, dk, _ = check_gradients(target, 1e4 * q, 1e4 * k, v, softcap=3.0)
    assert np.isfinite(dq).all() and np.isfinite(dk).all()


def test_vanishing_weights(target):
    """Scores so far apart that all but one weight is 0."""
    q, k, v = SHAPE.arrays()
    found = check_gradients(target, q, k, v, scale=300.0)
    assert all(np.isfinite(x).all() for x in found)
