"""Maps of the weights (contract, section 3), each backend that makes them on every option."""

import re

import numpy as np
import pytest
from helpers.oracles import same_bits
from helpers.problems import DTYPES, INTERVAL_OPTIONS, SCORE_OPTIONS, Shape, options
from helpers.weight_maps import call, check_maps, check_top, problem_of

import fastattn
from fastattn import reference

SHAPE = Shape(2, 4, 70, 90, 64, kv_heads=2)
EVERYTHING = ("window", "kv_lengths", "spans", "mask", "-inf", *SCORE_OPTIONS)
OPTIONS = [(), *((n,) for n in (*INTERVAL_OPTIONS, *SCORE_OPTIONS, "mask", "-inf")), EVERYTHING]

# What a tile, its lanes and its strips meet: long and short sequences, groups as large as tiles.
SHAPES = {
    "many tiles": Shape(1, 2, 450, 1300, 8, kv_heads=1),
    "more queries": Shape(1, 2, 900, 70, 8),
    "few queries": Shape(2, 6, 2, 5000, 16, kv_heads=2),
    "one query": Shape(2, 2, 1, 700, 16),
    "one key": Shape(2, 2, 130, 1, 16),
    "a large group": Shape(1, 100, 7, 40, 8, kv_heads=1),
    "a larger group": Shape(1, 500, 3, 20, 8, kv_heads=1),
}


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_option(target, names, dtype):
    q, k, _ = SHAPE.arrays(dtype)
    chosen = options(names, SHAPE, 5)
    check_maps(target, q, k, (6, 20), **chosen)
    check_top(target, q, k, 8, **chosen)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("names", [(), ("causal",), ("mask",)], ids="+".join)
def test_each_shape(target, name, names):
    shape = SHAPES[name]
    q, k, _ = shape.arrays()
    chosen = options(names, shape)
    check_maps(target, q, k, (min(7, shape.n_queries), min(15, shape.n_keys)), **chosen)
    check_top(target, q, k, 3, **chosen)


@pytest.mark.parametrize("rows, columns", [(1, 1), (70, 90), (69, 90), (70, 89), (35, 7), (2, 64)])
def test_each_size_of_cell(target, rows, columns):
    q, k, _ = SHAPE.arrays()
    check_maps(target, q, k, (rows, columns), causal=True)


def test_a_cell_of_one_is_a_weight(target):
    q, k, v = SHAPE.arrays("float64")
    _, weights = fastattn.scaled_dot(q, k, v, return_weights=True, causal=True)
    found = call(target, "attention_map", q, k, (70, 90), causal=True)
    np.testing.assert_allclose(found, weights, atol=1e-15)


def test_an_int_is_both_sides(target):
    q, k, _ = SHAPE.arrays()
    found = call(target, "attention_map", q, k, 8)
    assert found.shape == (2, 4, 8, 8)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(target, dtype):
    """That of sums, as an lse has: one of halves would hold no sum beyond 65504."""
    q, k, _ = SHAPE.arrays(dtype)
    wanted = np.float64 if dtype == "float64" else np.float32
    assert call(target, "key_importance", q, k).dtype == wanted
    assert call(target, "attention_map", q, k, 2).dtype == wanted
    assert call(target, "top_keys", q, k, 2)[1].dtype == wanted


def test_two_dimensional_lists_of_integers(target):
    q, k = [[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1]]
    assert call(target, "key_importance", q, k).shape == (2,)
    assert call(target, "attention_map", q, k, (1, 2)).tolist() == [[0.5, 0.5]]
    indices, weights = call(target, "top_keys", q, k, 3)
    assert indices.tolist() == [[0, 1, -1], [1, 0, -1], [0, 1, -1]]
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-15)


