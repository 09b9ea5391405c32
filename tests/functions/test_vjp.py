"""`vjp`, its table of rules, and what both halves refuse (contract, section 3)."""

import numpy as np
import pytest
from helpers.gradients import random_like
from helpers.oracles import same_bits
from helpers.problems import Shape

import fastattn
from fastattn.core.problem import make_problem
from fastattn.dispatch import BACKENDS, unsupported_backward

SHAPE = Shape(2, 4, 5, 7, 8, kv_heads=2, value_dim=6)
Q, K, V = SHAPE.arrays()
OUT, LSE = fastattn.scaled_dot(Q, K, V, return_lse=True)


@pytest.mark.parametrize("more", [(), ("return_lse",), ("return_weights",),
                                  ("return_lse", "return_weights")], ids="+".join)  # fmt: skip
def test_out_is_what_the_function_returns(target, more):
    wanted = target.attend(Q, K, V, causal=True, **dict.fromkeys(more, True))
    out, _ = target.vjp(Q, K, V, causal=True, **dict.fromkeys(more, True))
    assert isinstance(out, tuple) == bool(more)
    for got, want in zip(*(x if more else (x,) for x in (out, wanted)), strict=True):
        assert same_bits(got, want)


def test_both_halves_agree(target):
    bias = random_like(np.zeros((5, 7)))
    (out, lse), pullback = target.vjp(Q, K, V, bias=bias, wrt=("bias",), return_lse=True)
    grads = random_like(out), random_like(lse)
    found = fastattn.scaled_dot_backward(
        grads[0], Q, K, V, out, lse, grad_lse=grads[1], wrt=("bias",), bias=bias,
        backend=target.backend,
    )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(pullback(*grads), found, strict=True))


def test_gradients_come_in_the_order_of_wrt(target):
    options = {"bias": np.zeros((5, 7)), "sinks": np.zeros(4), "alibi": np.zeros(4)}
    out, pullback = target.vjp(Q, K, V, wrt=("sinks", "bias", "alibi"), **options)
    found = pullback(out)
    assert isinstance(found, tuple)
    assert [x.shape for x in found[3:]] == [(4,), (5, 7), (4,)]


@pytest.mark.parametrize("function", [np.sum, len, "scaled_dot", [], None])
def test_unknown_function(function):
    with pytest.raises(TypeError, match=r"^function: expected one of .*scaled_dot.*, got "):
        fastattn.vjp(function, Q, K, V)


