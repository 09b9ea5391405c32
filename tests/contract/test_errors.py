"""Errors and ranges: TypeError or ValueError before any work (contract, section 1).

A message begins with the argument's name and a colon, then what was expected and what it got.
"""

import re

import numpy as np
import pytest
from helpers.problems import Shape

import fastattn
from fastattn import dispatch

SHAPE = Shape(2, 4, 5, 7, 8, kv_heads=2)
Q, K, V = SHAPE.arrays()


def array(*shape):
    return np.ones(shape, np.float32)


# (arguments changed, the exception, the argument at the start, words the message holds)
TABLE = [
    # shapes
    ({"k": array(2, 2, 7, 6)}, ValueError, "k", ["head_dim 8", "got 6"]),
    ({"v": array(2, 2, 6, 8)}, ValueError, "v", ["6", "7"]),
    ({"q": array(8)}, ValueError, "q", ["1", "2"]),
    ({"k": array(8)}, ValueError, "k", ["1", "2"]),
    ({"v": np.float32(1)}, ValueError, "v", ["0", "2"]),
    ({"q": array(2, 4, 5, 0), "k": array(2, 2, 7, 0)}, ValueError, "q", ["0", "1"]),
    ({"k": array(3, 2, 7, 8)}, ValueError, "k", ["3", "2"]),
    ({"v": array(3, 2, 7, 8)}, ValueError, "v", ["3", "2"]),
    ({"k": array(2, 3, 7, 8), "v": array(2, 3, 7, 8)}, ValueError, "k", ["3", "4"]),
    ({"v": array(2, 4, 7, 8)}, ValueError, "v", ["4", "2"]),
    ({"q": array(2, 2, 5, 8), "k": array(2, 4, 7, 8), "v": array(2, 4, 7, 8)}, ValueError, "k", []),
    # what is no array of numbers
    ({"q": [[1.0, 2.0], [3.0]]}, (TypeError, ValueError), "q", []),
    ({"k": "keys"}, (TypeError, ValueError), "k", []),
    ({"v": None}, (TypeError, ValueError), "v", []),
    ({"q": Q.astype(complex)}, TypeError, "q", ["complex128", "float32"]),
    # the score
    ({"scale": "1"}, TypeError, "scale", []),
    ({"scale": 1j}, TypeError, "scale", ["complex"]),
    ({"scale": array(3)}, ValueError, "scale", ["(4,)", "one per query head", "(3,)"]),
    ({"scale": array(4, 1)}, ValueError, "scale", ["(4,)", "(4, 1)"]),
    ({"scale": np.ones(4, complex)}, TypeError, "scale", ["complex"]),
    ({"softcap": 0}, ValueError, "softcap", ["0"]),
    ({"softcap": -1.5}, ValueError, "softcap", ["-1.5", "0"]),
    ({"softcap": float("nan")}, ValueError, "softcap", ["nan"]),
    ({"softcap": "1"}, TypeError, "softcap", []),
    ({"softcap": array(4)}, TypeError, "softcap", ["a real number", "(4,)"]),
    ({"bias": np.ones((5, 7), bool)}, TypeError, "bias", ["bool", "mask="]),
    ({"bias": np.ones((5, 7), complex)}, TypeError, "bias", ["complex"]),
    ({"bias": np.full((5, 7), None)}, TypeError, "bias", ["object"]),
    ({"bias": array(5, 6)}, ValueError, "bias", ["(5, 6)", "(2, 4, 5, 7)"]),
    ({"bias": array(3, 2, 4, 5, 7)}, ValueError, "bias", ["(3, 2, 4, 5, 7)"]),
    ({"relative_bias": array(4, 6)}, ValueError, "relative_bias", ["(4, 2 * R + 1)", "(4, 6)"]),
    ({"relative_bias": array(2, 5)}, ValueError, "relative_bias", ["(4, 2 * R + 1)", "(2, 5)"]),
    ({"relative_bias": array(4, 0)}, ValueError, "relative_bias", ["(4, 0)"]),
    ({"relative_bias": array(5)}, ValueError, "relative_bias", ["(5,)"]),
    ({"relative_bias": array(2, 4, 5)}, ValueError, "relative_bias", ["(2, 4, 5)"]),
    ({"relative_bias": np.ones((4, 5), complex)}, TypeError, "relative_bias", ["complex"]),
    ({"relative_bias": np.ones((4, 5), bool)}, TypeError, "relative_bias", ["bool"]),
    ({"alibi": array(2)}, ValueError, "alibi", ["(2,)", "4"]),
    ({"alibi": 1.0}, ValueError, "alibi", ["4"]),
    ({"alibi": np.ones(4, complex)}, TypeError, "alibi", ["complex"]),
    ({"sinks": array(4, 1)}, ValueError, "sinks", ["(4, 1)"]),
    ({"sinks": "abcd"}, (TypeError, ValueError), "sinks", []),
    # which keys are seen
    ({"mask": array(5, 7)}, TypeError, "mask", ["expected bool", "got float32", "bias="]),
    ({"mask": np.ones((5, 7), np.uint8)}, TypeError, "mask", ["uint8", "bool"]),
    ({"mask": np.ones((5, 8), bool)}, ValueError, "mask", ["(5, 8)", "(2, 4, 5, 7)"]),
    ({"window": -1}, ValueError, "window", ["-1", "0"]),
    ({"window": (0, -2)}, ValueError, "window", ["-2"]),
    ({"window": (-2, None)}, ValueError, "window", ["-2"]),
    ({"window": (1, 2, 3)}, (TypeError, ValueError), "window", ["3"]),
    ({"window": 1.5}, TypeError, "window", ["float", "integer"]),
    ({"window": (1.0, None)}, TypeError, "window", ["float"]),
    ({"window": (np.ones(4, int), 0)}, TypeError, "window", ["an integer", "ndarray"]),
    ({"window": "all"}, TypeError, "window", ["str"]),
    ({"q_offset": 1.5}, TypeError, "q_offset", ["float", "integer"]),
    ({"q_offset": [1, 2, 3]}, ValueError, "q_offset", ["(3,)", "(2,)"]),
    ({"q_offset": [[1], [2], [3]]}, ValueError, "q_offset", ["(3, 1)"]),
    ({"kv_lengths": -1}, ValueError, "kv_lengths", ["-1", "0..7"]),
    ({"kv_lengths": [1, 8]}, ValueError, "kv_lengths", ["8", "0..7"]),
    ({"kv_lengths": 2**70}, ValueError, "kv_lengths", ["0..7"]),
    ({"kv_lengths": [1, 2, 3]}, ValueError, "kv_lengths", ["(3,)", "(2,)"]),
    ({"kv_lengths": [1.0, 2.0]}, TypeError, "kv_lengths", ["float64", "integers"]),
    ({"spans": 3}, (TypeError, ValueError), "spans", ["int", "(start, stop)"]),
    ({"spans": (1, 2, 3)}, (TypeError, ValueError), "spans", ["(start, stop)"]),
    ({"spans": (0.0, 3.0)}, TypeError, "spans", ["float64"]),
    ({"spans": (0, np.arange(6))}, ValueError, "spans", ["(6,)", "(2, 4, 5)"]),
    # no safe default of q_offset
    ({"kv_lengths": 5, "causal": True}, ValueError, "q_offset", ["0", "kv_lengths - "]),
    ({"kv_lengths": 5, "window": 2}, ValueError, "q_offset", ["0", "kv_lengths - "]),
    ({"kv_lengths": 5, "window": (2, None)}, ValueError, "q_offset", ["0", "kv_lengths - "]),
    ({"kv_lengths": 5, "alibi": array(4)}, ValueError, "q_offset", ["0", "kv_lengths - "]),
    ({"kv_lengths": 5, "relative_bias": array(4, 3)}, ValueError, "q_offset", ["relative_bias"]),
    # dropout
    ({"dropout": 0.1}, TypeError, "dropout", ["(rate, seed)", "float"]),
    ({"dropout": (0.1,)}, ValueError, "dropout", ["(rate, seed)", "1"]),
    ({"dropout": (0.1, 1, 2)}, ValueError, "dropout", ["(rate, seed)", "3"]),
    ({"dropout": ("0.1", 1)}, TypeError, "dropout", ["number", "<U3"]),
    ({"dropout": (1.0, 1)}, ValueError, "dropout", ["below 1", "1.0"]),
    ({"dropout": (-0.1, 1)}, ValueError, "dropout", ["at least 0", "-0.1"]),
    ({"dropout": (float("nan"), 1)}, ValueError, "dropout", ["nan"]),
    ({"dropout": (0.1, 0.5)}, TypeError, "dropout", ["integer", "float"]),
    ({"dropout": (0.1, -1)}, ValueError, "dropout", ["0..2**64 - 1", "-1"]),
    ({"dropout": (0.0, 2**64)}, ValueError, "dropout", [str(2**64)]),
    ({"dropout_offset": 3}, TypeError, "dropout_offset", ["(b, h, i, j)", "int"]),
    ({"dropout_offset": (0, 0, 0)}, ValueError, "dropout_offset", ["(b, h, i, j)", "3"]),
    ({"dropout_offset": (0, 0, 0, 1.5)}, TypeError, "dropout_offset", ["integer", "float"]),
    ({"dropout_offset": (0, -1, 0, 0)}, ValueError, "dropout_offset", ["-1"]),
    ({"dropout_offset": (0, 0, 0, 2**63)}, ValueError, "dropout_offset", [str(2**63)]),
    # how
    ({"causal": "yes"}, TypeError, "causal", ["str", "bool"]),
    ({"return_lse": "yes"}, TypeError, "return_lse", ["str", "bool"]),
    ({"return_max": 1}, TypeError, "return_max", ["int", "bool"]),
    ({"return_weights": "yes"}, TypeError, "return_weights", ["str", "bool"]),
    ({"threads": 0}, ValueError, "threads", ["0", "1"]),
    ({"threads": -3}, ValueError, "threads", ["-3", "1"]),
    ({"threads": 1.5}, TypeError, "threads", ["float"]),
    ({"threads": "two"}, TypeError, "threads", ["str"]),
    ({"precision": "float8"}, ValueError, "precision", ["float8", "bfloat16"]),
    ({"precision": np.array(["bfloat16", "x"])}, ValueError, "precision", ["array", "bfloat16"]),
    ({"out": array(2, 4, 5, 9)}, ValueError, "out", ["(2, 4, 5, 9)", "(2, 4, 5, 8)"]),
    ({"out": np.ones((2, 4, 5, 8))}, ValueError, "out", ["float64", "float32"]),
]


