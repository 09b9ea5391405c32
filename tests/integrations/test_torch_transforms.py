"""`fastattn.integrations.torch` under torch.func, autocast and what torch has besides tensors."""

import itertools
from functools import partial

import numpy as np
import pytest
from test_torch import DTYPES, TOLERANCE, compiles, ours, scaled_dot, tensors, theirs

torch = pytest.importorskip("torch", reason="it is what this integrates with")

from torch.autograd import forward_ad  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

# torch's own vmap of its attention, and what torch.func.jvp imports when first called.
warns = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning",
                                   "ignore::FutureWarning")  # fmt: skip


def doubles(n=3):
    """n problems of q, k and v in float64, one after the other."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 2, 5, 8, generator=generator, dtype=torch.float64).unbind(1)


# ------------------------------------------------------------------------------- torch.func


def transforms(function):
    """What torch.func makes of ``function(q, k, v)``, each of three problems at once."""

    def loss(q, k, v):
        return function(q, k, v).square().sum()

    func = torch.func
    gradient = func.grad(loss, argnums=(0, 1, 2))
    return {
        "grad": lambda q, k, v: gradient(q[0], k[0], v[0]),
        "vjp": lambda q, k, v: func.vjp(function, q[0], k[0], v[0])[1](q[1]),
        "jacrev": lambda q, k, v: func.jacrev(function)(q[0], k[0], v[0]),
        "vmap": torch.vmap(function),
        "vmap along another axis": lambda q, k, v: torch.vmap(
            function, in_dims=(1, None, 1), out_dims=2
        )(q.movedim(0, 1), k[0], v.movedim(0, 1)),
        "vmap of vmap": lambda q, k, v: torch.vmap(
            torch.vmap(function, in_dims=(None, 0, 0)), in_dims=(0, None, None)
        )(q, k, v),
        "vmap of grad": torch.vmap(gradient),
        "vmap of grad of shared keys": lambda q, k, v: torch.vmap(
            gradient, in_dims=(0, None, None)
        )(q, k[0], v[0]),
        "grad of vmap": func.grad(
            lambda *x: torch.vmap(function)(*x).square().sum(), argnums=(0, 1, 2)
        ),
    }


@warns
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("name", transforms(theirs))
def test_transforms_are_torchs(name, options):
    found, wanted = (transforms(lambda *x, f=f: f(*x, **options))[name](*doubles())
                     for f in (ours, theirs))  # fmt: skip
    torch.testing.assert_close(found, wanted)


def test_other_transforms():
    q, k, v = doubles(1)
    assert torch.equal(torch.func.functionalize(ours)(q, k, v), ours(q, k, v))
    with pytest.raises(NotImplementedError, match=r"^in_dims: expected an axis of at least 1"):
        torch.vmap(ours)(q[:0], k[:0], v[:0])


def test_vmap_passes_gradients_on():
    q, k, v = (x.requires_grad_() for x in doubles())
    found, wanted = (torch.autograd.grad(torch.vmap(f)(q, k, v).square().sum(), (q, k, v))
                     for f in (ours, torch.vmap(ours)))  # fmt: skip
    torch.testing.assert_close(found, wanted)


def test_per_sample_gradients_of_options():
    """Of slopes and sinks, which have no leading axes of their own."""
    q, k, v = doubles()
    slopes, sinks = torch.rand(2, 3, 2, dtype=torch.float64).unbind()

    def loss(q, k, v, slopes, sinks):
        out, lse = scaled_dot(q, k, v, alibi=slopes, sinks=sinks, window=2, return_lse=True)
        return out.square().sum() + lse.sum()

    gradient = torch.func.grad(loss, argnums=(0, 3, 4))
    found = torch.vmap(gradient)(q, k, v, slopes, sinks)
    each = [torch.autograd.grad(loss(*x), (x[0], x[3], x[4]))
            for x in zip(*(y.clone().requires_grad_() for y in (q, k, v, slopes, sinks)),
                         strict=True)]  # fmt: skip
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))))


def derivatives(function):
    """Forward mode of ``function(q, k, v)``, and second derivatives in every order of modes but
    forward over forward, each at ``x = (q, k, v)`` with tangents `along`.
    """

    def loss(*x):
        return function(*x).square().sum()

    def moved(*x):  # a number that depends on x and on tangents
        return sum(y.sin().sum() for y in func.jvp(function, x[:3], x[3:]))

    def dual(*x):
        with forward_ad.dual_level():
            found = function(*(forward_ad.make_dual(y, y.cos()) for y in x))
            return forward_ad.unpack_dual(found).tangent

    def twice(*x):
        x = [y.clone().requires_grad_() for y in x]
        first = torch.autograd.grad(loss(*x), x, create_graph=True)
        return torch.autograd.grad(sum(y.sin().sum() for y in first), x)

    def batched(*x):
        x = [y.clone().requires_grad_() for y in x]
        out = function(*x)
        grads = torch.stack([out.cos(), out.sin()]).detach()
        return torch.autograd.grad(out, x, grads, is_grads_batched=True)

    func, every = torch.func, (0, 1, 2)
    return {
        "jvp": lambda x, along: func.jvp(function, x, along),
        "jvp of keys": lambda x, along: func.jvp(
            lambda k: function(x[0], k, x[2]), (x[1],), (along[1],)
        ),
        "jacfwd": lambda x, along: func.jacfwd(function, every)(*x),
        "linearize": lambda x, along: func.linearize(function, *x)[1](*along),
        "dual": lambda x, along: dual(*x),
        "dual without grad": lambda x, along: torch.no_grad()(dual)(*x),
        "vmap of jvp": lambda x, along: torch.vmap(
            lambda *y: func.jvp(function, y[:3], y[3:])
        )(*x, *along),
        "jvp of vmap": lambda x, along: func.jvp(torch.vmap(function), x, along),
        "batched gradients": lambda x, along: batched(*x),
        "hessian": lambda x, along: func.hessian(loss, every)(*x),
        "reverse over reverse": lambda x, along: func.jacrev(func.grad(loss, every), every)(*x),
        "reverse over forward": lambda x, along: func.grad(moved, tuple(range(6)))(*x, *along),
        "double backward": lambda x, along: twice(*x),
        "vmap of forward over reverse": lambda x, along: torch.vmap(
            lambda *y: func.jvp(func.grad(loss, every), y[:3], y[3:])
        )(*x, *along),
    }  # fmt: skip


@warns
@pytest.mark.parametrize("name", derivatives(theirs))
def test_derivatives_are_torchs(name):
    """Beside torch's own formula in float64, which it differentiates operation by operation."""
    q, k, v = doubles()
    along = tuple(map(torch.cos, (k, v, q)))
    found = derivatives(lambda *x: ours(*x, is_causal=True))[name]((q, k, v), along)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = derivatives(lambda *x: theirs(*x, is_causal=True))[name]((q, k, v), along)
    torch.testing.assert_close(found, wanted)


