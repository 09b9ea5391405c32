"""Each option of the table through each function: as the reference has it, or refused by name."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers.paging import in_pages
from helpers.problems import Shape, options

import fastattn
from fastattn import chunks
from fastattn.core.option_table import DIFFERENTIABLE, OPTIONS, joined, split

SHAPE = Shape(2, 4, 5, 7, 3, kv_heads=2, value_dim=2)
LENGTHS = np.array([3, 7])
PAGE = 4
# Both sum up some tens of terms of ordinary size in float64, in different orders.
TOLERANCE = 1e-12

_RNG = np.random.default_rng(3)
VALUES = {
    "scale": {"scale": 0.7}, "scale of heads": {"scale": _RNG.uniform(0.2, 1, 4)},
    "softcap": {"softcap": 1.5}, "relative_bias": {"relative_bias": _RNG.standard_normal((4, 5))},
    "causal": {"causal": True}, "window": {"window": (2, None)}, "q_offset": {"q_offset": 1},
    "q_offset of entries": {"q_offset": np.array([0, 3]), "causal": True},
    "kv_lengths": {"kv_lengths": LENGTHS}, "block_table": {"block_table": None},
    "dropout": {"dropout": (0.4, 7)},
    "dropout_offset": {"dropout_offset": (1, 2, 3, 4), "dropout": (0.4, 7)},
    "return_lse": {"return_lse": True}, "return_max": {"return_max": True, "return_lse": True},
    "return_max alone": {"return_max": True}, "return_weights": {"return_weights": True},
    "out": {"out": None}, "backend": {"backend": "numpy"}, "threads": {"threads": 1},
    "precision": {"precision": "bfloat16"},
}  # fmt: skip
VALUES |= {name: options((name,), SHAPE) for name in ("bias", "alibi", "sinks", "spans", "mask")}


def test_table_has_the_options_of_scaled_dot():
    assert tuple(OPTIONS) == tuple(fastattn.scaled_dot.__kwdefaults__)
    backward = fastattn.scaled_dot_backward.__kwdefaults__.keys() - {"grad_lse", "wrt"}
    assert backward == {name for name, x in OPTIONS.items() if x.about != "results"}
    expected = ", ".join(map(repr, DIFFERENTIABLE))
    with pytest.raises(ValueError, match=rf"^wrt: expected some of {expected}, got 'x'$"):
        fastattn.vjp(fastattn.scaled_dot, *SHAPE.arrays(), wrt=("x",))
    assert {key.split(" ")[0] for key in VALUES} == set(OPTIONS)


@pytest.mark.parametrize("given", VALUES.values(), ids=VALUES)
def test_parts_make_the_options_again(given):
    given = {name: x for name, x in given.items() if x is not None}
    arrays, values = split(given)
    assert not arrays.keys() & values.keys()
    np.testing.assert_equal(joined({**values, **arrays}), given)


# ---------------------------------------------------------------------------- functions


def plain(q, k, v, **given):
    return fastattn.scaled_dot(q, k, v, **given)


def flex(q, k, v, **given):
    return fastattn.flex(q, k, v, **given)


def attend(q, k, v, **given):
    cache = fastattn.KVCache(len(k), k.shape[1], k.shape[3], value_dim=v.shape[3], dtype="float64")
    cache.append(k, v)
    return cache.attend(q, **{"causal": False} | given)


def varlen(q, k, v, **given):
    """Of one sequence, with results that have a leading axis as the others'."""
    q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
    if given.get("out") is not None:
        given["out"] = given["out"][0].swapaxes(0, 1)
    found = fastattn.varlen(q, k, v, lengths=[len(q)], lengths_k=[len(k)], **given)
    out, *rest = found if isinstance(found, tuple) else (found,)
    results = (out.swapaxes(0, 1)[None], *(x[None] for x in rest))
    return results if rest else results[0]


def key_importance(q, k, v, **given):
    return fastattn.key_importance(q, k, **given)


def cosine(q, k, v, **given):
    return fastattn.cosine(q, k, v, temperature=0.5, **given)


