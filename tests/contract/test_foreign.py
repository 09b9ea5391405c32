"""Arrays of other libraries (contract, section 1, "Arrays"): read where they lie, or refused."""

import gc
import weakref

import numpy as np
import pytest
from helpers.problems import DTYPES, Shape, float_type

import fastattn
from fastattn.core import foreign
from fastattn.core.arguments import plain
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 5, 7, 8, kv_heads=2)
GRID = np.random.default_rng(1).random((2, 4, 5, 7))
OPTIONS = {
    "bias": GRID, "mask": GRID < 0.7, "alibi": GRID[0, :, 0, 0], "sinks": GRID[0, :, 0, 0],
    "kv_lengths": np.array([3, 7]), "q_offset": np.array([1, -2]), "spans": np.arange(5),
}  # fmt: skip


class Exported:
    """An array that can be had through DLPack alone; `words` are what its method takes."""

    def __init__(self, x, *words):
        self.x = x
        self.words = words

    def __dlpack__(self, **given):
        if not given.keys() <= set(self.words):
            raise TypeError("unexpected keyword")
        return self.x.__dlpack__(**given)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


WRAPS = {
    "versioned": lambda x: Exported(x, "max_version", "stream"),
    "unversioned": Exported,
    "torch": lambda x: pytest.importorskip("torch").from_numpy(x),
    "jax": lambda x: pytest.importorskip("jax").numpy.asarray(x),
}
try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="its tensors are what is read")


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("name", ["q", "k", "v", *OPTIONS])
def test_every_argument(name, wrap):
    """Bit for bit what NumPy's own array gives."""
    given = dict(zip("qkv", SHAPE.arrays(), strict=True))
    if name in OPTIONS:
        given[name] = OPTIONS[name]
    given["causal"] = name == "q_offset"
    other = {**given, name: wrap(given[name])}
    if name == "spans":
        given[name], other[name] = ((x, x) for x in (given[name], other[name]))
    wanted, found = (fastattn.scaled_dot(**x) for x in (given, other))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("name", ["grad_out", "out", "lse", "grad_lse"])
def test_every_argument_of_the_gradients(name, wrap):
    q, k, v = SHAPE.arrays()
    out, lse = fastattn.scaled_dot(q, k, v, return_lse=True)
    given = {"grad_out": out, "out": out, "lse": lse, "grad_lse": lse}
    wanted = fastattn.scaled_dot_backward(q=q, k=k, v=v, **given)
    found = fastattn.scaled_dot_backward(q=q, k=k, v=v, **{**given, name: wrap(given[name])})
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_other_functions(wrap):
    q, k, v = SHAPE.arrays()
    given = [wrap(x) for x in (q, k, v)]
    for function in (fastattn.gaussian, fastattn.cosine, fastattn.euclidean):
        np.testing.assert_array_equal(function(*given), function(q, k, v))
    np.testing.assert_array_equal(
        fastattn.key_importance(*given[:2]), fastattn.key_importance(q, k)
    )
    caches = [fastattn.KVCache(2, 2, 8) for _ in range(2)]
    for cache, (one, two, three) in zip(caches, ((q, k, v), given), strict=True):
        cache.append(two, three)
        cache.answer = cache.attend(one)
    np.testing.assert_array_equal(caches[0].answer, caches[1].answer)


@needs_torch
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.transpose(1, 2), lambda x: x[:, :, 1:],
                                    lambda x: x[:, :1].expand(-1, 4, -1, -1)])  # fmt: skip
def test_tensors_are_not_copied(name, change):
    given = [change(torch.randn(2, 4, 5, 8).to(getattr(torch, name))) for _ in range(3)]
    p = make_problem(*given)
    assert not p.copied and p.dtype == float_type(name)
    for x, read in zip(given, (p.q, p.k, p.v), strict=True):
        assert read.ctypes.data == x.data_ptr()
        assert read.strides == tuple(n * read.itemsize for n in x.stride())
        np.testing.assert_array_equal(read.astype(float), x.double().numpy())


@pytest.mark.parametrize("words", [(), ("max_version",)], ids=["unversioned", "versioned"])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32",
                                   "int64", "uint64", "float16", "float32", "float64",
                                   "complex64"])  # fmt: skip
def test_dtypes_and_strides(dtype, words):
    numbers = (np.arange(24).reshape(2, 3, 4) % 5).astype(dtype)
    first = numbers[0, 0, :1].reshape(())
    for x in (numbers, numbers[::-1, ::2, 1:], numbers.T, numbers[:, :0], first):
        read = plain("q", Exported(x, *words))
        assert read.dtype == x.dtype and np.shares_memory(read, x) == (x.size > 0)
        np.testing.assert_array_equal(read, x)


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0",
    reason="NumPy's own DLPack has no versions, and nothing read-only",
)
def test_read_only_memory_stays_so():
    x = np.arange(3.0)
    x.flags.writeable = False
    assert not plain("q", Exported(x, "max_version")).flags.writeable
    with pytest.raises(TypeError, match=r"^q: .* Exported: .*readonly"):
        plain("q", Exported(x))