@warns
def test_derivatives_of_options():
    """First and second ones, by both modes, against differences."""
    q, k, v = (x[0] for x in doubles())
    shapes = {"scale": (2,), "bias": (5, 5), "alibi": (2,), "sinks": (2,), "relative_bias": (2, 3)}
    rand = partial(torch.rand, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = [x.clone().requires_grad_() for x in (q, k, v, *map(rand, shapes.values()))]

    def attend(q, k, v, *options):
        own = dict(zip(shapes, options, strict=True))
        return scaled_dot(
            q, k, v, causal=True, softcap=2.0, dropout=(0.2, 3), return_lse=True, **own
        )

    torch.autograd.gradcheck(attend, given, check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(attend, given, check_fwd_over_rev=True)


@warns
@pytest.mark.parametrize("transform, words", [
    (lambda f: torch.func.jacfwd(torch.func.jacfwd(f)), "forward mode of forward mode"),
    (lambda f: torch.func.jacrev(torch.func.hessian(f)), "third derivative"),
])  # fmt: skip
def test_derivatives_that_are_refused(transform, words):
    q, k, v = doubles(1)
    with pytest.raises(NotImplementedError, match=f"^scaled_dot: there is no {words}"):
        transform(lambda q: ours(q, k, v).square().sum())(q)


def test_what_has_no_tangent_works_at_a_dual_level():
    q, k, v = doubles(1)
    with forward_ad.dual_level():
        assert torch.equal(ours(q, k, v), ours(q.clone(), k, v))
        assert forward_ad.unpack_dual(ours(q, k, v)).tangent is None


# ------------------------------------------------------------------------------ numbers


@warns
def test_a_softcap_has_no_gradient():
    q, k, v = doubles(1)
    x = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=r"^softcap: expected a number, .* requires a gradient"):
        scaled_dot(q, k, v, softcap=x)
    with torch.no_grad():
        assert torch.equal(scaled_dot(q, k, v, softcap=x), scaled_dot(q, k, v, softcap=0.5))
    for transform in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(TypeError, match=r"^softcap: expected a number"):
            transform(lambda x: scaled_dot(q, k, v, softcap=x).sum())(x.detach())


@compiles
@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("compiled", [False, True])
def test_learned_scales(shape, compiled):
    """Temperatures: as with scaled queries."""
    q, k, v = doubles(1)
    scale = torch.nn.Parameter(torch.rand(shape, dtype=torch.float64))
    attend = ours if shape == () else scaled_dot

    def loss(scale):
        return attend(q, k, v, scale=scale).square().sum()

    if compiled:
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    wanted = theirs(scale.expand(2)[:, None, None] * q, k, v, scale=1.0).square().sum()
    found = loss(scale)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, scale) for x in (found, wanted)))
    with torch.no_grad():
        torch.testing.assert_close(loss(scale), wanted)
    torch.compiler.reset()