def gaussian(q, k, v, **given):
    return fastattn.gaussian(q, k, v, alpha=0.3, **given)


def euclidean(q, k, v, **given):
    return fastattn.euclidean(q, k, v, **given)


def converted(convert, x):
    """Arrays among an option's values, as another library has them."""
    if isinstance(x, tuple):
        return tuple(converted(convert, item) for item in x)
    return convert(x) if isinstance(x, np.ndarray) else x


def torch(q, k, v, **given):
    library = pytest.importorskip("torch", reason="it is what is integrated with")
    from fastattn.integrations.torch import scaled_dot

    return library.utils._pytree.tree_map(
        np.asarray,
        scaled_dot(
            *map(library.from_numpy, (q, k, v)),
            **{name: converted(library.from_numpy, x) for name, x in given.items()},
        ),
    )


def jax(q, k, v, **given):
    library = pytest.importorskip("jax", reason="it is what is integrated with")
    from fastattn.integrations.jax import scaled_dot

    with library.enable_x64(True):
        given = {name: converted(library.numpy.asarray, x) for name, x in given.items()}
        return library.tree.map(np.asarray, scaled_dot(q, k, v, **given))


def dask(q, k, v, **given):
    library = pytest.importorskip("dask", reason="it is what is integrated with")
    import dask.array as da

    from fastattn.integrations.dask import scaled_dot

    arrays = (da.from_array(x, chunks=(1, 2, 3, 3)) for x in (q, k, v))
    given = {name: converted(partial(da.from_array, chunks=2), x) for name, x in given.items()}
    with library.config.set(scheduler="synchronous"):
        found = library.compute(scaled_dot(*arrays, **given))[0]
    return found


# ---------------------------------------------------------------------------- what they should say


def reference(q, k, v, **given):
    return fastattn.scaled_dot(q, k, v, **given | {"backend": "reference"})


def of_importance(q, k, v, **given):
    return reference(q, k, v, return_weights=True, **given)[-1].sum(axis=-2)


def of_cosine(q, k, v, **given):
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return reference(q, k, v, scale=2.0, **given)


def of_gaussian(q, k, v, alpha=0.3, **given):
    """As a product of vectors with two more numbers."""
    squares = [(x**2).sum(axis=-1, keepdims=True) for x in (q, k)]
    ones = [np.ones_like(x) for x in squares]
    q = np.concatenate([2 * alpha * q, -alpha * squares[0], ones[0]], axis=-1)
    k = np.concatenate([k, ones[1], -alpha * squares[1]], axis=-1)
    return reference(q, k, v, scale=1.0, **given)


def of_euclidean(q, k, v, **given):
    return fastattn.euclidean(q, k, v, **given | {"backend": "reference"})


FUNCTIONS = {
    plain: reference, flex: reference, attend: reference, varlen: reference,
    key_importance: of_importance, cosine: of_cosine, gaussian: of_gaussian,
    euclidean: of_euclidean, torch: reference, jax: reference, dask: reference,
}  # fmt: skip


WORDS = (
    r"^{0}: (|integrations\.){1}(|\.scaled_dot)\(\) has no such option; it has (scale|softcap), |"
    r"^{0}: expected None, got \w+; {1} has no {0}$|^{0}: expected a real number, got array "
)
REFUSED = {(euclidean, "scale of heads")}


@pytest.fixture
def small_chunks(monkeypatch):
    for name, n in {"CHUNK_BYTES": 64, "QUERIES": 2, "KEYS": 3}.items():
        monkeypatch.setattr(chunks, name, n)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
