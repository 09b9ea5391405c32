"""`fastattn.integrations.jax`: JAX's own signature, its transformations, and no copies."""

import doctest
import threading
from functools import partial

import numpy as np
import pytest
from helpers.problems import Shape, options

import fastattn

jax = pytest.importorskip("jax", reason="it is what this integrates with")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

from fastattn.integrations import jax as integration  # noqa: E402
from fastattn.integrations import jax_operators  # noqa: E402

scaled_dot, ours = integration.scaled_dot, integration.dot_product_attention
theirs = jax.nn.dot_product_attention  # slow to compile, so each test does it once or twice

BATCH, HEADS, N_QUERIES, N_KEYS = 2, 6, 20, 30


def arrays(dtype="float32", n_queries=N_QUERIES, kv_heads=2):
    """q, k and v, (batch, length, heads, dim)."""
    shape = Shape(BATCH, HEADS, n_queries, N_KEYS, 16, kv_heads)
    return [jnp.asarray(x.swapaxes(1, 2)) for x in shape.arrays(dtype)]


def given():
    rng = np.random.default_rng(1)
    mask = rng.random((N_QUERIES, N_KEYS)) < 0.6
    bias = rng.standard_normal((1, HEADS, N_QUERIES, N_KEYS), "float32")
    lengths = np.array([[20, 5], [7, 40]], "int32")  # beyond the end is as good as the end
    return {
        "nothing": {},
        "window": {"local_window_size": (3, 12), "is_causal": True, "scale": 0.7},
        "mask": {"mask": mask, "bias": bias},
        "mask of heads": {"mask": mask[:HEADS, None], "local_window_size": 12},
        "bias of 3 axes": {"bias": bias[0, :, :1], "is_causal": True},
        "lengths": {"query_seq_lengths": lengths[0], "key_value_seq_lengths": lengths[1]},
        "length of keys": {"key_value_seq_lengths": lengths[1], "is_causal": True},
    }


