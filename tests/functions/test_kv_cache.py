"""`KVCache`: the same as `scaled_dot` on all that was appended (contract, section 3)."""

import copy
import sys
import threading

import numpy as np
import pytest
from helpers.memory import reported
from helpers.oracles import assert_solves, check, same_bits
from helpers.problems import DTYPES, Shape, float_type

import fastattn
from fastattn import KVCache
from fastattn.core.problem import make_problem

STORED = (*DTYPES, "float8_e4m3fn", "int8", "int4")
WIDENS = DTYPES  # the others count for no dtype of a result
BATCH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 40, 24


def new(dtype, **options):
    float_type(dtype)  # skips where ml_dtypes is not installed
    return KVCache(BATCH, KV_HEADS, HEAD_DIM, value_dim=VALUE_DIM, dtype=dtype, **options)


def draw(n, dtype="float32", seed=0):
    """``(q, k, v)`` of `n` new tokens."""
    return Shape(BATCH, HEADS, n, n, HEAD_DIM, KV_HEADS, VALUE_DIM).arrays(dtype, [seed, n])


def stored(x, dtype, real=np.float32):
    """`x` as a cache of that dtype holds it, as floats; small ones in the precision `real`."""
    if dtype not in ("int8", "int4"):
        x = x.astype(float_type(dtype))
        return x if dtype in WIDENS else x.astype(real)
    if dtype == "int4":
        groups = [scaled(x[..., d : d + 32], 7, real) for d in range(0, x.shape[-1], 32)]
        return np.concatenate(groups, axis=-1)
    return scaled(x, 127, real)


def scaled(x, most, real):
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(most)
    scale[scale == 0] = 1
    return np.rint(x / scale).astype(real) * scale


def solves(results, q, k, v, **options):
    """The results have the dtype of `q`, and are as exact as that allows."""
    options = {"causal": True, "return_lse": True, **options}
    problem = make_problem(q, k, v, **options)
    if problem.dtype == q.dtype:
        assert_solves(results, problem)
        return
    (out, lse), (exact, exact_lse, _) = results, fastattn.reference.attend(problem)
    assert out.dtype == q.dtype and lse.dtype == np.float32
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[q.dtype.name]
    assert np.abs(out.astype(float) - exact).max(initial=0) <= eps * np.abs(exact).max(initial=0)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def joined(parts):
    return np.concatenate(parts, axis=2)


def attend(target, cache, q, causal=True, **options):
    return cache.attend(q, causal=causal, backend=backend(target), return_lse=True, **options)


def backend(target):
    if target.backend == "cuda":
        pytest.skip("cuda cannot serve this call: no kernel for keys in pages")
    return target.backend


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("capacity", [1, 256])
def test_prompt_and_steps(target, dtype, capacity):
    cache = new(dtype, capacity=capacity)
    keys, values = [], []
    for seed, n in enumerate((150, 1, 1, 5, 40, 1)):
        q, k, v = draw(n, seed=seed)
        cache.append(k, v)
        keys.append(stored(k, dtype))
        values.append(stored(v, dtype))
        solves(attend(target, cache, q), q, joined(keys), joined(values))
    assert (cache.lengths == 198).all() and cache.lengths.dtype == np.int64


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", [1, 33])
def test_queries_of_any_dtype(target, dtype, name, n):
    """Theirs is the result's, whatever is stored."""
    cache = new(dtype)
    q, k, v = draw(70)
    q = q[:, :, -n:].astype(float_type(name))
    cache.append(k, v)
    if dtype in WIDENS:
        solves(attend(target, cache, q), q, stored(k, dtype), stored(v, dtype))
        return
    out, lse = attend(target, cache, q)
    k, v = (stored(x, dtype, np.float64) for x in (k, v))
    wanted = make_problem(q.astype(np.float64), k, v, causal=True, return_lse=True)
    assert out.dtype == q.dtype
    exact, exact_lse, _ = fastattn.reference.attend(wanted)
    eps = {"float64": 1e-15, "float32": 1e-6, "float16": 2**-11, "bfloat16": 2**-8}[name]
    assert np.abs(out.astype(float) - exact).max() <= 4 * eps * np.abs(exact).max()
    assert np.abs(lse - exact_lse).max() <= (1e-14 if name == "float64" else 1e-5)