class Twice:
    """A function with a parameter, as a layer is."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return 2 * self.factor * x


def test_rules_are_registered_for_functions_and_classes(monkeypatch):
    import importlib

    module = importlib.import_module("fastattn.vjp")
    monkeypatch.setattr(module, "_RULES", dict(module._RULES))

    def triple(x):
        return 3 * x

    @module.differentiates(triple, 1, 1)
    def _triple(x, *, wrt):
        return triple(x), lambda grad_out: (3 * grad_out,)

    @module.differentiates(Twice, 1, 1)
    def _twice(layer, x, *, wrt):
        rest = {"factor": 2 * x}
        return layer(x), lambda grad: (2 * layer.factor * grad, *(grad * rest[n] for n in wrt))

    assert fastattn.vjp(triple, 5.0)[1](1.0) == (3.0,)
    out, pullback = fastattn.vjp(Twice(7.0), 5.0, wrt=("factor",))
    assert (out, pullback(1.0)) == (70.0, (14.0, 10.0))
    with pytest.raises(TypeError, match=r"one of scaled_dot, .*triple, Twice, got "):
        fastattn.vjp(len, 5.0)


# ---------------------------------------------------------------------------------------- errors


def backward(**changes):
    given = {"grad_out": OUT, "q": Q, "k": K, "v": V, "out": OUT, "lse": LSE, **changes}
    return fastattn.scaled_dot_backward(**given)


@pytest.mark.parametrize("changes, error, message", [
    ({"grad_out": OUT[:, :1]}, ValueError,
     r"grad_out: expected shape \(2, 4, 5, 6\), got \(2, 1, 5, 6\)"),
    ({"grad_out": OUT[..., None]}, ValueError, "grad_out: expected shape"),
    ({"grad_out": 1.0}, ValueError, r"grad_out: expected shape .*, got \(\)"),
    ({"grad_out": OUT.astype(complex)}, TypeError, "grad_out: expected .*, got complex128"),
    ({"grad_out": np.ma.masked_array(OUT)}, TypeError, "grad_out: expected .*, got a masked"),
    ({"out": OUT[..., :5]}, ValueError, r"out: expected shape \(2, 4, 5, 6\), got \(2, 4, 5, 5\)"),
    ({"lse": OUT}, ValueError, r"lse: expected shape \(2, 4, 5\), got \(2, 4, 5, 6\)"),
    ({"lse": LSE.astype(str)}, TypeError, "lse: expected .*, got <U32"),
    ({"grad_lse": LSE[0]}, ValueError, r"grad_lse: expected shape \(2, 4, 5\), got \(4, 5\)"),
    ({"k": K[..., :3]}, ValueError, "k: expected head_dim 8 as in q, got 3"),
    ({"wrt": ("causal",)}, ValueError, "wrt: expected some of 'scale',.* got 'causal'"),
    ({"wrt": ("scale",)}, ValueError, "wrt: expected .*, got 'scale' without scale="),
    ({"wrt": ("bias",)}, ValueError, "wrt: expected .*, got 'bias' without bias="),
    ({"wrt": "bias", "bias": np.zeros(7)}, TypeError, "wrt: expected a tuple of names, got str"),
    ({"wrt": 1}, TypeError, "wrt: expected a tuple of names, got int"),
    ({"wrt": None}, TypeError, "wrt: expected a tuple of names, got NoneType"),
    ({"wrt": (["bias"],)}, TypeError, r"wrt: expected a tuple of names, got \['bias'\]"),
    ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
    ({"backend": "nobody"}, ValueError, "backend: expected one of .*, got 'nobody'"),
], ids=lambda x: None if not isinstance(x, dict) else "-".join(x))  # fmt: skip
def test_errors(changes, error, message):
    with pytest.raises(error, match="^" + message):
        backward(**changes)


X = np.ones((2, 3, 4))


@pytest.mark.parametrize("function, arrays, options, number", [
    (fastattn.scaled_dot, (X,) * 2, {}, "3"),
    (fastattn.dot, (X,) * 4, {}, "3"),
    (fastattn.pool, (X,), {}, "2"),
    (fastattn.varlen, (X,) * 2, {"lengths": [2]}, "3 to 5"),
    (fastattn.flex, (X,) * 6, {}, "3 to 5"),
    (fastattn.MultiHeadAttention(4, 2), (), {}, "1 to 3"),
])  # fmt: skip
def test_number_of_arrays(function, arrays, options, number):
    message = f"^arrays: expected {number}, got {len(arrays)}"
    with pytest.raises(ValueError, match=message):
        fastattn.vjp(function, *arrays, **options)


def test_a_class_is_no_function():
    with pytest.raises(
        TypeError, match=r"^function: expected .*, got the class MultiHeadAttention"
    ):
        fastattn.vjp(fastattn.MultiHeadAttention, X)


@pytest.mark.parametrize("function, arrays, options", [
    (fastattn.scaled_dot, (X, X, X), {}),
    (fastattn.pool, (X, np.ones(4)), {}),
    (fastattn.pool, (X, np.ones((4, 3))), {}),
    (fastattn.varlen, (X, X, X), {"lengths": [2]}),
    (fastattn.MultiHeadAttention(4, 2), (X,), {}),
])  # fmt: skip
def test_errors_of_pullbacks(function, arrays, options):
    out, pullback = fastattn.vjp(function, *arrays, **options)
    for wrong in (None, 1.0, "a", [[1], [1, 2]], out + 0j, out[..., :2], np.ma.masked_array(out)):
        with pytest.raises((TypeError, ValueError), match=r"^grad_out: expected "):
            pullback(wrong)
    for wrong in (1.0, "a", np.ones(7), np.ma.masked_array(out[..., 0])):
        with pytest.raises((TypeError, ValueError), match=r"^grad_lse: expected "):
            pullback(out, wrong)


@pytest.mark.parametrize("options, error, message", [
    ({"wrt": ("sinks",)}, ValueError, "wrt: expected .*, got 'sinks' without sinks="),
    ({"out": np.empty_like(OUT)}, ValueError, "out: expected None, got an array"),
    ({"bias": np.zeros(3)}, ValueError, "bias: expected a shape"),
])  # fmt: skip
def test_errors_come_before_any_work(monkeypatch, options, error, message):
    for b in BACKENDS:
        monkeypatch.setattr(b, "run", lambda problem: pytest.fail("it ran"))
    with pytest.raises(error, match="^" + message):
        fastattn.vjp(fastattn.scaled_dot, Q, K, V, **options)


def test_options_of_results_are_none_of_the_backward_pass():
    with pytest.raises(TypeError, match="return_weights"):
        backward(return_weights=True)


@pytest.mark.parametrize("origin", ["backend", "FASTATTN_BACKEND"])
def test_a_named_backend_without_gradients_says_so(monkeypatch, origin):
    """Before the forward pass; without a name it is passed over."""
    first, last = BACKENDS[0], BACKENDS[-1]
    monkeypatch.delattr(first, "run_backward", raising=False)
    monkeypatch.setattr(first, "run", lambda problem: pytest.fail("it ran"))
    named = {"backend": first.name} if origin == "backend" else {}
    if not named:
        monkeypatch.setenv(origin, first.name)
    message = f"^{origin}: {first.name!r} given, which cannot serve this call: it computes no grad"
    with pytest.raises(ValueError, match=message) as caught:
        fastattn.vjp(fastattn.scaled_dot, Q, K, V, **named)
    assert last.name in str(caught.value).split("these can: ")[1]
    monkeypatch.delenv("FASTATTN_BACKEND", raising=False)
    assert (
        unsupported_backward(first, make_problem(Q, K, V, gradients=True))
        == "it computes no gradients"
    )
    assert len(backward()) == 3


def test_grad_out_is_rounded_to_the_dtype_of_out():
    found = backward(grad_out=OUT.astype(np.float64) * 3)
    wanted = backward(grad_out=OUT * np.float32(3))
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