def close(got, want, dtype="float32"):
    """A few roundings of numbers of ordinary size, in the dtype of the result."""
    assert got.dtype == dtype and got.shape == want.shape
    got, want = np.asarray(got).astype("float32"), np.asarray(want)
    tolerance = 8 * float(jnp.finfo(dtype).eps) * (1 + np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def with_gradients(function, chosen, *primals):
    """Result and gradients of q, k, v and a bias, compiled."""
    chosen = dict(chosen)
    primals += (chosen.pop("bias"),) if "bias" in chosen else ()
    grad_out = np.linspace(-1, 1, primals[0].size, dtype="float32").reshape(primals[0].shape)

    @jax.jit
    def run(*primals):
        out, pullback = jax.vjp(lambda *x: function(*x, **chosen), *primals)
        return out, *pullback(grad_out.astype(out.dtype))

    return run(*primals)


@pytest.mark.parametrize("name", given())
def test_results_and_gradients_are_jaxs(name):
    chosen, operands = given()[name], arrays()
    got, want = (with_gradients(f, chosen, *operands) for f in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        close(a, b)
    np.testing.assert_array_equal(ours(*operands, **chosen), got[0])  # eagerly, without gradients


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    """Beside float32: in float16 JAX has no kernel for the CPU."""
    chosen, operands = given()["window"], arrays(dtype)
    got = with_gradients(ours, chosen, *operands)
    want = with_gradients(ours, chosen, *(x.astype("float32") for x in operands))
    for a, b in zip(got, want, strict=True):
        close(a, b, dtype)


def test_residual_is_jaxs():
    """And is a constant to gradients, as JAX's."""
    q, k, v = arrays()

    def loss(q, attend):
        out, residual = attend(q, k, v, is_causal=True, return_residual=True)
        return (out * residual[..., None]).sum(), (out, residual)

    both = [jax.jit(jax.grad(partial(loss, attend=f), has_aux=True))(q) for f in (ours, theirs)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        close(a, b)
    half = ours(*(x.astype("bfloat16") for x in (q, k, v)), return_residual=True)
    assert half[1].dtype == "bfloat16"


def test_scale_that_is_traced():
    """And one of NumPy, which is as good as a number."""
    q, k, v = arrays()

    def loss(scale, attend):
        out = attend(q, k, v, scale=scale / jnp.sqrt(16))
        return (out**2).mean(), out  # of ordinary size, as `close` has it

    both = [jax.jit(jax.grad(partial(loss, attend=f), has_aux=True))(0.7) for f in (ours, theirs)]
    for a, b in zip(*both, strict=True):
        close(a, b)
    close(ours(q, k, v, scale=np.array(0.7) / 4), both[0][1])


def test_padding_and_hidden_rows():
    lengths = {"query_seq_lengths": np.array([20, 5]), "key_value_seq_lengths": np.array([0, 7])}
    q, k, v = (np.array(x) for x in arrays())
    for x in (q, k, v):
        x[1, 7:] = np.nan
    out, residual = map(np.asarray, ours(q, k, v, return_residual=True, **lengths))
    hidden = np.ones((BATCH, N_QUERIES), bool)
    hidden[1, :5] = False
    assert not out[hidden].any() and (residual[hidden] == -np.inf).all()
    assert np.isfinite(out).all() and out[1, :5].all()
    seen = ours(q[1:, :5], k[1:, :7], v[1:, :7])
    np.testing.assert_allclose(out[1:, :5], seen, rtol=0, atol=1e-6)


def test_without_a_batch():
    q, k, v = (x[0] for x in arrays())
    chosen = {"is_causal": True, "key_value_seq_lengths": np.array([9], "int32")}
    got, want = (
        jax.jit(partial(f, return_residual=True, **chosen))(q, k, v) for f in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        close(a, b)


# --------------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("axes", [(0, None, None, None), (None, 1, 1, None), (None, None, None, 0)])
def test_vmap(axes):
    """What is the same for the whole batch has a gradient for each of its places."""
    operands = [*map(np.asarray, arrays()), given()["mask"]["bias"]]
    batched = [
        x if axis is None else np.stack([x, x / 2, -x], axis)
        for x, axis in zip(operands, axes, strict=True)
    ]

    def loss(*x):
        out = ours(*x, is_causal=True)
        return (out**2).sum(), out

    differentiate = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    found = jax.tree.leaves(jax.jit(jax.vmap(differentiate, axes))(*batched))
    for n in range(3):
        here = zip(batched, axes, strict=True)
        alone = differentiate(*(x if axis is None else x.take(n, axis) for x, axis in here))
        for got, want in zip(found, jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(got[n], want)


def test_vmap_of_sinks_and_of_what_has_no_leading_axes():
    """One of each per model of an ensemble."""
    q, k, v = (np.asarray(x)[0].swapaxes(0, 1) for x in arrays())
    sinks = np.arange(18, dtype="float32").reshape(3, HEADS)
    lengths, masks = np.array([3, 30, 0]), np.random.default_rng(1).random((3, 20, 30)) < 0.5

    def loss(q, sinks, lengths, mask):
        out, lse = scaled_dot(q, k, v, sinks=sinks, kv_lengths=lengths, mask=mask, return_lse=True)
        return (out**2).sum() + lse.sum()

    differentiate = jax.jit(jax.grad(loss, (0, 1)))
    found = jax.jit(jax.vmap(differentiate, (None, 0, 0, 0)))(q, sinks, lengths, masks)
    for n in range(3):
        wanted = differentiate(q, sinks[n], lengths[n], masks[n])
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(got[n], want)

    many = jax.vmap(lambda n: scaled_dot(q, k, v, spans=(0, n)))(np.array([4, 9]))
    np.testing.assert_array_equal(many[1], scaled_dot(q, k, v, spans=(0, 9)))


def test_loops_and_checkpoints():
    q, k, v = arrays(n_queries=N_KEYS, kv_heads=HEADS)

    def loss(attend, q):
        step = jax.checkpoint(lambda x, _: (attend(x, k, v, is_causal=True), None))
        return (jax.lax.scan(step, q, length=3)[0] ** 2).sum()

    got, want = (jax.jit(jax.grad(lambda q, f=f: loss(f, q)))(q) for f in (ours, theirs))
    close(got, want)


def test_many_threads():
    """Each waits for its results while XLA calls back."""
    operands = arrays()
    loss = jax.jit(jax.grad(lambda q, k, v: (ours(q, k, v) * ours(q, v, k)).sum()))
    want, found = loss(*operands), []

    def work():
        found.extend(jax.block_until_ready(loss(*operands)) for _ in range(20))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 80
    for x in found:
        np.testing.assert_array_equal(x, want)


def derivatives(function):
    """Derivatives of ``function(q, k, v)`` at ``x = (q, k, v)``, some along tangents, in every mode
    and pair of modes but forward over forward.
    """
    every = (0, 1, 2)

    def loss(*x):
        return (function(*x) ** 2).sum()

    def moved(*x):  # a number that depends on x and on tangents
        return sum(jnp.sin(y).sum() for y in jax.jvp(function, x[:3], x[3:]))

    def pushed(*x):
        return jax.jvp(function, x[:3], x[3:])

    def curved(*x):
        return jax.jvp(jax.grad(loss, every), x[:3], x[3:])

    def small(x):
        return tuple(y[0, :1, :, :2] for y in x)

    return {
        "jvp": lambda x, along: jax.jvp(function, x, along),
        "compiled jvp": lambda x, along: jax.jit(pushed)(*x, *along),
        "jvp of keys": lambda x, along: jax.jvp(
            lambda k: function(x[0], k, x[2]), x[1:2], along[1:2]
        ),
        "jacfwd": lambda x, along: jax.jacfwd(function, every)(*small(x)),
        "linearize": lambda x, along: jax.linearize(function, *x)[1](*along),
        "transpose": lambda x, along: jax.linear_transpose(
            jax.linearize(function, *x)[1], *x
        )(along[0]),
        "jacrev": lambda x, along: jax.jacrev(function, every)(*small(x)),
        "vmap of jvp": lambda x, along: jax.vmap(pushed)(*x, *along),
        "vmap of tangents": lambda x, along: jax.vmap(
            lambda dq: jax.jvp(lambda q: function(q, *x[1:]), x[:1], (dq,))
        )(jnp.stack(along)),
        "jvp of vmap": lambda x, along: jax.jvp(jax.vmap(function), x, along),
        "grad of vmap": lambda x, along: jax.grad(
            lambda *y: (jax.vmap(function, (0, None, 0))(y[0], y[1][0], y[2]) ** 2).sum(), every
        )(*x),
        "jvp of a loop": lambda x, along: jax.jvp(
            lambda q: jax.lax.scan(lambda y, _: (function(y, *x[1:]), 0), q, length=2)[0],
            x[:1], along[:1],
        ),
        "hessian": lambda x, along: jax.hessian(loss, every)(*small(x)),
        "forward over reverse": lambda x, along: curved(*x, *along),
        "vmap of forward over reverse": lambda x, along: jax.vmap(curved)(*x, *along),
        "reverse over reverse": lambda x, along: jax.jacrev(jax.grad(loss, every), every)(
            *small(x)
        ),
        "reverse over forward": lambda x, along: jax.grad(moved, tuple(range(6)))(*x, *along),
    }  # fmt: skip


def plainly(q, k, v):
    """In JAX's own operations, as its function rounds the softmax to float32."""
    weights = jax.nn.softmax(q @ k.mT / jnp.sqrt(q.shape[-1]))
    return weights @ v


@pytest.mark.parametrize("name", derivatives(plainly))
def test_derivatives_are_jaxs(name):
    with jax.enable_x64(True):
        x = tuple(jax.random.normal(jax.random.key(0), (3, 2, 2, 3, 4), "float64"))
        along = tuple(map(jnp.cos, (x[1], x[2], x[0])))
        found, wanted = (derivatives(f)[name](x, along) for f in (scaled_dot, plainly))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, wanted)


@pytest.mark.parametrize("mapped", [False, True])
def test_derivatives_of_options(mapped):
    """First and second ones in both modes; mapped, options of heads have leading axes."""
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 3, 2), "k": (2, 5, 2), "v": (2, 5, 2), "bias": (3, 5), "sinks": (4,),
              "alibi": (4,), "relative_bias": (4, 3), "scale": (4,)}  # fmt: skip
    with jax.enable_x64(True):
        x = {name: jnp.asarray(rng.random(shape)) for name, shape in shapes.items()}

        def call(x):
            return scaled_dot(**x, causal=True, softcap=2.0, dropout=(0.2, 3), return_lse=True)

        def function(x):
            if not mapped:
                return call(x)
            return jax.vmap(call)(jax.tree.map(lambda y: jnp.stack([y, 2 * y]), x))

        check_grads(jax.jit(function), (x,), order=1, modes=("fwd", "rev"))

        def loss(x):
            return sum((y**2).sum() for y in function(x))

        check_grads(jax.jit(jax.grad(loss)), (x,), order=1, modes=("fwd", "rev"))


def test_derivatives_that_are_refused():
    q = arrays()[0][:1, :2, :1, :2]

    def loss(q):
        return (ours(q, q, q) ** 2).sum()

    for transform in (
        lambda f: jax.jacfwd(jax.jacfwd(f)),
        lambda f: jax.jit(jax.jacfwd(jax.jacfwd(f))),
    ):
        with pytest.raises(NotImplementedError, match=r"^scaled_dot: there is no forward mode of"):
            transform(loss)(q)
    with pytest.raises(NotImplementedError, match=r"^scaled_dot: there is no third derivative"):
        jax.jacrev(jax.hessian(loss))(q)


# ---------------------------------------------------------------------------- with our own options


@pytest.mark.parametrize("names", [("causal",), ("window", "softcap"), ("bias", "sinks", "mask"),
                                   ("kv_lengths", "causal", "q_offset"), ("spans", "alibi")],
                         ids="+".join)  # fmt: skip
def test_options_are_those_of_scaled_dot(names):
    """To the bit, in float32 and, with slopes of float64, in float64."""
    shape = Shape(2, 4, 20, 30, 16, kv_heads=2)
    operands = shape.arrays("float64" if "alibi" in names else "float32")
    chosen = options(names, shape)
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].astype("float32")
    results, pullback = fastattn.vjp(fastattn.scaled_dot, *operands, return_lse=True, **chosen)

    @jax.jit
    def run(*operands):
        found, pullback = jax.vjp(lambda *x: scaled_dot(*x, return_lse=True, **chosen), *operands)
        return *found, *pullback(tuple(jnp.ones_like(x) for x in found))

    with jax.enable_x64("alibi" in names):
        found = run(*operands)
    grads = pullback(*(np.ones_like(x) for x in results))
    for got, want in zip(found, (*results, *grads), strict=True):
        np.testing.assert_array_equal(got, want)


def test_scales_and_relative_bias_with_gradients():
    """Traced, and mapped beside what is not."""
    shape = Shape(2, 4, 20, 30, 16, kv_heads=2)
    q, k, v = shape.arrays()
    rng = np.random.default_rng(2)
    scales, biases = rng.uniform(0.1, 1, (3, 4)), rng.standard_normal((3, 4, 9))
    scales, biases = scales.astype("float32"), biases.astype("float32")

    def loss(q, scale, relative_bias):
        out, row_max = scaled_dot(
            q, k, v, scale=scale, relative_bias=relative_bias, return_max=True, causal=True
        )
        return (out**2).sum(), row_max

    differentiate = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    found = jax.jit(jax.vmap(differentiate, (None, 0, 0)))(q, scales, biases)
    for n in range(3):
        given = {"scale": scales[n], "relative_bias": biases[n], "causal": True}
        (out, row_max), pullback = fastattn.vjp(
            fastattn.scaled_dot, q, k, v, wrt=("scale", "relative_bias"), return_max=True, **given
        )
        dq, _, _, *rest = pullback(2 * out)
        for got, want in zip(jax.tree.leaves(found), (dq, *rest, row_max), strict=True):
            np.testing.assert_array_equal(got[n], want)


def test_two_axes_are_one_head():
    q, k, v = (np.asarray(x)[0, :, 0] for x in arrays())
    got = scaled_dot(q, k, v, return_lse=True)
    want = fastattn.scaled_dot(q, k, v, return_lse=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradient_through_lse_alone():
    q, k, v = (x.swapaxes(1, 2) for x in arrays(kv_heads=HEADS))

    def lse(q, k, v):
        return scaled_dot(q, k, v, return_lse=True)[1].sum()

    def formula(q, k, v):
        return jax.nn.logsumexp(q @ k.mT / 4, -1).sum() + 0 * v.sum()

    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (lse, formula))
    for got, want in zip(found, wanted, strict=True):
        close(got, want)


@pytest.mark.parametrize("call, error, message", [
    (lambda q, k, v: ours(q, k, v, implementation="cudnn"), ValueError, "implementation: "),
    (lambda q, k, v: ours(q[0, 0], k, v), ValueError, "query: expected 3 or 4 axes"),
    (lambda q, k, v: ours(q[:1], k, v), ValueError, "query: expected the same batch"),
    (lambda q, k, v: ours(q, k, v.astype(int)), TypeError, "value: expected float16.*, got int32"),
    (lambda q, k, v: ours(q, k[..., :5], v), ValueError, "key: expected head_dim 16 as in q"),
    (lambda q, k, v: ours(q, k, v, mask=q[0, 0]), TypeError, "mask: expected bool, got float32"),
    (lambda q, k, v: [ours(q, k, v, is_causal=x) for x in (True, 1)], TypeError,
     "is_causal: expected bool, got int"),  # though 1 equals True, which is traced already
    (lambda q, k, v: ours(q, k, v, scale=q[0, 0]), ValueError, r"scale: .* got .* \(6, 16\)"),
    (lambda q, k, v: ours(q, k, v, query_seq_lengths=q[:, 0, 0, 0]), TypeError,
     "query_seq_lengths: expected integers, got float32"),
    (lambda q, k, v: ours(q, k, v, key_value_seq_lengths=[1]), ValueError,
     r"key_value_seq_lengths: expected shape .*, got \(1,\)"),
    (lambda q, k, v: scaled_dot(k, k, v, backend="nobody"), ValueError, "backend: .* got 'nobody'"),
    (lambda q, k, v: scaled_dot(k, k, v, threads=0), ValueError, "threads: .* got 0"),
    (lambda q, k, v: scaled_dot(k, k, v, precision="x"), ValueError, "precision: expected None"),
    (lambda q, k, v: scaled_dot(k, k, v, window=(1, 2, 3)), ValueError, "window: .* got 3 sides"),
    (lambda q, k, v: scaled_dot(k, k, v, sinks=jnp.ones(3)), ValueError, r"sinks: .* got \(3,\)"),
    (lambda q, k, v: scaled_dot(k, k, v, causal=True, kv_lengths=jnp.ones(2, int)), ValueError,
     "q_offset: expected a value with kv_lengths"),
])  # fmt: skip
def test_errors_come_when_it_is_traced(call, error, message):
    with pytest.raises(error, match=r"^" + message):
        jax.eval_shape(call, *arrays())


@pytest.mark.parametrize("name, value", [
    ("softcap", 2.0), ("window", 3), ("causal", True), ("threads", 1), ("return_lse", True),
])  # fmt: skip
def test_what_cannot_be_traced(name, value):
    """Under jit, grad and vmap alike: in words, by name."""
    q, k, v = arrays(kv_heads=HEADS)

    def call(x):
        return jnp.sum(jnp.asarray(scaled_dot(q, k, v, **{name: x})))

    message = f"^{name}: expected a value that is known when it is traced, got a tracer"
    for transform in (jax.jit, *([jax.grad, jax.jacfwd] if name == "softcap" else [])):
        with pytest.raises(TypeError, match=message):
            transform(call)(value)
    message = r"^local_window_size: expected a value that is known"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: ours(q, k, v, local_window_size=(x, None)))(3)