@pytest.mark.parametrize("n_queries, n_keys", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_see(target, n_queries, n_keys):
    q, k = np.ones((2, n_queries, 4), np.float32), np.ones((2, n_keys, 4), np.float32)
    importance = call(target, "key_importance", q, k)
    assert importance.tolist() == np.zeros((2, n_keys)).tolist()
    cells = (min(1, n_queries), min(1, n_keys))
    assert call(target, "attention_map", q, k, cells).shape == (2, *cells)
    indices, weights = call(target, "top_keys", q, k, 3)
    assert indices.tolist() == np.full((2, n_queries, 3), -1).tolist()
    assert weights.tolist() == np.zeros((2, n_queries, 3)).tolist()


def test_no_batch(target):
    q, k = np.ones((0, 2, 5, 4)), np.ones((0, 2, 7, 4))
    assert call(target, "key_importance", q, k).shape == (0, 2, 7)
    assert call(target, "top_keys", q, k, 3)[0].shape == (0, 2, 5, 3)


@pytest.mark.parametrize("n", [1, 4, 100, 2000])
def test_ties_go_to_the_lower_index(target, n):
    """Equal keys have equal scores to the last bit, and there are three kinds of them."""
    rng = np.random.default_rng(0)
    k = np.array([[1, 0, 2, 0], [0, 2, -1, 1], [2, 1, 0, 0]], np.float32)
    k = k[rng.integers(0, 3, 1000)]
    q = rng.integers(1, 4, (40, 4)).astype(np.float32) * np.float32([1, 8, 64, 512])
    for chosen in ({}, {"causal": True}, {"mask": rng.random((40, 1000)) < 0.5}):
        wanted, _ = reference.run_top(problem_of(q, k, **chosen), n)
        indices, _ = call(target, "top_keys", q, k, n, **chosen)
        np.testing.assert_array_equal(indices, wanted[0])


@pytest.mark.parametrize("step", [1, -1])
def test_ranks_of_keys_in_order(target, step):
    """Each key in turn is the strongest so far, or the weakest."""
    k = np.linspace(-3, 3, 1500, dtype=np.float32)[::step, None]
    q = np.ones((20, 1), np.float32)
    indices, _ = call(target, "top_keys", q, k, 50)
    order = np.argsort(-k[:, 0])[:50]
    np.testing.assert_array_equal(indices, np.broadcast_to(order, (20, 50)))


def test_ranks_beyond_the_smallest_weight(target):
    """Scores are told apart where the weights are 0."""
    k = -np.arange(0.0, 9000, 100)[:, None]
    indices, weights = call(target, "top_keys", np.ones((1, 1)), k, 90)
    assert indices.tolist() == [list(range(90))]
    assert weights[0, 0] == 1
    assert not weights[0, 9:].any()


HIDING = {
    "mask": {"mask": np.arange(90) < 40},
    "kv_lengths": {"kv_lengths": 40},
    "bias": {"bias": np.where(np.arange(90) < 40, 0.0, -np.inf)},
    "causal": {"causal": True, "q_offset": 40 - 70},
}


@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", HIDING)
def test_what_is_unseen_does_no_harm(target, hidden, case):
    q, k, _ = SHAPE.arrays()
    clean, wild = k.copy(), k.copy()
    clean[..., 40:, :], wild[..., 40:, :] = 0, hidden
    for name, args in (("key_importance", ()), ("attention_map", (9,)), ("top_keys", (50,))):
        results = [call(target, name, q, x, *args, **HIDING[case]) for x in (clean, wild)]
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.isfinite(b).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_seen_does(target, value, where):
    """A NaN makes its rows NaN, in what they see; they have no strongest keys."""
    arrays = dict(zip("qk", SHAPE.arrays()[:2], strict=True))
    arrays[where][..., 50, :] = np.abs(arrays[where][..., 50, :])
    arrays[where][..., 50, 3] = value
    for chosen in ({}, {"causal": True}, {"mask": np.arange(90) % 7 > 0}):
        check_maps(target, **arrays, shape=(10, 9), **chosen)
        wanted = reference.run_top(problem_of(**arrays, **chosen), 5)
        got = call(target, "top_keys", *arrays.values(), 5, **chosen)
        np.testing.assert_array_equal(got[0] < 0, wanted[0] < 0)
        np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("size", ["min", "max"])
def test_a_bias_at_the_end_of_the_range(target, size):
    """Any finite bias is a number: rows of nothing else are rows of equal weights."""
    q, k, _ = SHAPE.arrays()
    bias = np.full((70, 90), getattr(np.finfo(np.float32), size), np.float32)
    np.testing.assert_allclose(call(target, "key_importance", q, k, bias=bias), 70 / 90, rtol=1e-5)
    _, weights = call(target, "top_keys", q, k, 3, bias=bias)
    np.testing.assert_allclose(weights, 1 / 90, rtol=1e-5)


# ------------------------------------------------------------------------------ the same bits


FUNCTIONS = {"key_importance": (), "attention_map": ((7, 30),), "top_keys": (6,)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [Shape(2, 4, 450, 700, 16, kv_heads=2), Shape(3, 1, 9, 5000, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # the sums are of float64
def test_same_bits(target, name, shape, dtype):
    """For any number of threads, any slice of the batch and of the heads (promise 4)."""
    if not target.bitwise:
        pytest.skip(f"promise 4 is made by cython and numba; {target.backend} leaves it to BLAS")
    q, k, _ = shape.arrays(dtype)

    def results(q, k, **more):
        found = call(target, name, q, k, *FUNCTIONS[name], causal=True, **more)
        return found if isinstance(found, tuple) else (found,)

    whole = results(q, k, threads=1)
    group = q.shape[1] // k.shape[1]
    for threads in (2, 3, 5):
        assert all(map(same_bits, results(q, k, threads=threads), whole))
    for part in (np.s_[:1], np.s_[1:]):
        assert all(map(same_bits, results(q[part], k[part]), (x[part] for x in whole)))
    last = results(q[:, -group:], k[:, -1:])
    assert all(map(same_bits, last, (x[:, -group:] for x in whole)))


# ------------------------------------------------------------------------------------ errors


Q, K, _ = SHAPE.arrays()
ERRORS = [
    ("attention_map", (71, 4), {}, ValueError, "shape", ["1..70 rows", "got 71"]),
    ("attention_map", (4, 91), {}, ValueError, "shape", ["1..90 columns", "got 91"]),
    ("attention_map", 71, {}, ValueError, "shape", ["got 71", "70"]),
    ("attention_map", 0, {}, ValueError, "shape", ["rows", "got 0"]),
    ("attention_map", (4, -1), {}, ValueError, "shape", ["columns", "got -1"]),
    ("attention_map", (4, 4, 4), {}, ValueError, "shape", ["(4, 4, 4)", "(rows, columns)"]),
    ("attention_map", 4.0, {}, TypeError, "shape", ["float64", "integers"]),
    ("attention_map", "big", {}, TypeError, "shape", ["integers"]),
    ("top_keys", 0, {}, ValueError, "n", ["at least 1", "got 0"]),
    ("top_keys", 1.5, {}, TypeError, "n", ["float"]),
    ("top_keys", 3, {"out": 1}, TypeError, "out", ["top_keys", "softcap"]),
    ("top_keys", 3, {"return_weights": True}, TypeError, "return_weights", ["top_keys"]),
    ("attention_map", 3, {"return_lse": True}, TypeError, "return_lse", ["attention_map"]),
    ("attention_map", 3, {"gradients": True}, TypeError, "gradients", ["attention_map"]),
    ("attention_map", 3, {"causal": 1}, TypeError, "causal", ["int", "bool"]),
    ("attention_map", 3, {"bias": np.ones((3, 3))}, ValueError, "bias", ["(3, 3)"]),
    ("top_keys", 3, {"backend": "numba"}, ValueError, "backend", ["numba", "no maps", "numpy"]),
    ("top_keys", 3, {"backend": "cuda"}, ValueError, "backend", ["cuda", "no maps"]),
]


@pytest.mark.parametrize("name, argument, given, error, start, words", ERRORS)
def test_errors(name, argument, given, error, start, words):
    with pytest.raises(error, match=rf"^{start}: ") as caught:
        getattr(fastattn, name)(Q, K, argument, **given)
    for word in words:
        assert re.search(re.escape(word), str(caught.value)), str(caught.value)


@pytest.mark.parametrize("q, k, start", [(1, K, "q"), (Q, 1, "k"), (Q, K[..., :3], "k")])
def test_errors_of_arrays(q, k, start):
    with pytest.raises(ValueError, match=rf"^{start}: "):
        fastattn.key_importance(q, k)
