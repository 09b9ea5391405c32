"""T5's table of buckets as a relative bias."""

import numpy as np
import pytest
from helpers.problems import Shape

import fastattn


def bucket_of(distance, buckets, bidirectional, max_distance):
    """The textbook's, with exact logarithms."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    run = np.log(distance / exact) / np.log(max_distance / exact) * (buckets - exact)
    return base + min(exact + int(run + 1e-9), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (4, 3), (33, 64)])
def test_each_distance_has_its_bucket(buckets, max_distance, bidirectional):
    if not bidirectional and max_distance <= buckets // 2:
        pytest.skip("no distance is left for the other half of the buckets")
    numbers = np.arange(buckets)[:, None]
    got = fastattn.t5_relative_bias(numbers, bidirectional=bidirectional, max_distance=max_distance)
    distances = range(-max_distance, max_distance + 1)
    wanted = [bucket_of(d, buckets, bidirectional, max_distance) for d in distances]
    np.testing.assert_array_equal(got, [wanted])
    assert got.dtype == numbers.dtype


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (12, 50), (32, 1000)])
def test_is_that_of_transformers(buckets, max_distance, decoder):
    """Bit for bit the bias that a T5 layer adds."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = modeling.T5Config(
        d_model=16, num_heads=2, d_kv=8, is_decoder=decoder,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance,
    )  # fmt: skip
    layer = modeling.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    with torch.no_grad():
        wanted = layer.compute_bias(1500, 1700)[0].numpy()
        table = layer.relative_attention_bias.weight.detach()
    got = fastattn.t5_relative_bias(table, bidirectional=not decoder, max_distance=max_distance)
    distance = np.arange(1700) - np.arange(1500)[:, None]
    np.testing.assert_array_equal(
        got[:, np.clip(distance, -max_distance, max_distance) + max_distance], wanted
    )


def test_goes_into_scaled_dot():
    q, k, v = Shape(2, 4, 30, 40, 8).arrays()
    table = np.random.default_rng(0).standard_normal((32, 4), np.float32)
    bias = fastattn.t5_relative_bias(table)
    assert fastattn.scaled_dot(q, k, v, relative_bias=bias).shape == q.shape


@pytest.mark.parametrize(
    "table, options, error, name",
    [
        (np.ones(32), {}, ValueError, "table"),
        (np.ones((3, 4)), {}, ValueError, "table"),
        (np.ones((1, 4)), {"bidirectional": False}, ValueError, "table"),
        (np.ones((32, 4), complex), {}, TypeError, "table"),
        (np.ones((32, 4)), {"bidirectional": 1}, TypeError, "bidirectional"),
        (np.ones((32, 4)), {"max_distance": 8}, ValueError, "max_distance"),
        (np.ones((32, 4)), {"max_distance": 9, "bidirectional": False}, ValueError, "max_distance"),
        (np.ones((32, 4)), {"max_distance": 0}, ValueError, "max_distance"),
        (np.ones((32, 4)), {"max_distance": 1.5}, TypeError, "max_distance"),
    ],
)  # fmt: skip
def test_errors(table, options, error, name):
    with pytest.raises(error, match=rf"^{name}: expected .* got "):
        fastattn.t5_relative_bias(table, **options)