def test_arrays_of_others():
    """Tensors, bfloat16 ones too; what cannot be read is an error by name."""
    torch = pytest.importorskip("torch", reason="its tensors are read")
    q, k, v = (torch.from_numpy(np.array(x)).bfloat16() for x in arrays())
    found = ours(q, k, v)
    wanted = ours(*(jnp.asarray(x.float().numpy()).astype("bfloat16") for x in (q, k, v)))
    np.testing.assert_array_equal(found, wanted)
    for value, words in ((v.requires_grad_(), "gradient"), (None, "NoneType"), ("v", "<U1")):
        with pytest.raises(TypeError, match=f"^value: expected .*{words}"):
            ours(q, k, value)
        with pytest.raises(TypeError, match=f"^k: expected .*{words}"):
            scaled_dot(q, value, v)
    with pytest.raises(TypeError, match=r"^bias: .* got a masked array"):
        scaled_dot(q, q, q, bias=np.ma.masked_array(np.ones(N_KEYS)))


def test_lengths_out_of_range_are_found_when_it_runs():
    q, k, v = (x.swapaxes(1, 2) for x in arrays())
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kv_lengths: expected 0\.\.30, got 50"):
        jax.block_until_ready(scaled_dot(q, k, v, kv_lengths=jnp.array([3, 50])))