@pytest.mark.parametrize("words", [(), ("max_version",)], ids=["unversioned", "versioned"])
def test_memory_is_kept_and_given_back(words):
    class Owner(np.ndarray):
        pass

    owner = np.arange(1000.0).view(Owner)
    gone = weakref.ref(owner)
    read = plain("q", Exported(owner, *words))[10:]
    del owner
    gc.collect()
    assert gone() is not None and read[0] == 10
    del read
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------ what is refused


def test_other_devices_and_versions():
    def changed(**fields):
        capsule = np.arange(3.0).__dlpack__()
        tensor, _ = foreign._tensor_of(capsule)
        for name, value in fields.items():
            setattr(tensor, name, value)
        return type("Array", (), {"__dlpack__": lambda self, **words: capsule})()

    np.testing.assert_array_equal(plain("q", changed()), np.arange(3.0))
    for fields, words in (
        ({"device": foreign._Device(2, 1)}, r"device \(2, 1\)"),
        ({"dtype": foreign._DType(2, 64, 2)}, r"dtype is \(2, 64, 2\)"),
        ({"dtype": foreign._DType(10, 8, 1)}, r"dtype is \(10, 8, 1\)"),
        ({"data": None}, "no memory"),
    ):
        with pytest.raises(TypeError, match=f"^q: .*{words}"):
            plain("q", changed(**fields))


def unreadable():
    """Tensors that cannot be read, and what is said to be done."""
    x = torch.ones(5, 8)
    turned = torch.ones(5, 8, dtype=torch.complex64).conj()
    return {
        "gradient": (x.clone().requires_grad_(), r"\.detach\(\)"),
        "parameter": (torch.nn.Parameter(x), r"\.detach\(\)"),
        "negated": (turned.imag, r"\.resolve_neg\(\)"),
        "negated bfloat16": (torch._neg_view(x.bfloat16()), r"\.resolve_neg\(\)"),
        "conjugated": (turned, r"\.resolve_conj\(\)"),
        "sparse": (x.to_sparse(), r"\.to_dense\(\)"),
        "elsewhere": (x.to("meta"), r"\.cpu\(\)"),
        "quantised": (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "QInt8"),
        "float8": (x.to(torch.float8_e4m3fn), "Float8"),
    }


@needs_torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask", "alibi", "sinks", "kv_lengths",
                                  "q_offset", "scale", "softcap"])  # fmt: skip
def test_tensors_that_cannot_be_read(name):
    for value, advice in unreadable().values():
        given = {"q": np.ones((5, 8)), "k": np.ones((7, 8)), "v": np.ones((7, 8)), name: value}
        with pytest.raises(TypeError, match=f"^{name}: .*{advice}"):
            fastattn.scaled_dot(**given)


@needs_torch
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_only_look_like_arrays():
    from torch.masked import masked_tensor
    from torch.nn.attention.bias import causal_lower_right

    x = torch.ones(5, 8)
    nested = [torch.nested.nested_tensor([x, x[:3]], layout=layout)
              for layout in (torch.strided, torch.jagged)]  # fmt: skip
    for value, words in (
        *((y, "[nN]ested.*; pass it padded") for y in nested),
        (masked_tensor(x, x > 0), "MaskedTensor"),
        (causal_lower_right(5, 8), "CausalBias; pass causal=True"),
        ([x.requires_grad_()], "list: .*requires grad"),
    ):
        with pytest.raises(TypeError, match=f"^mask: .*{words}"):
            plain("mask", value)


@needs_torch
def test_bfloat16_without_its_package(run_python):
    program = """
import sys, numpy, torch, fastattn
sys.modules["ml_dtypes"] = None
x = torch.ones(3, 2).bfloat16()
try:
    fastattn.scaled_dot(x, x, x)
except TypeError as error:
    print(error)
"""
    message = run_python(program)
    assert message.startswith("q: ") and "ml_dtypes" in message


def test_traced_arrays_of_jax():
    jax = pytest.importorskip("jax")
    for transformed in (jax.jit, jax.grad):
        with pytest.raises(TypeError, match=r"^q: .*fastattn\.integrations\.jax"):
            transformed(lambda x: fastattn.scaled_dot(x, x, x).sum())(np.ones((3, 2), np.float32))


@pytest.mark.parametrize("value", [None, object(), "keys", b"keys", {"a": 1}, [[1.0, None]]])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_array_at_all(name, value):
    given = {"q": np.ones((5, 8)), "k": np.ones((7, 8)), "v": np.ones((7, 8)), name: value}
    with pytest.raises(TypeError, match=f"^{name}: "):
        fastattn.scaled_dot(**given)


def test_sparse_arrays():
    sparse = pytest.importorskip("scipy.sparse")
    for form in (sparse.csr_array, sparse.coo_matrix):
        with pytest.raises(TypeError, match=r"^k: .*\.toarray\(\)"):
            fastattn.scaled_dot(np.ones((5, 8)), form(np.ones((7, 8))), np.ones((7, 8)))