OPTIONS = {
    "window": (1, {"window": (20, None)}),
    "not causal": (9, {"causal": False}),
    "alibi and sinks": (1, {"alibi": np.linspace(0.01, 0.5, HEADS), "sinks": np.zeros(HEADS)}),
    "softcap and scale": (9, {"softcap": 2.0, "scale": 0.5}),
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("n", "options"), OPTIONS.values(), ids=OPTIONS)
def test_ragged(target, dtype, n, options):
    """Each sequence by itself; what follows its tokens is never seen, NaN or not."""
    cache = new(dtype, capacity=16)
    (_, k, v), last = draw(90), draw(n, seed=1)
    counts = np.array([90, 31])
    k[1, :, 31:] = v[1, :, 31:] = np.nan
    cache.append(k, v, counts=counts)
    cache.append(*last[1:])
    assert (cache.lengths == counts + n).all()
    out, lse = attend(target, cache, last[0], **options)
    for b, count in enumerate(counts):
        whole = (stored(joined([x[b : b + 1, :, :count], y[b : b + 1]]), dtype)
                 for x, y in zip((k, v), last[1:], strict=True))  # fmt: skip
        solves((out[b : b + 1], lse[b : b + 1]), last[0][b : b + 1], *whole, **options)


def test_one_token_more_for_some(target):
    cache = new("float32")
    q, k, v = draw(1)
    cache.append(*draw(8)[1:])
    cache.append(k, v, counts=[0, 1])
    assert cache.lengths.tolist() == [8, 9]
    out, _ = attend(target, cache, q)
    alone = check(target, q[:1], *(x[:1] for x in draw(8)[1:]), causal=True)
    np.testing.assert_allclose(out[:1], alone[0], atol=1e-6)


def test_a_sequence_shorter_than_the_queries(target):
    """What would be before its first token sees nothing."""
    cache = new("float32")
    q, k, v = draw(5)
    cache.append(k, v, counts=[5, 2])
    out, lse = attend(target, cache, q)
    assert (out[1, :, :3] == 0).all() and (lse[1, :, :3] == -np.inf).all()
    check(target, q[1, :, 3:], k[1, :, :2], v[1, :, :2], causal=True)
    alone = target.attend(q[1, :, 3:], k[1, :, :2], v[1, :, :2], causal=True)
    np.testing.assert_allclose(out[1, :, 3:], alone, atol=1e-6)


COUNTED = {
    "plain": {},
    "sinks": {"sinks": np.linspace(-1, 1, HEADS)},
    "not causal": {"causal": False},
    "spans": {"spans": (1, 4)},
}


@pytest.mark.parametrize("options", COUNTED.values(), ids=COUNTED)
def test_as_many_queries_as_were_appended(target, options):
    """A right-padded prefill in two pieces, the second without a token for one sequence."""
    cache = new("float32")
    (_, k, v), (q, more_k, more_v) = draw(4), draw(5, seed=1)
    counts = [2, 5]
    q[0, :, 2:] = more_k[0, :, 2:] = more_v[0, :, 2:] = np.nan
    cache.append(k, v, counts=[4, 0])
    cache.append(more_k, more_v, counts=counts)
    asked = {"causal": True, **options}
    out, lse = attend(target, cache, q, counts=counts, **asked)
    for b, (before, n) in enumerate(((4, 2), (0, 5))):
        assert (out[b, :, n:] == 0).all() and (lse[b, :, n:] == -np.inf).all()
        whole = (joined([x[b : b + 1, :, :before], y[b : b + 1, :, :n]])
                 for x, y in ((k, more_k), (v, more_v)))  # fmt: skip
        problem = make_problem(
            q[b : b + 1, :, :n], *whole, **{"causal": True, **options}, return_lse=True
        )
        assert_solves((out[b : b + 1, :, :n], lse[b : b + 1, :, :n]), problem)


def test_an_empty_slot(target):
    cache = new("float32")
    q, k, v = draw(3)
    cache.append(k, v, counts=[3, 0])
    out, lse = attend(target, cache, q, counts=[3, 0], sinks=np.zeros(HEADS))
    assert (out[1] == 0).all() and (lse[1] == -np.inf).all() and (out[0] != 0).any()