def _id(row):
    changed, *_ = row
    return "-".join(f"{n}={getattr(x, 'shape', x)}" for n, x in changed.items()).replace(" ", "")


@pytest.fixture
def no_backend(monkeypatch):
    """None is asked, let alone run; so one test stands for all of them."""

    def asked(*arguments):
        raise AssertionError("a backend is asked before the arguments are checked")

    for backend in (*dispatch.BACKENDS, *dispatch.NAMED_ONLY):
        monkeypatch.setattr(backend, "unsupported", asked)
        monkeypatch.setattr(backend, "run", asked)


@pytest.mark.parametrize("changed, error, name, words", TABLE, ids=map(_id, TABLE))
def test_table(no_backend, changed, error, name, words):
    """An error leaves ``out`` alone."""
    out = np.full((2, 4, 5, 8), 7, np.float32)
    arguments = {"q": Q, "k": K, "v": V, "out": out, **changed}
    with pytest.raises(error) as caught:
        fastattn.scaled_dot(**arguments)
    message = str(caught.value)
    assert re.match(rf"{name}: expected .*\bgot ", message)
    for word in words:
        assert word in message
    np.testing.assert_array_equal(out, 7)


def test_words_of_the_contract(no_backend):
    """The two messages that the contract spells out."""
    attend = fastattn.scaled_dot
    with pytest.raises(ValueError, match=r"^k: expected head_dim 64 as in q, got 32$"):
        attend(array(5, 64), array(7, 32), array(7, 8))
    wanted = "mask: expected bool, got float32; scores to add go into bias="
    with pytest.raises(TypeError, match=f"^{re.escape(wanted)}$"):
        attend(Q, K, V, mask=array(5, 7))
    with pytest.raises(TypeError, match=r"^mask: expected bool, got int64; .*mask\.astype\(bool\)"):
        attend(Q, K, V, mask=array(5, 7).astype(int))


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        fastattn.scaled_dot(Q, K, V, 0.5)


