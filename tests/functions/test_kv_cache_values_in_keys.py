"""`KVCache(values_in_keys=True)`: values are columns of the keys; nothing else is stored."""

import copy
import pickle

import numpy as np
import pytest
from test_kv_cache import STORED, attend, joined, solves, stored

from fastattn import KVCache

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 6, 2, 75
RNG = np.random.default_rng(0)


def draw(n):
    """``(q, k)`` of `n` new tokens."""
    return (
        RNG.standard_normal((BATCH, heads, n, HEAD_DIM), np.float32) for heads in (HEADS, KV_HEADS)
    )


def new(dtype="float32", value_dim=41, **options):
    return KVCache(BATCH, KV_HEADS, HEAD_DIM, value_dim=value_dim, values_in_keys=True,
                   dtype=dtype, **options)  # fmt: skip


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("value_dim", [41, 64, HEAD_DIM])
def test_values_are_columns_of_the_keys(target, dtype, value_dim):
    """Also where int4 has fewer scales for a value than for a key, and a byte that is half one."""
    if dtype in ("bfloat16", "float8_e4m3fn"):
        pytest.importorskip("ml_dtypes", reason="it has the dtype")
    cache, keys = new(dtype, value_dim, capacity=1), []
    for n in (150, 1, 1, 5, 1):
        q, k = draw(n)
        cache.append(k)
        keys.append(stored(k, dtype))
        held = joined(keys)
        solves(attend(target, cache, q), q, held, held[..., :value_dim])
    real = np.float64 if dtype == "float64" else np.float32
    np.testing.assert_array_equal(cache.values(1), cache.keys(1)[..., :value_dim])
    np.testing.assert_allclose(cache.keys(1), held[1].astype(real), rtol=1e-6)


@pytest.mark.parametrize("dtype, bytes_of_a_token", [
    ("float32", 576 * 4), ("int8", 576 + 4), ("int4", 576 // 2 + 4 * 576 // 32),
])  # fmt: skip
def test_stored_once(dtype, bytes_of_a_token):
    cache = KVCache(1, 1, 576, value_dim=512, values_in_keys=True, dtype=dtype, capacity=640)
    assert cache.nbytes == 640 * bytes_of_a_token
    assert "head_dim 576, value_dim 512, values_in_keys, lengths 0" in repr(cache)


def test_pages_are_shared_and_given_back():
    cache, apart = new(window=70, keep_first=3), KVCache(BATCH, KV_HEADS, HEAD_DIM, value_dim=41,
                                                         window=70, keep_first=3)  # fmt: skip
    for n, counts in ((150, [150, 0]), (1, None), (3, [0, 3])):
        q, k = draw(n)
        cache.append(k, counts=counts)
        apart.append(k, k[..., :41], counts)
        np.testing.assert_array_equal(cache.attend(q, counts), apart.attend(q, counts))
        if n == 150:
            assert cache.fork(0) == apart.fork(0) == 1
    for other in (copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        np.testing.assert_array_equal(other.attend(q, counts), apart.attend(q, counts))
        np.testing.assert_array_equal(other.values(1), apart.values(1))


def test_errors():
    cache, (_, k) = new(), draw(3)
    with pytest.raises(TypeError, match=r"^v: expected None with values_in_keys, got ndarray"):
        cache.append(k, k)
    assert (cache.lengths == 0).all()
    with pytest.raises(ValueError, match=r"^value_dim: expected at most head_dim 75 with values_i"):
        new(value_dim=76)
    with pytest.raises(TypeError, match=r"^values_in_keys: expected bool, got int"):
        KVCache(1, 1, 8, values_in_keys=1)
    with pytest.raises(TypeError, match=r"^v: expected"):
        KVCache(BATCH, KV_HEADS, HEAD_DIM).append(k)