def test_copies_share_no_memory():
    cache = new("float32")
    q, k, v = draw(3)
    cache.append(k, v)
    for twin in (copy.copy(cache), copy.deepcopy(cache)):
        twin.truncate(1)
        twin.append(-k, -v)
        assert cache.lengths.tolist() == [3, 3] and twin.lengths.tolist() == [4, 4]
        assert same_bits(cache.attend(q), fastattn.scaled_dot(q, k, v, causal=True))


def test_attends_beside_an_append():
    """A call sees the cache as it was at its start, which may be of two lengths here."""
    cache, done = new("float32", capacity=1), threading.Event()
    q, k, v = draw(1)
    cache.append(k, v)

    def append():
        while not done.is_set() and cache.lengths[0] < 5000:
            cache.append(k, v, counts=[1, cache.lengths[0] % 2])

    thread = threading.Thread(target=append)
    thread.start()
    try:
        for _ in range(300):
            np.testing.assert_allclose(cache.attend(q), np.repeat(v, 3, axis=1), rtol=1e-5)
    finally:
        done.set()
        thread.join()


def test_without_a_token(target):
    out, lse = attend(target, new("float32"), draw(2)[0])
    assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", STORED)
def test_truncate(target, dtype):
    """What is appended afterwards takes the place of what was dropped."""
    cache, other = new(dtype), new(dtype)
    first, dropped, last = draw(20), draw(30, seed=1), draw(3, seed=2)
    cache.append(*first[1:])
    cache.append(*dropped[1:])
    cache.truncate([20, 60])
    assert cache.lengths.tolist() == [20, 50]
    cache.truncate(20)
    other.append(*first[1:])
    for x in (cache, other):
        x.append(*last[1:])
    assert same_bits(attend(target, cache, last[0])[0], attend(target, other, last[0])[0])
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", STORED)
def test_keys_and_values_of_an_empty_slot(dtype):
    cache = fastattn.KVCache(1, 2, 8, value_dim=3, dtype=dtype)
    assert cache.keys(0).shape == (2, 0, 8)
    assert cache.values(0).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", STORED)
def test_growth_loses_nothing(dtype):
    small, large = new(dtype, capacity=1), new(dtype, capacity=300)
    for seed in range(40):
        q, k, v = draw(1 + seed % 7, seed=seed)
        counts = [k.shape[2], seed % 2]
        for cache in (small, large):
            cache.append(k, v, counts=counts)
        np.testing.assert_allclose(small.attend(q), large.attend(q), atol=1e-6)
    assert large.capacity == 320  # of whole pages
    assert small.nbytes <= large.nbytes


def test_growth_is_rare_and_limited():
    """It doubles, and stops where no sequence may have more."""
    cache = new("float32", capacity=4, max_tokens=400)
    capacities = []
    for _ in range(400):
        cache.append(*draw(1)[1:])
        capacities.append(cache.capacity)
    assert sorted(set(capacities)) == [64, 128, 256, 448]