def test_option(small_chunks, function, key):
    name, given = key.split(" ")[0], dict(VALUES[key])
    shape = SHAPE._replace(batch=1) if function is varlen else SHAPE
    arrays = given_to = shape.arrays("float64")
    if function is varlen:
        given = {n: x[:1] if n == "q_offset" and np.ndim(x) else x for n, x in given.items()}
    if name == "block_table":
        *pools, given["block_table"] = in_pages(*arrays[1:], LENGTHS[-len(arrays[1]) :], PAGE)
        given["kv_lengths"], given_to = LENGTHS[-len(arrays[1]) :], (arrays[0], *pools)
    if name == "out":
        given["out"] = np.empty((*arrays[0].shape[:-1], shape.value_dim))
    if function.__name__ in OPTIONS[name].without or (function, key) in REFUSED:
        with pytest.raises(TypeError, match=WORDS.format(name, function.__name__)):
            function(*given_to, **given)
        return
    found = function(*given_to, **given)
    if name == "out":
        assert np.shares_memory(found, given.pop("out"))
    if name == "block_table":
        arrays = [arrays[0], *(np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))) for x in arrays[1:])]
        del given["block_table"]
    wanted = FUNCTIONS[function](*arrays, **given)
    assert type(found) is type(wanted)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for got, want in pairs:
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def differentiated(q, k, v, **given):
    return fastattn.vjp(fastattn.scaled_dot, q, k, v, **given)


@pytest.mark.parametrize(
    "function", [*FUNCTIONS.keys() - {plain}, differentiated, fastattn.dot, fastattn.explain]
)
@pytest.mark.parametrize("name", ["dropped", "gradients", "held"])
def test_no_option(function, name):
    with pytest.raises(TypeError, match=rf"^{name}: .*\(\) has no such option; it has "):
        function(*SHAPE.arrays("float64"), **{name: 1})


# ---------------------------------------------------------------------------- gradients


def torch_gradients(arrays, given, wrt, grad):
    library = pytest.importorskip("torch", reason="it is what is integrated with")
    from fastattn.integrations.torch import scaled_dot

    operands = [library.from_numpy(x).requires_grad_() for x in arrays]
    option = library.tensor(given[wrt], dtype=library.float64, requires_grad=True)
    out = scaled_dot(*operands, **{**given, wrt: option})
    return library.autograd.grad(out, (*operands, option), library.from_numpy(grad))


def jax_gradients(arrays, given, wrt, grad):
    library = pytest.importorskip("jax", reason="it is what is integrated with")
    from fastattn.integrations.jax import scaled_dot

    def attended(q, k, v, x):
        return scaled_dot(q, k, v, **given | {wrt: x})

    with library.enable_x64(True):
        primals = (library.numpy.asarray(x, float) for x in (*arrays, given[wrt]))
        return library.vjp(attended, *primals)[1](library.numpy.asarray(grad))


def gradients_of(function):
    """Those of a function of fastattn, as `vjp` has them."""

    def found(arrays, given, wrt, grad):
        return fastattn.vjp(function, *arrays, wrt=(wrt,), **given)[1](grad)

    return found


def varlen_gradients(arrays, given, wrt, grad):
    arrays = [x[0].swapaxes(0, 1) for x in arrays]
    lengths = {"lengths": [len(arrays[0])], "lengths_k": [len(arrays[1])]}
    *found, of_option = gradients_of(fastattn.varlen)(
        arrays, given | lengths, wrt, grad[0].swapaxes(0, 1)
    )
    return *(x.swapaxes(0, 1)[None] for x in found), of_option


GRADIENTS = {
    "torch": torch_gradients, "jax": jax_gradients, "varlen": varlen_gradients,
    "flex": gradients_of(fastattn.flex), "scaled_dot": gradients_of(fastattn.scaled_dot),
}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in VALUES if key.split(" ")[0] in DIFFERENTIABLE])
@pytest.mark.parametrize("function", GRADIENTS)
def test_gradient(function, key):
    name, given = key.split(" ")[0], VALUES[key]
    if function in OPTIONS[name].without:
        pytest.skip(f"{function} has no {name}, as test_option holds")
    arrays = SHAPE._replace(batch=1 if function == "varlen" else 2).arrays("float64")
    grad = np.random.default_rng(1).standard_normal((*arrays[0].shape[:-1], SHAPE.value_dim))
    found = GRADIENTS[function](arrays, given, name, grad)
    _, pullback = fastattn.vjp(
        fastattn.scaled_dot, *arrays, wrt=(name,), backend="reference", **given
    )
    for got, want in zip(found, pullback(grad), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