@warns
@pytest.mark.parametrize("attend", [scaled_dot, ours])
def test_scale_has_a_gradient(attend):
    q, k, v = doubles(1)
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend(q, k, v, scale=x), x)
    found = torch.func.grad(lambda x: attend(q, k, v, scale=x).sum())(x)
    torch.testing.assert_close(found, torch.autograd.grad(attend(q, k, v, scale=x).sum(), x)[0])


# ------------------------------------------------------------------------------ causal biases


@pytest.mark.filterwarnings("ignore:Lower right causal bias:UserWarning")
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("n_queries, n_keys", [(20, 30), (30, 20), (20, 20)])
def test_causal_biases(make, n_queries, n_keys):
    """torch's class for a mask, whose own memory is never written."""
    q, k, v = tensors(heads=4, kv_heads=2, n_queries=n_queries, n_keys=n_keys)
    mask = make(n_queries, n_keys)
    torch.testing.assert_close(
        ours(q, k, v, attn_mask=mask, enable_gqa=True),
        theirs(q, k, v, attn_mask=mask._materialize(), enable_gqa=True),
    )


@compiles
def test_causal_biases_compiled():
    q, k, v = tensors()
    compiled = torch.compile(lambda q, mask: ours(q, k, v, attn_mask=mask), backend="eager",
                             fullgraph=True)  # fmt: skip
    mask = causal_lower_right(20, 30)
    torch.testing.assert_close(compiled(q, mask), ours(q, k, v, attn_mask=mask))
    torch.compiler.reset()


def test_causal_biases_out_of_place():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"^attn_mask: expected a causal bias of \(20, 30\), got "):
        ours(q, k, v, attn_mask=causal_lower_right(20, 31))
    with pytest.raises(ValueError, match=r"^attn_mask: expected None with is_causal=True"):
        ours(q, k, v, attn_mask=causal_upper_left(20, 30), is_causal=True)
    for name in ("mask", "bias"):
        with pytest.raises(TypeError, match=f"^{name}: .*CausalBias; pass causal=True"):
            scaled_dot(q, k, v, **{name: causal_upper_left(20, 30)})