# -------------------------------------------------------------------------- nothing that costs time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_array_is_copied(monkeypatch, dtype):
    """What arrives is the arrays' own memory, and the result is written where XLA wants it."""
    seen = []

    def attend(q, k, v, out, **options):
        out[...] = 0
        seen[:] = [x.__array_interface__["data"][0] for x in (q, k, v, out)]

    monkeypatch.setattr(fastattn, "scaled_dot", attend)
    operands = arrays(dtype)
    found = jax.jit(lambda *x: ours(*x))(*operands)
    assert seen == [x.unsafe_buffer_pointer() for x in (*operands, found)]


def test_only_gradients_that_are_wanted(monkeypatch):
    """That of a bias is an array of queries x keys."""
    wanted = []

    def backward(*args, wrt, **words):
        wanted.append(wrt)
        return fastattn.backward.scaled_dot_backward(*args, wrt=wrt, **words)

    monkeypatch.setattr(fastattn, "scaled_dot_backward", backward)
    q, k, v = (x.swapaxes(1, 2) for x in arrays())
    bias, sinks = given()["mask"]["bias"], np.zeros(HEADS, "float32")

    def loss(q, bias, sinks):
        return scaled_dot(q, k, v, bias=bias, sinks=sinks).sum()

    for argnums in (0, (0, 1), 2):
        jax.block_until_ready(jax.jit(jax.grad(loss, argnums))(q, bias, sinks))
    assert wanted == [(), ("bias",), ("sinks",)]


