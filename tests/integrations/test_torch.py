"""`fastattn.integrations.torch`: torch's own signature, gradients and the compiler."""

import doctest
import itertools

import numpy as np
import pytest
from helpers.problems import Shape, float_type, options

import fastattn

torch = pytest.importorskip("torch", reason="it is what this integrates with")
pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16, which torch's becomes")

from torch.nn.functional import scaled_dot_product_attention as theirs  # noqa: E402

from fastattn.integrations import torch as integration  # noqa: E402

scaled_dot, ours = integration.scaled_dot, integration.scaled_dot_product_attention

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# A few roundings of numbers of ordinary size, in the dtype of the result.
TOLERANCE = {dtype: 8 * torch.finfo(dtype).eps for dtype in DTYPES}

# torch.compile has torch's own modules warn; the tests turn warnings into errors.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning",
                                      "ignore::FutureWarning")  # fmt: skip


def tensors(heads=4, kv_heads=None, n_queries=20, n_keys=30, dim=16, value_dim=None, batch=2,
            dtype=torch.float32, seed=0, requires_grad=False):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    kv = (batch, kv_heads or heads, n_keys)
    shapes = (batch, heads, n_queries, dim), (*kv, dim), (*kv, value_dim or dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            .requires_grad_(requires_grad) for shape in shapes]  # fmt: skip


def masks():
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(20, 30, generator=generator) < 0.6
    mask[3] = False
    hiding = torch.where(mask, 0.25, -torch.inf)
    scores = torch.randn(2, 1, 20, 30, generator=generator)
    return {
        "nothing": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "bool per key": {"attn_mask": mask[1:2]},
        "scores": {"attn_mask": scores},
        "-inf": {"attn_mask": hiding},
        "scale": {"scale": 0.7, "is_causal": True},
    }


# ------------------------------------------------------------------- torch's own function, replaced


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", masks().values(), ids=masks())
def test_results_and_gradients_are_torchs(options, dtype):
    """Torch's in float64. A row without a key included, for which torch returns 0 as well."""
    arrays, scores = tensors(dtype=dtype), options.get("attn_mask")
    if scores is not None and scores.is_floating_point():
        arrays = [*arrays, scores.to(dtype)]
    found = []
    for function, real in ((ours, dtype), (theirs, torch.float64)):
        sources = [x.detach().to(real).requires_grad_() for x in arrays]
        given = options | dict(zip(["attn_mask"], sources[3:], strict=False))
        out = function(*sources[:3], **given)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        found.append([out, *torch.autograd.grad(out, sources, grad.to(real))])
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        size = 1 + want.detach().abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_memory_order_is_torchs(order, dtype):
    back = [order.index(axis) for axis in range(4)]
    arrays = [x.permute(order).contiguous().permute(back) for x in tensors(dtype=dtype, n_keys=20)]
    assert ours(*arrays).stride() == theirs(*arrays).stride()


def test_packed_projections():
    """Queries, keys and values side by side in one tensor, as models keep them."""
    packed = torch.randn(2, 20, 3, 4, 16)
    arrays = [x.transpose(1, 2) for x in packed.unbind(2)]
    out = ours(*arrays)
    assert out.stride() == theirs(*arrays).stride()
    torch.testing.assert_close(out, theirs(*arrays))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_queries, n_keys", [(20, 30), (30, 20)])
def test_causal_starts_at_the_first_key(is_causal, n_queries, n_keys):
    arrays = tensors(n_queries=n_queries, n_keys=n_keys)
    torch.testing.assert_close(
        ours(*arrays, is_causal=is_causal), theirs(*arrays, is_causal=is_causal)
    )


def test_grouped_heads():
    arrays = tensors(heads=6, kv_heads=2, value_dim=8)
    torch.testing.assert_close(
        ours(*arrays, enable_gqa=True), theirs(*arrays, enable_gqa=True), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"^key: expected 6 heads .*, got 2; pass enable_gqa"):
        ours(*arrays)
    for name in ("is_causal", "enable_gqa"):
        with pytest.raises(TypeError, match=f"^{name}: expected bool, got int"):
            ours(*arrays, **{name: 1})