# ------------------------------------------------------------------------------ other tensors


def others():
    from torch.masked import masked_tensor

    x = torch.ones(2, 20, 16)
    return {
        "nested": (torch.nested.nested_tensor([x, x]), "nested"),
        "jagged": (torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged), "NestedTensor"),
        "sparse": (x.to_sparse(), r"\.to_dense\(\)"),
        "masked": (masked_tensor(x, x > 0), "MaskedTensor"),
        "float8": (x.to(torch.float8_e4m3fn), "Float8"),
        "array": (np.ones((2, 20, 16)), "a tensor, got ndarray"),
        "nothing": (None, "a tensor, got NoneType"),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nested", "jagged", "sparse", "masked", "float8", "array",
                                  "nothing"])  # fmt: skip
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_cannot_be_read(kind, requires_grad):
    value, words = others()[kind]
    for place, (name, name_of_torch) in enumerate([("q", "query"), ("k", "key"), ("v", "value")]):
        given = [torch.ones(2, 20, 16, requires_grad=requires_grad)] * 3
        given[place] = value
        with pytest.raises(TypeError, match=f"^{name}: .*{words}"):
            scaled_dot(*given)
        with pytest.raises(TypeError, match=f"^{name_of_torch}: .*{words}"):
            ours(*given)


def test_other_devices():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"^value: expected device cpu as of query, got meta"):
        ours(q, k, v.to("meta"))
    with pytest.raises(TypeError, match=r"^k: expected device meta as of q, got cpu"):
        scaled_dot(q.to("meta"), k, v)


@pytest.mark.parametrize("mask, words", [
    (torch.ones(20, 30, dtype=torch.int64), "bool or floating point, got torch.int64"),
    (np.ones((20, 30), bool), "a tensor, got ndarray"),
    (torch.ones(20, 30).to_sparse(), "dense"),
])  # fmt: skip
def test_masks_that_torch_refuses(mask, words):
    with pytest.raises(TypeError, match=f"^attn_mask: expected .*{words}"):
        ours(*tensors(), attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lazily_negated_tensors(dtype):
    q, k, v = (x.to(dtype) for x in doubles(1))
    assert torch.equal(ours(torch._neg_view(q), k, torch._neg_view(v)), ours(-q, k, -v))


def test_without_memory():
    """On the meta device and with axes that have no stride, as torch."""
    q, k, v = tensors()
    out = ours(*(x.to("meta") for x in (q, k, v)))
    assert out.is_meta and out.shape == q.shape
    k, v = (x[:1, :1].expand(2, 4, -1, -1) for x in (k, v))
    torch.testing.assert_close(ours(q, k, v), theirs(q, k, v))


def test_subclasses_stay():
    class Named(torch.Tensor):
        pass

    q, k, v = tensors()
    out = ours(q.as_subclass(Named), k, v)
    assert type(out) is type(theirs(q.as_subclass(Named), k, v)) is Named
    assert torch.equal(out.as_subclass(torch.Tensor), ours(q, k, v))


# ------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_autocast_gives_the_dtype_of_torch(dtypes, lower):
    """Where torch takes the mix; float64 it leaves alone, and then it must be all three."""
    given = [x.to(dtype).requires_grad_() for x, dtype in zip(tensors(), dtypes, strict=True)]
    with torch.autocast("cpu", dtype=lower):
        out = ours(*given)
        if dtypes.count(torch.float64) in (0, 3):
            assert out.dtype == theirs(*given).dtype
    exact = theirs(*(x.detach().double() for x in given))
    size = 1 + exact.abs().max().item()
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * TOLERANCE[lower] * size)
    grads = torch.autograd.grad(out.sum(), given)
    assert tuple(x.dtype for x in grads) == dtypes


def test_no_autocast():
    q, k, v = tensors()
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert ours(q, k, v).dtype == torch.float32