ALLOWED = [
    {"window": 0},
    {"window": (0, None)},
    {"kv_lengths": 0},
    {"kv_lengths": 7},
    {"kv_lengths": [0, 7]},
    {"kv_lengths": np.array([1, 2], np.uint8)},
    {"kv_lengths": 5, "window": (None, None)},
    {"kv_lengths": 5, "causal": True, "q_offset": 0},
    {"q_offset": -(10**30), "causal": True},
    {"q_offset": 10**30, "causal": True},
    {"q_offset": [10**30, -(10**30)], "causal": True},
    {"q_offset": [2**63, -1], "causal": True},
    {"q_offset": [-(2**63), 2**63 - 1], "window": 3},
    {"q_offset": np.array([2**64 - 1, 0], np.uint64), "causal": True},
    {"spans": (-(10**30), 10**30)},
    {"spans": (-5, 100)},
    {"spans": ([2**63, -5, 0, 1, 2], 100)},
    {"threads": 1},
    {"threads": np.int64(3)},
    {"threads": 1000},
    {"threads": 2**70},
    {"causal": np.True_},
    {"dropout": (0.5, 2**64 - 1)},
    {"dropout": [np.float32(0.5), np.uint64(2**63)]},
    {"dropout": (0, 0)},
    {"dropout": (np.nextafter(1, 0), 0)},
    {"dropout": (0.1, 1), "dropout_offset": (2**63 - 1,) * 4},
    {"dropout": (0.1, 1), "dropout_offset": np.arange(4)},
    {"dropout_offset": (1, 2, 3, 4)},
]


@pytest.mark.one_instruction_set  # they are drawn in where arguments are checked
@pytest.mark.parametrize("options", ALLOWED, ids=str)
def test_ends_of_the_ranges(target, options):
    """Spans are clipped to 0..n_keys, ``q_offset`` may be anything."""
    assert target.attend(Q, K, V, **options).shape == (2, 4, 5, 8)