@pytest.mark.parametrize("n_axes", [2, 3, 5])
def test_any_number_of_axes(n_axes):
    arrays = tensors(batch=3)
    arrays = [x[0, 0] if n_axes == 2 else x[0] if n_axes == 3 else x[None] for x in arrays]
    torch.testing.assert_close(ours(*arrays), theirs(*arrays), rtol=0, atol=1e-5)


def test_keys_of_every_entry_of_the_batch():
    q, k, v = tensors()
    k, v = k[:1].requires_grad_(), v[:1].requires_grad_()
    out = ours(q, k, v)
    torch.testing.assert_close(out, theirs(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)))
    out.sum().backward()
    assert (k.grad.shape, v.grad.shape) == (k.shape, v.shape)


@pytest.mark.parametrize("options, message", [
    ({"dropout_p": 1.0}, "dropout_p: expected a rate of at least 0 and below 1, got 1.0"),
    ({"is_causal": True, "attn_mask": torch.ones(20, 30)}, "attn_mask: expected None with"),
    ({"attn_mask": torch.ones(3)}, r"attn_mask: expected a shape .*, got \(3,\)"),
])  # fmt: skip
def test_errors(options, message):
    with pytest.raises(ValueError, match=r"^" + message):
        ours(*tensors(), **options)


# ---------------------------------------------------------------------------- with our own options


@pytest.mark.parametrize("names", [("causal",), ("window", "softcap"), ("bias", "sinks", "mask"),
                                   ("kv_lengths", "causal", "q_offset"), ("spans", "alibi")],
                         ids="+".join)  # fmt: skip
@pytest.mark.parametrize("as_tensors", [False, True])
def test_options_are_those_of_scaled_dot(names, as_tensors):
    shape = Shape(2, 4, 20, 30, 16, kv_heads=2)
    arrays, chosen = shape.arrays(), options(names, shape)
    (out, lse), pullback = fastattn.vjp(fastattn.scaled_dot, *arrays, return_lse=True, **chosen)
    given = dict(chosen)
    if as_tensors:
        for name, x in chosen.items():
            if isinstance(x, np.ndarray):
                given[name] = torch.from_numpy(x)
            elif name == "spans":
                given[name] = tuple(map(torch.from_numpy, x))
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in arrays)
    result = scaled_dot(q, k, v, return_lse=True, **given)
    for got, want in zip(result, (out, lse), strict=True):
        np.testing.assert_array_equal(got.detach().numpy(), want)
    grads = [torch.ones_like(x) for x in result]
    found = torch.autograd.grad(result, (q, k, v), grads)
    for got, want in zip(found, pullback(*(x.numpy() for x in grads)), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x.astype(">f4"),
                                    lambda x: x.astype(np.longdouble), np.ndarray.tolist,
                                    lambda x: x.astype(float_type("bfloat16"))])  # fmt: skip
def test_arrays_as_options_with_gradients(change):
    """Whatever `fastattn.scaled_dot` takes, as without gradients."""
    q, k, v = tensors()
    bias = change(np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32))
    out = scaled_dot(q.requires_grad_(), k, v, bias=bias)
    torch.testing.assert_close(out.detach(), scaled_dot(q.detach(), k, v, bias=bias))
    out.sum().backward()
    for name, value in (("bias", np.ones((20, 30), complex)), ("sinks", ["a"] * 4)):
        with pytest.raises(TypeError, match=f"^{name}: expected real numbers"):
            scaled_dot(q, k, v, **{name: value})


