"""`KVCache` on pages: they are shared, copied on write and given back (contract, section 3)."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from helpers.oracles import same_bits
from helpers.problems import float_type

from fastattn import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 24
RNG = np.random.default_rng(0)


def draw(batch, n, dtype="float32"):
    """``(q, k, v)`` of `n` new tokens of each sequence."""
    return tuple(
        RNG.standard_normal((batch, heads, n, DIM)).astype(float_type(dtype))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


class Model:
    """What a cache is to hold: a list of keys and values for each sequence, copied without end."""

    def __init__(self, batch, window=None, keep_first=0, **options):
        self.cache = KVCache(batch, KV_HEADS, DIM, window=window, keep_first=keep_first, **options)
        self.held = [(np.zeros((KV_HEADS, 0, DIM)),) * 2 for _ in range(batch)]
        self.window, self.keep_first = window, keep_first

    def append(self, n, counts=None):
        q, k, v = draw(len(self.held), n)
        self.cache.append(k, v, counts=counts)
        for b, m in enumerate([n] * len(self.held) if counts is None else counts):
            self.held[b] = tuple(
                np.concatenate((old, new[b, :, :m]), axis=1)
                for old, new in zip(self.held[b], (k, v), strict=True)
            )
        return q

    def check(self, q, counts=None):
        """Every sequence as if alone."""
        n = q.shape[2]
        out, lse = self.cache.attend(q, counts=counts, return_lse=True, backend="numpy")
        assert self.cache.lengths.tolist() == [k.shape[1] for k, _ in self.held]
        for b, (k, v) in enumerate(self.held):
            m, length = n if counts is None else counts[b], k.shape[1]
            p, j = length - m + np.arange(m)[:, None], np.arange(length)
            seen = j <= p
            if self.window is not None:
                seen &= (p - self.window < j) | (j < self.keep_first)
            s = np.einsum("hid,hjd->hij", q[b, :, :m].astype(float), np.repeat(k, 2, axis=0))
            s = np.where(seen, s / np.sqrt(DIM), -np.inf)
            top = np.maximum(s.max(axis=-1, initial=-1e300, keepdims=True), -1e300)
            weights = np.exp(s - top)
            total = weights.sum(axis=-1, keepdims=True)
            wanted = weights / np.where(total == 0, 1, total) @ np.repeat(v, 2, axis=0)
            np.testing.assert_allclose(out[b, :, :m], wanted, atol=2e-6)
            some = total[..., 0] > 0
            wanted = np.log(np.where(some, total[..., 0], 1)) + top[..., 0]
            np.testing.assert_allclose(lse[b, :, :m][some], wanted[some], atol=1e-5)
            assert (out[b, :, m:] == 0).all() and (lse[b, :, m:] == -np.inf).all()


def test_sequences_that_share_pages_go_apart():
    """Reordered, forked, freed and truncated at random, each stays what it alone would be."""
    rng, model = np.random.default_rng(1), Model(4, capacity=1)
    model.check(model.append(70))
    for _ in range(60):
        batch = len(model.held)
        what = rng.integers(6)
        if what == 0:
            indices = rng.integers(batch, size=rng.integers(2, 6))
            model.cache.reorder(indices)
            model.held = [model.held[b] for b in indices]
        elif what == 1:
            b = int(rng.integers(batch))
            model.cache.free(b)
            model.held[b] = tuple(x[:, :0] for x in model.held[b])
            other = int(rng.integers(batch))
            empty = [i for i, (k, _) in enumerate(model.held) if k.shape[1] == 0 and i != other]
            if empty:
                assert model.cache.fork(other) == empty[0]
                model.held[empty[0]] = model.held[other]
        elif what == 2:
            n = rng.integers(0, 100, batch)
            model.cache.truncate(n)
            model.held = [tuple(x[:, :m] for x in y) for y, m in zip(model.held, n, strict=True)]
        counts = rng.integers(0, 20, len(model.held)).tolist()
        model.check(model.append(20, counts), counts)
    for b, (k, v) in enumerate(model.held):
        np.testing.assert_array_equal(model.cache.keys(b), k.astype(np.float32))
        np.testing.assert_array_equal(model.cache.values(b), v.astype(np.float32))


def test_sharing_takes_no_pages():
    model = Model(3, capacity=640)
    model.append(640, [640, 0, 0])
    assert model.cache.pages_in_use == 10
    model.cache.fork(0)
    model.cache.reorder([0, 1, 0, 1, 0, 1, 2])
    assert model.cache.pages_in_use == 10
    model.cache.append(*draw(7, 1)[1:])
    assert model.cache.pages_in_use == 17  # one each
    for b in range(7):
        model.cache.free(b)
    assert model.cache.pages_in_use == 0


def test_growing_copies_nothing():
    """A step that makes the pool grow takes what it adds, and no copy of what is there."""
    cache = KVCache(1, 2, 64, capacity=64 * 64)
    _, k, v = (RNG.standard_normal((1, 2, 64 * 64, 64), np.float32) for _ in range(3))
    cache.append(k, v)
    before = cache.nbytes
    views = [x.__array_interface__["data"] for x in cache._sequences.now.views]
    tracemalloc.start()
    cache.append(k[:, :, :1], v[:, :, :1])
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert before < cache.nbytes and taken < 1.1 * (cache.nbytes - before)
    assert views == [x.__array_interface__["data"] for x in cache._sequences.now.views]


@pytest.mark.parametrize("keep_first", [0, 3, 70])
@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_window(window, keep_first):
    """In a prefill and in steps; memory is that of the window."""
    model = Model(2, window, keep_first, capacity=1)
    for n, counts in ((200, None), (1, None), (3, [3, 1]), (1, [0, 1]), (150, None), (1, None)):
        model.check(model.append(n, counts), counts)
    for _ in range(300):
        q = model.append(1)
    model.check(q)
    most = 2 * (window // 64 + 2 + -(-keep_first // 64))
    assert model.cache.pages_in_use <= most
    for b, (k, _) in enumerate(model.held):
        length = k.shape[1]
        j = np.arange(length)
        kept = (j < keep_first) | (j > length - 1 - window)
        np.testing.assert_array_equal(model.cache.keys(b), k[:, kept].astype(np.float32))


def test_window_with_options():
    """A window, spans, a bias and sinks of the call hold besides."""
    model = Model(1, 20, 4)
    q = model.append(40)
    (k, v), p, j = model.held[0], np.arange(40)[:, None], np.arange(40)
    bias, sinks = RNG.standard_normal((HEADS, 40, 40)), np.linspace(-1, 1, HEADS)
    out, lse, top, weights = model.cache.attend(
        q, bias=bias, sinks=sinks, window=(10, 5), spans=(1, 38), backend="numpy",
        return_lse=True, return_max=True, return_weights=True,
    )  # fmt: skip
    seen = (j <= p) & ((p - 20 < j) | (j < 4)) & (p - 10 <= j) & (j >= 1) & (j < 38)
    s = np.einsum("hid,hjd->hij", q[0].astype(float), np.repeat(k, 2, axis=0)) / np.sqrt(DIM)
    s = np.where(seen, s + bias, -np.inf)
    total = np.exp(s).sum(axis=-1, keepdims=True) + np.exp(sinks)[:, None, None]
    np.testing.assert_allclose(weights[0], np.exp(s) / total, atol=1e-6)
    np.testing.assert_allclose(top[0], s.max(axis=-1), atol=1e-6)
    np.testing.assert_allclose(out[0], np.exp(s) / total @ np.repeat(v, 2, axis=0), atol=2e-6)
    np.testing.assert_allclose(lse[0], np.log(total)[..., 0], atol=1e-6)


@pytest.mark.parametrize("keep_first", [0, 6])
def test_window_without_a_causal_mask(keep_first):
    """What is ahead is seen among the first tokens only."""
    model = Model(1, 4, keep_first)
    q = model.append(20)
    out = model.cache.attend(q, causal=False, backend="numpy")
    (k, v), p, j = model.held[0], np.arange(20)[:, None], np.arange(20)
    s = np.einsum("hid,hjd->hij", q[0].astype(float), np.repeat(k, 2, axis=0)) / np.sqrt(DIM)
    weights = np.exp(np.where((j < keep_first) | ((p - 4 < j) & (j <= p)), s, -np.inf))
    wanted = weights / weights.sum(axis=-1, keepdims=True) @ np.repeat(v, 2, axis=0)
    np.testing.assert_allclose(out[0], wanted, atol=2e-6)


def test_a_window_beside_a_sink_of_inf():
    model = Model(1, 10, 2)
    results = model.cache.attend(
        model.append(30)[:, :, -1:], sinks=[np.inf, 0, 0, 0], return_lse=True, return_weights=True
    )
    assert not results[0][0, 0].any() and not results[2][0, 0].any() and results[1][0, 0] == np.inf
    assert all(np.isfinite(x[0, 1:]).all() for x in results)


def test_what_a_window_has_given_back():
    model = Model(1, 10)
    model.append(300)
    model.append(2)
    with pytest.raises(ValueError, match=r"^q: expected at most the 2 queries"):
        model.cache.attend(draw(1, 300)[0])
    with pytest.raises(ValueError, match=r"^n: expected at least 300 of sequence 0"):
        model.cache.truncate(299)
    model.cache.truncate(301)
    model.held = [tuple(x[:, :301] for x in model.held[0])]
    model.check(model.append(2))


def test_sequences_of_one_length_may_be_cut_to_different_ones():
    model = Model(3)
    model.append(69)
    kept = [16, 7, 23]
    model.cache.truncate(kept)
    model.held = [tuple(x[:, :n] for x in held) for held, n in zip(model.held, kept, strict=True)]
    model.check(draw(3, 2)[0])
    model.check(model.append(3))


def test_a_snapshot_is_not_written_to():
    """Whoever holds one reads what was there, whatever becomes of the sequences."""
    model = Model(2, capacity=1)
    model.append(100)
    sequences = model.cache._sequences
    state, b = sequences.now, 1
    before = [sequences.rows(state, b, view) for view in state.views]
    for _ in range(3):
        model.cache.truncate(50)
        model.cache.append(*draw(2, 90)[1:])
        model.cache.reorder([1, 0])
        model.cache.free(0)
        model.cache.append(*draw(2, 200)[1:])
    for rows, view in zip(before, state.views, strict=True):
        np.testing.assert_array_equal(rows, sequences.rows(state, b, view))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize(
    "twin_of", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_and_pickles(twin_of, dtype):
    float_type("bfloat16")
    cache = KVCache(2, KV_HEADS, DIM, dtype=dtype, window=100, keep_first=2, max_tokens=1000)
    for n in (300, 3):
        q, k, v = draw(2, n)
        cache.append(k, v, counts=[n, n - 1])
    cache.reorder([1, 0, 1])
    q = draw(3, 1)[0]
    twin = twin_of(cache)
    before = cache.attend(q, backend="numpy")
    assert same_bits(before, twin.attend(q, backend="numpy"))
    assert (twin.lengths == cache.lengths).all()
    _, k, v = draw(3, 70)
    for x in (twin, cache):
        x.append(k, v)
        x.truncate(x.lengths - 1)
    assert same_bits(cache.attend(q, backend="numpy"), twin.attend(q, backend="numpy"))
    twin.append(-k, -v)
    assert (twin.lengths - cache.lengths == 70).all()


STEPS = {"int8": (1 / 254, None), "int4": (1 / 14, 32), "float8_e4m3fn": (1 / 16, 1)}


@pytest.mark.parametrize("dtype", STEPS)
def test_how_far_off_what_is_stored_is(dtype):
    """As the docstring says: off by that share of the largest of a group, of each number in fp8."""
    float_type("bfloat16")
    share, group = STEPS[dtype]
    cache = KVCache(1, KV_HEADS, 70, dtype=dtype)
    k, v = RNG.standard_normal((2, 1, KV_HEADS, 90, 70))
    v[0, 0, 3, :40] = 0
    cache.append(k, v)
    for x, got in ((k[0], cache.keys(0)), (v[0], cache.values(0))):
        assert got.dtype == np.float32 and got.shape == x.shape
        edges = np.arange(0, 70, group or 70)
        top = np.repeat(np.maximum.reduceat(np.abs(x), edges, axis=-1),
                        np.diff([*edges, 70]), axis=-1)  # fmt: skip
        floor = 2.0**-10 if dtype == "float8_e4m3fn" else 0
        assert (np.abs(got - x) <= 1.001 * np.maximum(share * top, floor)).all()
    assert (cache.values(0)[0, 3, :32] == 0).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_largest_numbers(dtype):
    """Up to those of float32, which come back finite; of one beyond, nothing is stored."""
    most = float(np.finfo(np.float32).max)
    cache = KVCache(1, 1, 4, dtype=dtype)
    cache.append(np.full((1, 1, 1, 4), -most), np.full((1, 1, 1, 4), most))
    np.testing.assert_allclose(cache.keys(0), -most, rtol=1e-6)
    np.testing.assert_allclose(cache.values(0), most, rtol=1e-6)
    for beyond in (-1.01 * most, 2 * most, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"^v: expected numbers for {dtype} that float32"):
            cache.append(np.ones((1, 1, 1, 4)), np.full((1, 1, 1, 4), beyond))
    assert cache.lengths.tolist() == [1]


@pytest.mark.parametrize("dtype", [None, 3, "int16", complex])
def test_dtypes_that_are_not_stored(dtype):
    with pytest.raises(ValueError, match=r"^dtype: expected one of float32, .*, got "):
        KVCache(1, 1, 4, dtype=dtype)


@pytest.mark.parametrize("dtype", [*STEPS, "float32"])
def test_an_empty_slot_holds_nothing(dtype):
    float_type("bfloat16")
    cache = KVCache(2, KV_HEADS, 70, value_dim=5, dtype=dtype)
    cache.append(np.ones((2, KV_HEADS, 3, 70)), np.ones((2, KV_HEADS, 3, 5)), counts=[3, 0])
    assert cache.keys(1).shape == (KV_HEADS, 0, 70)
    assert cache.values(1).shape == (KV_HEADS, 0, 5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_floats_come_back_as_they_were_rounded(dtype):
    cache = KVCache(2, KV_HEADS, DIM, dtype=dtype)
    _, k, v = draw(2, 70, "float64")
    cache.append(k, v, counts=[70, 3])
    real = np.float64 if dtype == "float64" else np.float32
    assert cache.keys(1).dtype == real
    np.testing.assert_array_equal(cache.keys(1), k[1, :, :3].astype(dtype).astype(real))
    np.testing.assert_array_equal(cache.values(0), v[0].astype(dtype).astype(real))


def test_fewer_bytes():
    sizes = {}
    for dtype in ("float32", "float16", "float8_e4m3fn", "int8", "int4"):
        float_type("bfloat16")
        sizes[dtype] = KVCache(1, 8, 128, capacity=6400, dtype=dtype).nbytes
    whole = sizes["float32"]
    shares = {name: size / whole for name, size in sizes.items()}
    assert shares == pytest.approx(
        {"float32": 1, "float16": 1 / 2, "float8_e4m3fn": 1 / 4, "int8": 1 / 4 + 1 / 128,
         "int4": 1 / 8 + 1 / 32}
    )  # fmt: skip


ERRORS = {
    "indices: expected shape (n,) with n >= 1, got (0,)": lambda c: c.reorder([]),
    "indices: expected shape (n,) with n >= 1, got ()": lambda c: c.reorder(1),
    "indices: expected 0..1, got 2": lambda c: c.reorder([0, 2]),
    "indices: expected 0..1, got -1": lambda c: c.reorder([-1]),
    "indices: expected integers": lambda c: c.reorder([0.5]),
    "b: expected 0..1, got 2": lambda c: c.free(2),
    "b: expected 0..1, got -1": lambda c: c.keys(-1),
    "b: expected an integer": lambda c: c.values(1.0),
    "b: expected an empty slot for a copy of sequence 1, got none": lambda c: c.fork(1),
    "b: expected 0..1, got 7": lambda c: c.fork(7),
    "block_table: attend() has no such option": lambda c: c.attend(draw(2, 1)[0], block_table=1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_leave_everything_as_it_was(message):
    cache = KVCache(2, KV_HEADS, DIM, capacity=2)
    cache.append(*draw(2, 8)[1:])
    state = repr(cache)
    with pytest.raises((TypeError, ValueError)) as caught:
        ERRORS[message](cache)
    assert str(caught.value).startswith(message)
    assert repr(cache) == state and cache.lengths.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"window": 1.5}, "window: expected an integer"),
        ({"keep_first": 1}, "keep_first: expected 0 without a window, got 1"),
        ({"window": 4, "keep_first": -1}, "keep_first: expected at least 0, got -1"),
    ],
)
def test_wrong_windows(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        KVCache(1, 1, 8, **options)
    assert str(caught.value).startswith(message)