def test_equal_calls_are_traced_once(monkeypatch):
    calls = []

    def make_problem(*args, **words):
        calls.append(words)
        return fastattn.core.problem.make_problem(*args, **words)

    monkeypatch.setattr(jax_operators, "make_problem", make_problem)
    operands = [x[:, :17] for x in arrays()]
    loss = jax.grad(lambda *x: ours(*x, is_causal=True, scale=0.3).sum())
    loss(*operands)
    assert calls
    calls.clear()
    loss(*operands)
    assert not calls


def test_docstrings():
    failed, attempted = doctest.testmod(integration)
    assert attempted > 0
    assert failed == 0


# ------------------------------------------------------------------------------------- dropout


def test_dropout_by_a_key():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 30, 8))

    @jax.jit
    def drawn(key):
        return scaled_dot(q, k, v, dropout=(0.3, key), dropout_offset=(0, 1, 2, 3))

    first, second = drawn(jax.random.key(1)), drawn(jax.random.key(2))
    assert (first != second).any() and (first == drawn(jax.random.key(1))).all()
    low, high = map(int, jax.random.bits(jax.random.key(1), (2,), "uint32"))
    own = {"dropout": (0.3, low | high << 32), "dropout_offset": (0, 1, 2, 3)}
    expected = fastattn.scaled_dot(*map(np.asarray, (q, k, v)), **own)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(scaled_dot(q, k, v, **own), expected)