def test_backend_threads_and_precision_are_passed_on():
    arrays = tensors()
    with pytest.raises(ValueError, match=r"^backend: expected .*, got 'nobody'"):
        scaled_dot(*arrays, backend="nobody")
    with pytest.raises(ValueError, match=r"^threads: expected at least 1, got 0"):
        scaled_dot(*arrays, threads=0)
    with pytest.raises(ValueError, match=r"^precision: expected .* got 'x'"):
        scaled_dot(*arrays, precision="x")
    with pytest.raises(ValueError, match=r"^window: expected .*, got 3 sides"):
        scaled_dot(*arrays, window=(1, 2, 3))
    with pytest.raises(TypeError, match=r"^spans: expected \(start, stop\), got tuple"):
        scaled_dot(*arrays, spans=(1, 2, 3))
    out = scaled_dot(*arrays, backend="reference", threads=1)
    torch.testing.assert_close(out, scaled_dot(*arrays), rtol=0, atol=1e-6)


def test_scale_of_each_head_has_a_gradient():
    q, k, v = tensors()
    scale = torch.linspace(0.1, 0.4, 4, requires_grad=True)
    out, row_max = scaled_dot(q, k, v, scale=scale, return_max=True)
    scores = scale[:, None, None] * (q @ k.mT)
    wanted = scores.softmax(-1) @ v
    torch.testing.assert_close((out, row_max), (wanted, scores.amax(-1).detach()))
    found, want = (torch.autograd.grad(x.square().sum(), scale) for x in (out, wanted))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert not row_max.requires_grad