@pytest.mark.parametrize("dtype", STORED)
def test_threads_and_heads_change_no_bit(target, dtype):
    """Keys are split between threads by their number alone (promise 4)."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} does not promise the same bits")
    float_type(dtype)
    q, k, v = Shape(2, 4, 1, 5000, 32, 2).arrays()
    cache, half = KVCache(2, 2, 32, dtype=dtype), KVCache(1, 1, 32, dtype=dtype)
    cache.append(k, v)
    half.append(k[1:, 1:], v[1:, 1:])
    one = cache.attend(q, backend=backend(target), threads=1)
    assert same_bits(one, cache.attend(q, backend=target.backend, threads=2))
    assert same_bits(one[1:, 2:], half.attend(q[1:, 2:], backend=target.backend))


def test_int8_is_near():
    """One scale per token and head: off by half a step of 1/127 of the largest, at most."""
    cache = new("int8")
    _, k, v = draw(50)
    k[0, 0, 3] = 0  # no scale
    v[1, 1, 5] *= 1e-30
    v[0, 1, 7] *= 1e-44  # subnormal, and so would be its scale
    cache.append(k, v)
    weights = np.eye(50, dtype=bool)  # each query sees one key, so it gets its value
    out = cache.attend(np.zeros((BATCH, KV_HEADS, 50, HEAD_DIM), np.float32), mask=weights)
    step = np.abs(v).max(axis=-1, keepdims=True) / 127
    # A subnormal scale is a whole number of the smallest.
    tiny = 64 * np.finfo(np.float32).smallest_subnormal
    assert (np.abs(out - v) <= 0.501 * step + tiny * (step < 1e-38)).all()
    assert out[0, 1, 7].any()
    assert np.abs(out - v).max() > 0.4 * step.min()


ERRORS = {
    "k: expected shape": lambda c, k, v: c.append(k[:, :1], v),
    "k: expected shape (2": lambda c, k, v: c.append(k[..., :-1], v),
    "k: expected shape (2, 2, n, 40), got (3": lambda c, k, v: c.append(k[0, 0], v),
    "v: expected shape": lambda c, k, v: c.append(k, k),
    "v: expected 3 tokens as in k, got 2": lambda c, k, v: c.append(k, v[:, :, :2]),
    "k: expected one of float32, float64, float16, bfloat16, got int64": lambda c, k, v: c.append(
        k.astype(int), v
    ),
    "v: expected one of float32, float64, float16, bfloat16, got complex64": lambda c, k, v: (
        c.append(k, v.astype("complex64"))
    ),
    "k: expected a plain array": lambda c, k, v: c.append(np.ma.array(k), v),
    "counts: expected shape": lambda c, k, v: c.append(k, v, counts=3),
    "counts: expected 0..3, got 4": lambda c, k, v: c.append(k, v, counts=[1, 4]),
    "counts: expected 0..3, got -1": lambda c, k, v: c.append(k, v, counts=[-1, 3]),
    "counts: expected integers": lambda c, k, v: c.append(k, v, counts=[1.0, 2.0]),
    "k: expected at most max_tokens 10 in a sequence, got 3": lambda c, k, v: c.append(
        k, v, counts=[3, 0]
    ),
    "k: expected numbers for int8": lambda c, k, v: c.append(
        np.full_like(k, np.nan), v, counts=[1, 1]
    ),
    "v: expected numbers for int8": lambda c, k, v: c.append(
        k, np.full_like(v, np.inf), counts=[1, 1]
    ),
    "n: expected at least 0, got -1": lambda c, k, v: c.truncate(-1),
    "n: expected shape": lambda c, k, v: c.truncate([1, 2, 3]),
    "n: expected integers": lambda c, k, v: c.truncate(1.5),
    "q: expected shape": lambda c, k, v: c.attend(k[0]),
    "q: expected shape (2, heads, n, head_dim), got (1": lambda c, k, v: c.attend(k[:1]),
    "q: expected head_dim 40, got 24": lambda c, k, v: c.attend(v),
    "k: expected a number of heads": lambda c, k, v: c.attend(np.zeros((BATCH, 3, 1, HEAD_DIM))),
    "kv_lengths: attend() has no such option": lambda c, k, v: c.attend(k, kv_lengths=3),
    "q_offset: attend() has no such option": lambda c, k, v: c.attend(k, q_offset=3),
    "gradients: attend() has no such option": lambda c, k, v: c.attend(k, gradients=True),
    "wrt: attend() has no such option": lambda c, k, v: c.attend(k, wrt=("bias",)),
    "k_scales: attend() has no such option": lambda c, k, v: c.attend(k, k_scales=None),
    "counts: expected 0..3, got 5": lambda c, k, v: c.attend(k, counts=[5, 1]),
    "counts: expected at most the 8 tokens of sequence 1, got 9": lambda c, k, v: c.attend(
        np.zeros((BATCH, HEADS, 9, HEAD_DIM)), counts=[3, 9]
    ),
    "causal: ": lambda c, k, v: c.attend(k, causal=1),
    "mask: expected a shape": lambda c, k, v: c.attend(k, mask=np.ones((3, 99), bool)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_leave_everything_as_it_was(message):
    cache = new("int8", capacity=2, max_tokens=10)
    cache.append(*draw(8)[1:])
    q, k, v = draw(3, seed=3)
    before, state = cache.attend(q), repr(cache)
    with pytest.raises((TypeError, ValueError)) as caught:
        ERRORS[message](cache, k, v)
    assert str(caught.value).startswith(message)
    assert repr(cache) == state and cache.lengths.tolist() == [8, 8]
    assert same_bits(cache.attend(q), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch", 0), ("kv_heads", 1.0), ("head_dim", -1), ("value_dim", 0), ("capacity", 0),
     ("max_tokens", 100), ("dtype", "float8"), ("dtype", "int16"), ("dtype", np.uint8)],
)  # fmt: skip
def test_wrong_sizes(name, value):
    sizes = {"batch": 1, "kv_heads": 1, "head_dim": 8, name: value}
    with pytest.raises((TypeError, ValueError), match=rf"^({name}|capacity): "):
        KVCache(**sizes)


def test_lengths_are_a_copy():
    cache = new("float32")
    cache.lengths[:] = 7
    assert cache.lengths.tolist() == [0, 0]


def test_repr():
    cache = KVCache(2, 1, 8, value_dim=4, capacity=16, max_tokens=32, dtype=np.float16)
    cache.append(*(np.zeros((2, 1, 3, n)) for n in (8, 4)), counts=[1, 3])
    assert repr(cache) == (
        "KVCache(float16, batch 2, kv_heads 1, head_dim 8, value_dim 4, lengths 1..3, "
        "max_tokens 32, 2 of 2 pages, 0.00 MiB)"
    )


def test_rounds_to_infinity_without_a_word():
    """As `astype` does, but for the warning."""
    cache = KVCache(1, 1, 4, dtype="float16")
    cache.append(np.zeros((1, 1, 1, 4)), np.full((1, 1, 1, 4), 1e9))
    assert np.isposinf(cache.attend(np.zeros((1, 1, 1, 4), np.float32))).all()


# How much memory attention to 2 x 8 MiB of int8 takes.
PROGRAM = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

how = {"backend": sys.argv[1], "threads": 2}
cache = fastattn.KVCache(1, 2, 128, capacity=32768, dtype="int8")
rng = np.random.default_rng(0)
for _ in range(16):
    cache.append(*rng.standard_normal((2, 1, 2, 2048, 128), np.float32))
q = rng.standard_normal((1, 4, 20, 128), np.float32)
cache.attend(q[:, :, :1], window=(9, 0), **how)  # whatever is made once
report(**{f"{n} queries": extra(lambda: cache.attend(q[:, :, :n], **how)) for n in (1, 20)})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.one_instruction_set
def test_int8_is_never_an_array_of_floats(target, run_python):
    """The keys alone would be 32 MiB of float32; some tiles are less than 24."""
    assert not reported(run_python(PROGRAM, backend(target)), 24)


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float32", "bfloat16")])
def test_narrower_keys_and_values_are_not_copied(target, dtypes):
    q, k, v = (x.astype(float_type(n)) for x, n in zip(draw(70), (*dtypes, dtypes[1]), strict=True))
    assert make_problem(q, k, v).copied == ()
    assert make_problem(q, k.astype(dtypes[0]), v).copied == ()
    check(target, q, k, v)


@pytest.mark.dtypes("bfloat16")
@pytest.mark.parametrize("n", [1, 100])
def test_float32_multiplied_as_bfloat16(target, n):
    """As far off as plain NumPy with the inputs and the weights rounded to bfloat16."""
    float_type("bfloat16")
    q, k, v = draw(300)
    q = q[:, :, -n:]
    exact = target.attend(q, k, v)
    out = target.attend(q, k, v, precision="bfloat16")
    assert out.dtype == np.float32
    rounded = fastattn.reference.attend(
        make_problem(*(x.astype(float_type("bfloat16")) for x in (q, k, v)))
    )
    error = np.sqrt(np.mean((out - exact) ** 2))
    assert error <= 2 * np.sqrt(np.mean((rounded[0] - exact) ** 2))
    plan = fastattn.explain(q, k, v, precision="bfloat16", backend=target.backend).plan
    if "multiplied as bfloat16" in plan["kernel"]:
        assert error > 1e-5
    else:
        assert same_bits(out, exact)