def test_offsets_of_dropout_that_are_traced():
    """Each slice drops what the whole does, whichever it is."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 30, 8))
    whole = scaled_dot(q, k, v, dropout=(0.3, 9))

    @jax.jit
    def of_rows(first):
        rows = jax.lax.dynamic_slice_in_dim(q, first, 10, 1)
        return scaled_dot(rows, k, v, dropout=(0.3, 9), dropout_offset=(0, 0, first, 0))

    np.testing.assert_allclose(of_rows(10), whole[:, 10:20], rtol=0, atol=1e-6)
    mapped = jax.vmap(of_rows)(jnp.array([0, 10, 20]))
    np.testing.assert_allclose(jnp.concatenate(mapped, 1), whole, rtol=0, atol=1e-6)
    one, far = jnp.array([1]), jnp.array(2)
    for wrong, words in (
        ((0, 0, one, 0), "an integer, got array"), (jnp.zeros(4), "an integer, got float32"),
        (jnp.zeros(3, int), "4 numbers|3 numbers"), ((2**40, 0, far, 0), "numbers that JAX has"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=f"^dropout_offset: .*({words})"):
            scaled_dot(q, k, v, dropout=(0.3, 9), dropout_offset=wrong)


def test_gradients_of_dropout():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 4))

    def loss(q, key):
        return (scaled_dot(q, k, v, dropout=(0.3, key)) ** 2).sum()

    key = jax.random.key(3)
    grad = jax.grad(loss)(q, key)
    move = jax.random.normal(jax.random.key(4), q.shape)
    slope = (loss(q + 1e-2 * move, key) - loss(q - 1e-2 * move, key)) / 2e-2
    np.testing.assert_allclose((grad * move).sum(), slope, rtol=1e-2)
    mapped = jax.vmap(loss, in_axes=(None, 0))(q, jax.random.split(key, 3))
    np.testing.assert_allclose(
        mapped, [loss(q, own) for own in jax.random.split(key, 3)], rtol=1e-5
    )


@pytest.mark.parametrize(
    "dropout",
    [0.1, (0.1, 2, 3), (1.5, 0), (0.1, -1), (0.1, jnp.ones(2)), (0.1, jnp.ones(3, int))],
    ids=str,
)
def test_wrong_dropout(dropout):
    q = jax.numpy.ones((1, 3, 4))
    with pytest.raises((TypeError, ValueError), match=r"^dropout: expected"):
        scaled_dot(q, q, q, dropout=dropout)
