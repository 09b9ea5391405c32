"""Calls of one layout again and again: from the third on they run a plan, and nobody can tell."""

import threading

import numpy as np
import pytest
from helpers.oracles import same_bits
from helpers.problems import Shape
from helpers.strategies import few, shapes
from hypothesis import given
from hypothesis import strategies as st

import fastattn
from fastattn import plans

pytestmark = pytest.mark.skipif(
    "cython" not in fastattn.available_backends(), reason="only compiled kernels have plans"
)

OPTIONS = {
    "causal": True,
    "window": (3, None),
    "q_offset": 2,
    "scale": 0.3,
    "softcap": 5,
    "kv_lengths": 4,
    "dropout": (0.25, 7),
    "return_lse": True,
    "return_max": True,
    "threads": 1,
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(plans, "plans", {})
    for module in ("attention", "backward", "cache_attention"):
        monkeypatch.setattr(f"fastattn.{module}.plans", plans.plans)


def each(results):
    return results if isinstance(results, tuple) else (results,)


def runs_plan() -> bool:
    return any(plans.plans.values())


@given(
    shape=shapes(), names=st.lists(st.sampled_from(sorted(OPTIONS)), unique=True), data=st.data()
)
@few
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_repeated_calls_return_the_same_bits(target, dtype, shape, names, data):
    q, k, v = shape.arrays(dtype)
    if data.draw(st.booleans(), "sequence first"):
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
    if data.draw(st.booleans(), "one head"):
        q, k, v = q[0, 0], k[0, 0], v[0, 0]
    options = {name: OPTIONS[name] for name in names}
    if "kv_lengths" in options:
        options |= {"q_offset": 1, "kv_lengths": min(4, k.shape[-2])}
    first = each(fastattn.scaled_dot(q, k, v, **options))
    for _ in range(3):
        again = each(fastattn.scaled_dot(q, k, v, **options))
        for x, y in zip(first, again, strict=True):
            assert same_bits(x, y)
            assert (x.dtype, x.strides) == (y.dtype, y.strides)


@given(shape=shapes(), with_lse=st.booleans(), causal=st.booleans(), one_head=st.booleans())
@few
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_repeated_gradients_have_the_same_bits(target, dtype, shape, with_lse, causal, one_head):
    q, k, v = shape.arrays(dtype)
    if one_head:
        q, k, v = q[0, 0], k[0, 0].copy("F"), v[0, 0]
    out, lse = fastattn.scaled_dot(q, k, v, causal=causal, return_lse=True)
    options = {"causal": causal, "grad_lse": lse[..., ::-1] if with_lse else None}
    arrays = np.cos(out), q, k, v, out, lse
    first = fastattn.scaled_dot_backward(*arrays, **options)
    for _ in range(3):
        again = fastattn.scaled_dot_backward(*arrays, **options)
        for x, y in zip(first, again, strict=True):
            assert same_bits(x, y)
            assert (x.dtype, x.strides) == (y.dtype, y.strides)


# Options of several numbers, which are arrays to the kernels.
NUMBERS = {
    "scale": (0.1, 0.7, 0.2, 0.3),
    "relative_bias": ((0.5, -1.0, 2.0),) * 2 + ((1.0, 0.0, -1.0),) * 2,
    "alibi": (0.1, 0.2, 0.3, 0.4),
    "sinks": (0.0, 1.0, 2.0, 3.0),
    "bias": tuple(map(float, range(9))),
    "mask": (True, False, True) * 3,
    "spans": (1, 7),
    "kv_lengths": (3, 8),
    "dropout": (0.25, 7),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_options_of_several_numbers_are_kept(name):
    q, k, v = arrays()
    options = {name: NUMBERS[name]} | ({"q_offset": (1, 2)} if name == "kv_lengths" else {})
    out, lse = fastattn.scaled_dot(q, k, v, return_lse=True, **options)
    given = np.cos(out), q, k, v, out, lse
    first = fastattn.scaled_dot_backward(*given, **options)
    for _ in range(3):
        again = fastattn.scaled_dot(q, k, v, return_lse=True, **options)
        assert all(map(same_bits, again, (out, lse)))
        assert all(map(same_bits, fastattn.scaled_dot_backward(*given, **options), first))
    assert runs_plan()


def arrays(dtype="float32", seed=0):
    return Shape(2, 4, 5, 9, 8, kv_heads=2).arrays(dtype, seed)


def test_the_third_call_of_a_layout_runs_a_plan():
    q, k, v = arrays()
    fastattn.scaled_dot(q, k, v)
    assert not runs_plan()
    fastattn.scaled_dot(q, k, v)
    assert runs_plan()


def test_a_backend_that_is_named_makes_its_own_plans():
    q, k, v = arrays()
    for _ in range(3):
        out, lse = fastattn.scaled_dot(q, k, v, return_lse=True, backend="numpy")
        fastattn.scaled_dot_backward(out, q, k, v, out, lse, backend="numpy")
    cache = fastattn.KVCache(2, 2, 8)
    cache.append(k, v)
    for _ in range(3):
        cache.attend(q, backend="numpy")
    assert len(plans.plans) == 3
    assert not runs_plan()


def test_a_plan_is_given_other_arrays():
    q, k, v = arrays()
    for _ in range(3):
        fastattn.scaled_dot(q, k, v, causal=True)
    others = arrays(seed=1)
    got = fastattn.scaled_dot(*others, causal=True)
    assert same_bits(got, fastattn.scaled_dot(*others, causal=True, backend="cython"))


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_another_option_is_another_call(name):
    q, k, v = arrays()
    more = {"q_offset": 1} if name == "kv_lengths" else {}
    for _ in range(3):
        fastattn.scaled_dot(q, k, v)
    got = each(fastattn.scaled_dot(q, k, v, **{name: OPTIONS[name]} | more))
    plans.plans.clear()
    expected = each(fastattn.scaled_dot(q, k, v, **{name: OPTIONS[name]} | more))
    assert len(got) == len(expected)
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize(
    "name, value", [("bias", np.zeros(9, "f4")), ("alibi", np.ones(4)), ("kv_lengths", np.array(9))]
)
def test_an_array_may_change_between_calls(name, value):
    q, k, v = arrays()
    options = {"q_offset": 0} if name == "kv_lengths" else {}
    for _ in range(4):
        before = fastattn.scaled_dot(q, k, v, **{name: value}, **options)
    value[...] = np.arange(1, value.size + 1).reshape(value.shape)
    after = fastattn.scaled_dot(q, k, v, **{name: value}, **options)
    assert not np.array_equal(before, after)
    assert same_bits(
        after, fastattn.scaled_dot(q, k, v, **{name: value}, **options, backend="cython")
    )


def test_wrong_arguments_are_errors_all_the_same():
    q, k, v = arrays()
    for _ in range(3):
        fastattn.scaled_dot(q, k, v, causal=True)
    with pytest.raises(TypeError, match="causal: expected bool"):
        fastattn.scaled_dot(q, k, v, causal=1)
    with pytest.raises(ValueError, match="k: expected head_dim"):
        fastattn.scaled_dot(q[..., :-1], k, v, causal=True)
    with pytest.raises(TypeError, match="q: expected a plain array"):
        fastattn.scaled_dot(np.ma.masked_array(q), k, v, causal=True)


def test_the_environment_may_change_between_calls(monkeypatch):
    q, k, v = arrays()
    for _ in range(3):
        fastattn.scaled_dot(q, k, v)
    monkeypatch.setenv("FASTATTN_BACKEND", "no such")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND: expected one of"):
        fastattn.scaled_dot(q, k, v)
    monkeypatch.delenv("FASTATTN_BACKEND")
    monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", "no such")
    with pytest.raises(ValueError, match="FASTATTN_DISABLE_CPU_FEATURES: expected some of"):
        fastattn.scaled_dot(q, k, v)


def test_threads_may_run_one_plan_at_once():
    q, k, v = arrays()
    for _ in range(2):
        fastattn.scaled_dot(q, k, v)
    inputs = [arrays(seed=seed) for seed in range(4)]
    expected = [fastattn.scaled_dot(*x, threads=1) for x in inputs]
    wrong = []

    def work(x, y):
        wrong.extend(not same_bits(fastattn.scaled_dot(*x), y) for _ in range(500))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)


def test_no_plan_is_made_where_results_are_large():
    """To make it takes results like the call's."""
    q = np.ones((4, 1100, 64), "f4")
    for _ in range(2):
        out, lse = fastattn.scaled_dot(q, q[:1], q[:1], return_lse=True)
        fastattn.scaled_dot_backward(out, q, q[:1], q[:1], out, lse)
    assert not runs_plan()


def test_many_layouts_keep_few_plans():
    v = np.ones((plans.MOST + 40, 1, 4), "f4")
    for n in range(1, len(v)):
        fastattn.scaled_dot(v[:1], v[:1].repeat(n, -2), v[:1].repeat(n, -2))
    assert len(plans.plans) <= plans.MOST
