"""Multi-head attention against its formula and against PyTorch's layer."""

import sys

import numpy as np
import pytest

import fastattn
from fastattn import MultiHeadAttention

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 10, 32))
Y = RNG.standard_normal((3, 7, 20))
Z = RNG.standard_normal((3, 7, 12))


def random_layer(*args, **options):
    """In float64, with biases that are not 0."""
    layer = MultiHeadAttention(*args, dtype="float64", rng=1, **options)
    for name, x in layer.parameters.items():
        setattr(layer, name, np.random.default_rng(len(name) + x.size).standard_normal(x.shape) / 4)
    return layer


def by_formula(layer, query, key, value):
    """Head by head: (out, weights)."""
    p = {"b_q": 0, "b_k": 0, "b_v": 0, "b_o": 0, **layer.parameters}
    q, k, v = (x @ p["w_" + n] + p["b_" + n] for n, x in zip("qkv", (query, key, value),
                                                             strict=True))  # fmt: skip
    heads, weights = [], []
    for h in range(layer.num_heads):
        kv = h // (layer.num_heads // layer.kv_heads)
        mine, shared = (slice(n * layer.head_dim, (n + 1) * layer.head_dim) for n in (h, kv))
        s = q[..., mine] @ k[..., shared].swapaxes(-1, -2) / np.sqrt(layer.head_dim)
        w = np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True)
        weights.append(w)
        heads.append(w @ v[..., shared])
    return np.concatenate(heads, axis=-1) @ p["w_o"] + p["b_o"], np.stack(weights, axis=-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_self_attention(target, kv_heads, bias):
    layer = random_layer(32, 4, kv_heads=kv_heads, bias=bias)
    for x in (X, X[0]):
        out, weights = layer(x, return_weights=True, backend=target.backend)
        for got, want in zip((out, weights), by_formula(layer, x, x, x), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_across_modalities(target):
    layer = random_layer(32, 4, key_dim=20, value_dim=12)
    out = layer(X, Y, Z, backend=target.backend)
    np.testing.assert_allclose(out, by_formula(layer, X, Y, Z)[0], rtol=1e-11, atol=1e-12)
    layer = random_layer(32, 4, key_dim=20)
    np.testing.assert_allclose(layer(X, Y), by_formula(layer, X, Y, Y)[0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer(X, Y[:1]), layer(X, np.broadcast_to(Y[:1], Y.shape)))


def test_sizes_of_the_article():
    """A batch of 32 sequences of 10 words, 512 dims, 8 heads."""
    layer = MultiHeadAttention(512, 8, rng=0)
    x = np.zeros((32, 10, 512), np.float32)
    out, weights = layer(x, return_weights=True)
    assert (out.shape, weights.shape) == ((32, 10, 512), (32, 8, 10, 10))
    assert (out.dtype, weights.dtype) == (np.float32, np.float32)


def test_options_are_those_of_scaled_dot(target):
    layer = random_layer(32, 4)
    lengths = np.array([10, 4, 7])
    wanted = layer(X, kv_lengths=lengths, causal=True, q_offset=0, backend=target.backend)
    padded = X.copy()
    padded[np.arange(10) >= lengths[:, None]] = np.nan
    got = layer(padded, kv_lengths=lengths, causal=True, q_offset=0, backend=target.backend)
    for n, length in enumerate(lengths):
        np.testing.assert_allclose(got[n, :length], wanted[n, :length], rtol=1e-11, atol=1e-12)
        one = layer(X[n, :length], causal=True, backend=target.backend)
        np.testing.assert_allclose(one, wanted[n, :length], rtol=1e-11, atol=1e-12)


def test_dtypes():
    x = X.astype(np.float16)
    assert MultiHeadAttention(32, 4, dtype="float16", rng=0)(x).dtype == np.float16
    assert MultiHeadAttention(32, 4, rng=0)(x).dtype == np.float32
    assert MultiHeadAttention(32, 4, rng=0)(np.ones((2, 32), int)).dtype == np.float64
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    layer = MultiHeadAttention(32, 4, dtype=bfloat16, rng=0)
    got = layer(X.astype(bfloat16)).astype(float)
    for name, w in layer.parameters.items():
        setattr(layer, name, w.astype(np.float64))
    # Three roundings to 8 bits on the way to results of about 1.
    np.testing.assert_allclose(got, layer(X.astype(bfloat16)), atol=3 * 2**-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [(None, None), (20, 12), (20, 20)])
def test_equal_to_torch(dims, bias):
    torch = pytest.importorskip("torch", reason="it is held to PyTorch's layer")
    key_dim, value_dim = dims
    module = torch.nn.MultiheadAttention(
        32, 4, dropout=0.5, bias=bias, kdim=key_dim, vdim=value_dim, batch_first=True
    ).double().eval()  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    key = X[:, :7] if key_dim is None else Y
    value = key if value_dim in (None, 20) else Z
    tensors = [torch.from_numpy(x) for x in (X, key, value)]
    hidden = np.arange(7) >= np.array([7, 3, 5])[:, None]
    wanted = module(*tensors, key_padding_mask=torch.from_numpy(hidden), average_attn_weights=False)
    layer = MultiHeadAttention.from_torch(module)
    got = layer(X, key, value, kv_lengths=[7, 3, 5], return_weights=True)
    for mine, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-11, atol=1e-12)
    again = MultiHeadAttention(32, 4, key_dim=key_dim, value_dim=value_dim, bias=bias)
    again.load_torch({name: x.numpy() for name, x in module.state_dict().items()})
    np.testing.assert_array_equal(again(X, key, value), layer(X, key, value))
    before = layer(X, key, value)
    with torch.no_grad():
        module.out_proj.weight.zero_()
    np.testing.assert_array_equal(layer(X, key, value), before)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_of_torch(name, bias, batch_first):
    """The parameters are copied bit for bit; sequences come first here whatever theirs do."""
    torch = pytest.importorskip("torch", reason="it is held to PyTorch's layer")
    module = torch.nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first)
    module = module.to(getattr(torch, name))
    layer = MultiHeadAttention.from_torch(module)
    state = module.state_dict()
    assert {x.dtype.name for x in layer.parameters.values()} == {name}
    np.testing.assert_array_equal(
        layer.w_q.T.astype(float), state["in_proj_weight"][:32].double().numpy()
    )
    x = torch.from_numpy(X).to(state["in_proj_weight"].dtype)
    own = x if batch_first else x.transpose(0, 1)
    wanted = module(own, own, own, need_weights=False)[0].detach()
    wanted = wanted if batch_first else wanted.transpose(0, 1)
    got = layer(x)
    assert got.dtype.name == name
    # Both round to the dtype three times on the way to results below 1.
    tolerance = 4 * torch.finfo(x.dtype).eps
    np.testing.assert_allclose(got.astype(float), wanted.double().numpy(), atol=tolerance)


def test_bfloat16_by_name(run_python):
    """Nobody need have imported what it is of."""
    pytest.importorskip("ml_dtypes")
    program = (
        "import fastattn; print(fastattn.MultiHeadAttention(8, 2, dtype='bfloat16').w_q.dtype)"
    )
    assert run_python(program).strip() == "bfloat16"


def test_parameters_are_array_likes():
    """As inputs are: lists, and tensors of torch."""
    torch = pytest.importorskip("torch", reason="its tensors are read")
    layer, other = (MultiHeadAttention(32, 4, rng=0) for _ in range(2))
    other.w_q, other.w_o = torch.from_numpy(layer.w_q), torch.from_numpy(layer.w_o)
    other.b_o = layer.b_o.tolist()
    for x in (X, torch.from_numpy(X)):
        found, pullback = fastattn.vjp(other, x, wrt=("w_q", "b_o"))
        wanted, back = fastattn.vjp(layer, X, wrt=("w_q", "b_o"))
        for got, want in zip((found, *pullback(found)), (wanted, *back(wanted)), strict=True):
            np.testing.assert_array_equal(got, want)
    other.w_k = torch.nn.Parameter(torch.ones(32, 32))
    with pytest.raises(TypeError, match=r"^w_k: .*\.detach\(\)"):
        other(X)
    with pytest.raises(TypeError, match=r"^query: .*\.detach\(\)"):
        layer(torch.ones(3, 32, requires_grad=True))


def test_what_torch_has_besides():
    torch = pytest.importorskip("torch", reason="it is held to PyTorch's layer")
    for name in ("add_bias_kv", "add_zero_attn"):
        module = torch.nn.MultiheadAttention(8, 2, **{name: True})
        with pytest.raises(ValueError, match=r"^module: expected no .*, got add_"):
            MultiHeadAttention.from_torch(module)
    with pytest.raises(TypeError, match=r"^module: expected a torch\.nn\.Multi.*, got Linear"):
        MultiHeadAttention.from_torch(torch.nn.Linear(8, 2))
    from torch.nn.attention.bias import causal_upper_left

    with pytest.raises(TypeError, match=r"^mask: .*CausalBias; pass causal=True"):
        MultiHeadAttention(8, 2, rng=0)(np.ones((3, 8)), mask=causal_upper_left(3, 3))


def test_errors_of_a_state_change_nothing():
    layer = MultiHeadAttention(8, 2, rng=0)
    before = layer.parameters
    state = {"in_proj_weight": np.zeros((24, 8)), "in_proj_bias": np.zeros(24),
             "out_proj.weight": np.zeros((8, 8)), "out_proj.bias": np.zeros(8)}  # fmt: skip
    for wrong in (
        {name: state[name] for name in list(state)[:3]},
        {**state, "bias_k": np.zeros(3)},
        {**state, "out_proj.bias": np.zeros(9)},
        {**state, "in_proj_weight": np.zeros((26, 8))},
    ):
        with pytest.raises(ValueError, match=r"^state: expected .*, got "):
            layer.load_torch(wrong)
    for wrong in (None, [], *({**state, "in_proj_weight": x} for x in ("a", None, 1j))):
        with pytest.raises(TypeError, match=r"^state: .*expected .*, got "):
            layer.load_torch(wrong)
        assert all(layer.parameters[name] is x for name, x in before.items())
    layer.load_torch(state)
    assert not layer(np.ones((3, 8))).any()


@pytest.mark.parametrize("args, options, error, message", [
    ((30, 4), {}, ValueError, "num_heads: expected a divisor of embed_dim 30, got 4"),
    ((32, 4), {"kv_heads": 3}, ValueError, "kv_heads: expected a divisor of num_heads 4, got 3"),
    ((0, 4), {}, ValueError, "embed_dim: expected at least 1, got 0"),
    ((32, 4), {"key_dim": 2.5}, TypeError, "key_dim: expected an integer, got float"),
    ((32, 4), {"bias": 1}, TypeError, "bias: expected bool, got int"),
    ((32, 4), {"dtype": "int32"}, TypeError, "dtype: expected one of float32, .*, got 'int32'"),
    ((32, 4), {"dtype": None}, TypeError, "dtype: expected one of float32, .*, got None"),
    ((32, 4), {"rng": "a"}, TypeError, "rng: expected a Generator or a seed, got 'a'"),
    ((32, 4), {"rng": -1}, ValueError, "rng: expected a Generator or a seed, got -1"),
    ((32, 4), {"dtype": complex}, TypeError, "dtype: expected .*, got complex128"),
    ((32, 4), {"dtype": "decimal"}, TypeError, "dtype: expected float16, .*, got 'decimal'"),
    ((32, 4), {"dtype": object()}, TypeError, "dtype: expected float16, .*, got <object"),
])  # fmt: skip
def test_errors_of_making(args, options, error, message):
    with pytest.raises(error, match="^" + message):
        MultiHeadAttention(*args, **options)


@pytest.mark.parametrize("args, options, error, message", [
    ((X[..., :31],), {}, ValueError, r"query: expected .* 32\), got \(3, 10, 31\)"),
    ((X, Y), {}, ValueError, r"key: expected shape"),
    ((X, X, Z), {}, ValueError, r"value: expected shape"),
    ((X[0, 0],), {}, ValueError, r"query: expected shape .*, got \(32,\)"),
    ((X + 1j,), {}, TypeError, "query: expected .*, got complex128"),
    ((X,), {"out": X}, TypeError, "out: expected None, got ndarray"),
    ((X,), {"mask": np.ones((9, 9), bool)}, ValueError, "mask: expected a shape"),
    ((X, X, X[:, :9]), {}, ValueError, "value: expected length 10 as in key, got 9"),
    ((X, X[:2]), {}, ValueError, "key: expected leading axes"),
    ((X, X[:1], X[:2]), {}, ValueError, "value: expected leading axes"),
    ((X,), {"scores": 1}, TypeError, r"scores: MultiHeadAttention\(\) has no such option"),
    ((X,), {"block_table": [[0]]}, TypeError, r"block_table: MultiHeadAttention\(\) has no such"),
])  # fmt: skip
def test_errors_of_calls(monkeypatch, args, options, error, message):
    """They come before any work."""
    module = sys.modules["fastattn.multihead"]
    layer = MultiHeadAttention(32, 4, rng=0)
    monkeypatch.setattr(module, "project", lambda *args: pytest.fail("it projects"))
    with pytest.raises(error, match="^" + message):
        layer(*args, **options)
    with pytest.raises((TypeError, ValueError), match="^" + message.split(":")[0]):
        fastattn.vjp(layer, *args, **options)


def test_a_parameter_of_another_shape():
    layer = MultiHeadAttention(32, 4, rng=0)
    layer.w_k = np.ones((32, 8))
    with pytest.raises(ValueError, match=r"^w_k: expected shape \(32, 32\), got \(32, 8\)"):
        layer(X)


def test_public():
    assert "MultiHeadAttention" in fastattn.__all__
    assert repr(MultiHeadAttention(8, 2)).startswith("MultiHeadAttention(8, 2, kv_heads=2")