def test_gradient_through_lse_alone():
    q, k, v = tensors(dtype=torch.float64, requires_grad=True)
    _, lse = scaled_dot(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    wanted = torch.autograd.grad(torch.logsumexp(q @ k.mT / 4, -1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), wanted)
    assert not dv.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tensor_is_copied(monkeypatch, dtype):
    """What arrives is the tensors' own memory, and what returns is the result's."""
    seen = []

    def attend(q, k, v, **options):
        out = np.zeros_like(q)
        seen.append([q, k, v, out])
        return out

    monkeypatch.setattr(fastattn, "scaled_dot", attend)
    arrays = [x.transpose(1, 2) for x in tensors(n_keys=20, dtype=dtype)]
    out = ours(*arrays)
    ours_too = [x.__array_interface__["data"][0] for x in seen[0]]
    assert ours_too == [x.data_ptr() for x in (*arrays, out)]


# ------------------------------------------------------------------------ an operator like torch's


def differentiable():
    """Small, in float64: every tensor that takes part in gradients."""
    arrays = tensors(heads=4, kv_heads=2, n_queries=4, n_keys=5, dim=3, batch=1,
                     dtype=torch.float64, requires_grad=True)  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    options = [torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
               for shape in ((4, 1, 5), (4,), (4,))]  # fmt: skip
    return arrays, options


def test_gradcheck():
    arrays, (bias, alibi, sinks) = differentiable()
    assert torch.autograd.gradcheck(lambda *x: ours(*x, is_causal=True, enable_gqa=True), arrays)

    def attend(q, k, v, bias, alibi, sinks):
        return scaled_dot(
            q, k, v, bias=bias, alibi=alibi, sinks=sinks, softcap=2.0, window=(2, None),
            return_lse=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (*arrays, bias, alibi, sinks))


@compiles
@pytest.mark.parametrize("n_options", [0, 1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_opcheck(n_options, order):
    arrays, options = differentiable()
    arrays = [x.detach().permute(order).contiguous().permute(order).requires_grad_()
              for x in arrays]  # fmt: skip
    forward = torch.ops.fastattn.scaled_dot.default
    backward = torch.ops.fastattn.scaled_dot_backward.default
    options = dict(zip(["bias", "alibi", "sinks"][:n_options], options, strict=False))
    given = {**options, "causal": True, "return_lse": True}
    torch.library.opcheck(forward, (*arrays,), {**given, "return_max": n_options > 1})
    results = [x.detach() for x in forward(*arrays, **given)[:2]]
    arrays = [x.detach() for x in arrays]
    options = {name: x.detach() for name, x in options.items()}
    given = {**options, "wrt": list(options)}
    torch.library.opcheck(backward, (*results, *arrays, *results), given)
    along = [x.cos() for x in arrays] + [None] * 5
    tangents, second = (
        getattr(torch.ops.fastattn, f"scaled_dot_{name}").default for name in ("tangents", "second")
    )
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(tangents, (*along, *arrays), options, test_utils=tests)
    torch.library.opcheck(second, (*along, *results, *arrays), given, test_utils=tests)


@compiles
@pytest.mark.parametrize("compiler, dynamic", [("inductor", True), ("aot_eager", False)])
def test_compiled_without_a_break(compiler, dynamic):
    def loss(q, k, v, mask, bias):
        out = ours(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        more, lse = scaled_dot(out, k.transpose(1, 2), v.transpose(1, 2), bias=bias,
                               window=(5, 3), q_offset=2, return_lse=True)  # fmt: skip
        return (more * more).sum() + lse.sum()

    compiled = torch.compile(loss, backend=compiler, fullgraph=True, dynamic=dynamic)
    for n in (20, 24):
        arrays = [x.detach().transpose(1, 2).contiguous().requires_grad_()
                  for x in tensors(n_queries=n, n_keys=n)]  # fmt: skip
        more = torch.rand(n, n) < 0.8, torch.randn(4, 1, n, requires_grad=True)
        sources = [*arrays, more[1]]
        wanted = torch.autograd.grad(loss(*arrays, *more), sources)
        found = torch.autograd.grad(compiled(*arrays, *more), sources)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_no_gradient_no_graph():
    q, k, v = tensors(requires_grad=True)
    with torch.no_grad():
        assert not ours(q, k, v).requires_grad
    with torch.inference_mode():
        assert not ours(q, k, v).requires_grad
    assert not ours(q.detach(), k.detach(), v.detach()).requires_grad
    assert ours(q, k, v).requires_grad


def test_docstrings():
    failed, attempted = doctest.testmod(integration)
    assert attempted > 0
    assert failed == 0


# ------------------------------------------------------------------------------------- dropout


def test_dropout_follows_torchs_generator():
    q, k, v = tensors()

    def drawn(seed):
        torch.manual_seed(seed)
        return ours(q, k, v, dropout_p=0.3), ours(q, k, v, dropout_p=0.3)

    first, second = drawn(1)
    assert not torch.equal(first, second) and not torch.equal(first, ours(q, k, v))
    assert all(map(torch.equal, drawn(1), (first, second)))
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, ()))
    own = fastattn.scaled_dot(*(x.numpy() for x in (q, k, v)), dropout=(0.3, seed))
    np.testing.assert_array_equal(first, own)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("seed", [torch.ones(2, dtype=torch.int64), torch.tensor(0.5)], ids=str)
def test_wrong_seeds(requires_grad, seed):
    arrays = tensors(requires_grad=requires_grad)
    with pytest.raises(TypeError, match=r"^dropout: expected a seed that is one integer, got "):
        scaled_dot(*arrays, dropout=(0.1, seed))


def test_dropout_has_gradients():
    """Those of the call itself: the same weights are dropped again, compiled or not."""
    q, k, v = (x.double().requires_grad_() for x in tensors())
    for seed in (5, 2**64 - 1, torch.tensor(-7)):
        given = {"dropout": (0.3, seed), "dropout_offset": (1, 2, 3, 4)}
        assert torch.autograd.gradcheck(
            lambda *x, given=given: scaled_dot(*x, **given),
            (q[..., :3, :], k[..., :4, :], v[..., :4, :]),
        )


def test_dropout_is_compiled():
    q, k, v = tensors()
    compiled = torch.compile(
        lambda *x: ours(*x, dropout_p=0.3), fullgraph=True, backend="aot_eager"
    )
    q.requires_grad_()
    outs = [compiled(q, k, v) for _ in range(2)]
    assert not torch.equal(*outs)
    outs[0].sum().backward()
    assert q.grad.isfinite().all()
