"""The cuda backend: on a GPU where there is one, else in Numba's simulator, in its own process.

On a GPU the tests of the whole contract run with it too; these are what the simulator, which takes
a microsecond for an operation, can do in a minute.
"""

import ctypes
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.cuda_compiler import compile_ptx, need_compiler
from helpers.layouts import LAYOUTS
from helpers.oracles import assert_solves, check, same_bits
from helpers.problems import DTYPES, Shape, float_type, options
from helpers.subprocesses import child_environment
from helpers.targets import Target

import fastattn
from fastattn import reference
from fastattn.backends import cuda as backend
from fastattn.core.problem import make_problem

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
TARGET = Target("cuda")
SMALL = Shape(1, 2, 5, 11, 8)
# Several tiles both ways with ragged ends, the queries not resident, two slices of v.
LARGE = Shape(1, 2, 19, 21, 20, kv_heads=1, value_dim=18)

runs = pytest.mark.skipif(
    backend.missing() is not None,
    reason=f"{backend.missing()}; test_in_the_simulator runs it if numba-cuda is installed",
)


@pytest.mark.skipif(SIMULATED, reason="is what runs this")
def test_in_the_simulator():
    """All of this file and its neighbours but the compiler's part."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    files = map(str, sorted(Path(__file__).parent.glob("test_cuda*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env=child_environment(NUMBA_ENABLE_CUDASIM="1"), stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


# ------------------------------------------------------------------------------ NumPy arrays


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain(dtype):
    check(TARGET, *SMALL.arrays(dtype))


@runs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_several_tiles(dtype):
    check(TARGET, *LARGE.arrays(dtype), return_weights=True)


@runs
@pytest.mark.parametrize(
    "name",
    ["scale", "scales", "softcap", "bias", "-inf", "relative_bias", "-inf distances", "alibi",
     "sinks", "causal", "window", "q_offset", "kv_lengths", "spans", "mask"],
)  # fmt: skip
def test_one_option(name):
    check(TARGET, *SMALL.arrays(), **options([name], SMALL), return_max=True, return_weights=True)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_many_options(dtype, seed):
    names = ["scales", "softcap", "bias", "-inf", "relative_bias", "alibi", "sinks", "window",
             "spans", "mask"]  # fmt: skip
    shape = Shape(2, 2, 5, 9, 4, kv_heads=1, value_dim=3)
    check(TARGET, *shape.arrays(dtype, seed), **options(names, shape, seed), return_weights=True)


@runs
def test_packed_sequences():
    q, k, v = (x[0].swapaxes(0, 1) for x in Shape(1, 2, 7, 9, 4).arrays())
    cu = [0, 3, 3, 7], [0, 2, 4, 9]
    found = fastattn.varlen(q, k, v, *cu, backend="cuda", return_lse=True)
    expected = fastattn.varlen(q, k, v, *cu, backend="numpy", return_lse=True)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for more in ({"causal": True}, {"alibi": [0.5, 0.25]}):
        with pytest.raises(ValueError, match="no kernel for positions within packed sequences"):
            fastattn.varlen(q, k, v, *cu, backend="cuda", **more)


@runs
def test_causal_on_several_tiles():
    shape = Shape(1, 1, 17, 25, 8)
    check(TARGET, *shape.arrays(), causal=True, return_weights=True)


@runs
def test_long_rows():
    """More keys than are summed at once, and a maximum that rises all the time."""
    q, k, v = Shape(1, 1, 1, 1100, 4).arrays()
    k[...] = np.linspace(0, 10, 1100)[:, None]
    check(TARGET, np.ones_like(q), k, v)


@runs
def test_bfloat16_is_rounded_to_nearest():
    """Ties to even: the mean of two neighbours."""
    one, ulp = np.float32(1), np.float32(2**-7)
    v = np.array([[one, one + ulp], [one + ulp, one + 2 * ulp]]).astype(float_type("bfloat16"))
    q = np.zeros((1, 4), v.dtype)
    out = fastattn.scaled_dot(q, np.zeros((2, 4), v.dtype), v, backend="cuda")
    assert out.astype(np.float32).tolist() == [[1, 1 + 2 * ulp]]


@runs
@pytest.mark.parametrize(
    "bias", ["int8", "uint64", "float16", "bfloat16", "float64", "longdouble", ">f4"]
)
def test_dtype_of_the_bias(bias):
    values = np.random.default_rng(0).integers(0, 5, (5, 11)).astype(float_type(bias))
    check(TARGET, *SMALL.arrays(), bias=values)


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout):
    arrays = Shape(2, 1, 3, 4, 4).arrays()
    results = fastattn.scaled_dot(*map(LAYOUTS[layout], arrays), backend="cuda")
    wanted = np.float64 if layout == "list" else np.float32
    assert_solves(results, make_problem(*(x.astype(wanted) for x in arrays)))


@runs
def test_broadcast():
    q, k, v = Shape(2, 2, 3, 4, 4).arrays()
    check(TARGET, q[None], k[:, :1], v[0])
    check(TARGET, q[:1, :1], k, v, mask=np.array([True, False, True, True]))
    check(TARGET, q[0, 0], k[0, 0], v[0, 0])


@runs
@pytest.mark.parametrize("sizes", [(0, 4, 3), (3, 0, 3), (3, 4, 0)], ids=str)
def test_empty(sizes):
    n_queries, n_keys, value_dim = sizes
    shape = Shape(1, 1, n_queries, n_keys, 4, value_dim=value_dim)
    check(TARGET, *shape.arrays(), return_weights=True)


@runs
def test_out():
    q, k, v = SMALL.arrays()
    around = np.full((1, 2, 5, 16), 7, np.float32)
    out = around[..., 4:12]
    assert fastattn.scaled_dot(q, k, v, out=out, backend="cuda") is out
    assert_solves(out, make_problem(q, k, v))
    assert (around[..., :4] == 7).all() and (around[..., 12:] == 7).all()
    before = make_problem(q.copy(), k, v)
    assert_solves(fastattn.scaled_dot(q, k, v, out=q, backend="cuda"), before)


# ------------------------------------------------------------------------------ a few queries

# Two heads to a tile, three parts of the keys in the simulator, two slices of v.
FEW = Shape(2, 4, 1, 70, 4, kv_heads=2, value_dim=18)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_merged(dtype):
    check(TARGET, *FEW.arrays(dtype), return_max=True)


@runs
@pytest.mark.parametrize("seed", range(2))
def test_parts_with_many_options(seed):
    names = ["scales", "softcap", "-inf", "relative_bias", "alibi", "sinks", "window", "spans"]
    opts = options(names, FEW, seed)
    check(TARGET, *FEW.arrays(), **opts, mask=options(["mask"], FEW)["mask"], return_max=True)
    check(TARGET, *FEW.arrays(), kv_lengths=[0, 33], causal=True, q_offset=[0, 32])


@runs
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_parts_that_are_not_finite(value):
    q, k, v = FEW.arrays()
    k[0, 0, 2, 0] = v[0, 1, 40, 3] = v[1, 0, 65, 1] = k[1, 0, 68, 2] = value
    out, _, _ = check(TARGET, q, k, v, return_max=True)
    assert np.isfinite(out[1, 2:]).all()
    out, _, _ = check(TARGET, q, k, v, kv_lengths=[70, 65], return_max=True)
    assert np.isfinite(out[1]).all()


@runs
def test_parts_of_extremes():
    q, k, v = FEW.arrays()
    most = np.finfo(np.float32).max
    out, _ = check(TARGET, q, k, np.full_like(v, most), sinks=[-np.inf, -np.inf, np.inf, 1])
    assert np.isfinite(out).all()
    check(TARGET, q, k, v, bias=np.where(np.arange(70) < 40, -np.inf, -most))
    q[..., 0], k[..., :40, 0] = 1, -np.inf  # scores of -inf in all of the first part
    check(TARGET, q, k, v)


@runs
def test_parts_depend_on_the_keys_alone():
    """An entry, or a group of heads, by itself has the bits that it has among others."""
    q, k, v = FEW.arrays()
    whole = fastattn.scaled_dot(q, k, v, backend="cuda")
    for b, group in ((0, 1), (1, 0)):
        heads = slice(2 * group, 2 * group + 2)
        one = (q[b : b + 1, heads], *(x[b : b + 1, group : group + 1] for x in (k, v)))
        assert same_bits(fastattn.scaled_dot(*one, backend="cuda")[0], whole[b, heads])


# ------------------------------------------------------------------------------- NaN and Inf


HIDING = {
    "causal": {"causal": True, "q_offset": 0},
    "mask": {"mask": np.arange(10)[:, None] % 3 + np.arange(10) != 2},
    "bias": {"bias": np.where(np.arange(10)[:, None] % 3 + np.arange(10) != 2, 0.25, -np.inf)},
}


@runs
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("hiding", HIDING)
def test_unseen_key_touches_nothing(hiding, poison):
    q, k, v = Shape(1, 1, 10, 10, 4).arrays()
    k[..., 2, 1] = v[..., 2, 3] = poison
    v[..., 1, 0] = poison
    out, _ = check(TARGET, q, k, v, **HIDING[hiding])
    sees = reference.visible(make_problem(q, k, v, **HIDING[hiding]))[0, 0]
    assert np.isfinite(out[0, 0][~sees[:, 1] & ~sees[:, 2]]).all()
    assert not np.isfinite(out[0, 0][sees[:, 1], 0]).any()


@runs
def test_rows_that_see_nothing():
    q, k, v = SMALL.arrays()
    out, lse = check(TARGET, q, k, v, kv_lengths=0)
    assert (out == 0).all() and (lse == -np.inf).all()
    for sinks in ([0.5, -np.inf], [np.inf, 1.0]):
        check(TARGET, q, k, v, kv_lengths=0, sinks=sinks)
        check(TARGET, q, k, v, sinks=sinks)


@runs
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_score_that_is_not_finite(value):
    q, k, v = SMALL.arrays()
    k[..., 2, 0] = value
    check(TARGET, q, k, v, return_weights=True)


@runs
def test_huge_numbers():
    q, k, v = SMALL.arrays()
    out, _ = check(TARGET, q, k, np.full_like(v, np.finfo(np.float32).max))
    assert np.isfinite(out).all()
    check(TARGET, q, k, v, bias=np.full((5, 11), np.finfo(np.float32).min))
    check(TARGET, q, k, v, bias=np.full((5, 11), -1e300), return_lse=False)
    check(TARGET, q * 1e15, k * 1e15, v)
    most = np.full((5, 11), np.finfo(np.float32).max)
    assert np.isfinite(TARGET.attend(q * 1e19, k * 1e19, v, bias=most)).all()


# ---------------------------------------------------------------------------------- launches


@runs
def test_launches_are_cut(monkeypatch, device):
    arrays = Shape(1, 2, 17, 9, 4).arrays()
    whole = fastattn.scaled_dot(*arrays, causal=True, backend="cuda")
    out = device(np.full_like(whole, np.nan))
    count = fastattn.explain(*arrays, causal=True, backend="cuda").plan["launches"]
    call = importlib.import_module("fastattn.backends.cuda.call")
    monkeypatch.setattr(call, "LAUNCH_TILES", 1)
    monkeypatch.setattr(call, "LAUNCH_FLOPS", 1)
    cut = fastattn.explain(*arrays, causal=True, backend="cuda").plan["launches"]
    assert int(cut) >= int(count)
    if SIMULATED:
        assert int(cut) > 4  # a GPU has as many tiles at once as multiprocessors
    fastattn.scaled_dot(*map(device, arrays), causal=True, out=out)
    assert same_bits(out.host().view(np.float32).reshape(whole.shape), whole)


@runs
def test_only_when_named():
    arrays = SMALL.arrays()
    found = fastattn.explain(*arrays)
    assert found.backend != "cuda"
    assert "only when named" in found.passed_over["cuda"]
    assert fastattn.explain(*arrays, backend="cuda").backend == "cuda"
    assert "cuda" in fastattn.available_backends()


@pytest.mark.skipif(backend.missing() is None, reason="there is a CUDA device")
def test_reason_why_it_cannot():
    reason = backend.missing()
    assert reason == "numba-cuda is not installed" or reason.startswith("no CUDA device")
    with pytest.raises(ValueError, match=rf"^backend: 'cuda' given.*{reason.split(' (')[0]}"):
        fastattn.scaled_dot(*SMALL.arrays(), backend="cuda")
    assert "cuda" not in fastattn.available_backends()
    assert fastattn.explain(*SMALL.arrays()).passed_over["cuda"] == reason


class FakeCuda:
    """Numba's module on a machine with a GPU, with a compiler that fails or not."""

    config = SimpleNamespace(ENABLE_CUDASIM=False)

    def __init__(self, error=None):
        self.cuda = self
        self.error = error
        self.compiled = []

    def is_available(self):
        return True

    def jit(self, signature):
        if self.error is not None:
            raise self.error
        return self.compiled.append


@pytest.fixture
def fake_cuda(monkeypatch):
    """``fake_cuda(error, numba_cuda, numpy)`` -> the reason, and the module with a GPU."""

    def reason(error=None, numba_cuda="0.30.4", numpy="2.4.6"):
        versions = {"numba-cuda": numba_cuda, "numpy": numpy}
        fake = FakeCuda(error)
        monkeypatch.setattr(backend, "find_spec", lambda name: name)
        monkeypatch.setattr(backend, "import_module", lambda name, package=None: fake)
        monkeypatch.setattr("importlib.metadata.version", versions.get)
        return backend.missing.__wrapped__(), fake

    return reason


@pytest.mark.parametrize("numpy", ["2.5.0", "2.5.0rc1", "2.6.1", "3.0.0"])
def test_known_misfits_are_named(fake_cuda, numpy):
    reason, fake = fake_cuda(numpy=numpy)
    assert reason.startswith(f"numba-cuda 0.30.4 does not work with NumPy {numpy} (")
    assert fake.compiled == []  # known, so not tried


@pytest.mark.parametrize("versions", [("0.30.4", "2.4.6"), ("0.31.0", "2.5.0"), ("1.0", "3.1")])
def test_what_is_not_known_is_tried(fake_cuda, versions):
    """It is ready where a kernel has been compiled for the device, and not before."""
    reason, fake = fake_cuda(None, *versions)
    assert reason is None and len(fake.compiled) == 1
    error = AttributeError("module 'numpy' has no\nattribute 'gone'")
    reason, _ = fake_cuda(error, *versions)
    assert reason == (
        f"numba-cuda {versions[0]} compiles no kernel here (module 'numpy' has no attribute 'gone')"
    )


def test_import_that_fails(monkeypatch):
    def refuses(name, package=None):
        raise ImportError("Numba needs NumPy 1.0 or less")

    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    monkeypatch.setattr(backend, "import_module", refuses)
    reason = backend.missing.__wrapped__()
    assert reason == "numba-cuda does not work here (Numba needs NumPy 1.0 or less)"


# ---------------------------------------------------------------------------- device arrays


class OnDevice:
    """An array of some library that is not known, with strides of its own choice."""

    def __init__(self, x, typestr=None):
        cuda = importlib.import_module("numba.cuda")
        # The memory from the lowest address on is sent, and found again by its place in it.
        low, high = np.lib.array_utils.byte_bounds(x)
        memory = (ctypes.c_char * max(1, high - low)).from_address(low)
        self.memory = cuda.to_device(np.frombuffer(memory, np.uint8).copy())
        address = self.memory.__cuda_array_interface__["data"][0]
        self.__cuda_array_interface__ = {
            "shape": x.shape, "strides": x.strides, "typestr": typestr or x.dtype.str,
            "data": (address + x.__array_interface__["data"][0] - low, False), "version": 3,
        }  # fmt: skip

    def host(self):
        return self.memory.copy_to_host()


@pytest.fixture
def device(monkeypatch):
    """The maker of arrays on the device."""
    if SIMULATED:  # it has neither; host memory stands for the device's
        cuda = importlib.import_module("numba.cuda")
        fake = type(cuda.to_device(np.zeros(1)))

        def interface(array):
            return {**array._ary.__array_interface__, "strides": array._ary.strides, "version": 3}

        def memory(described, owner=None):
            n, dtype = described["shape"][0], np.dtype(described["typestr"])
            bytes_ = (ctypes.c_char * (n * dtype.itemsize)).from_address(described["data"][0])
            return fake(np.frombuffer(bytes_, dtype))

        monkeypatch.setattr(fake, "__cuda_array_interface__", property(interface), raising=False)
        monkeypatch.setattr(cuda, "from_cuda_array_interface", memory, raising=False)
    return OnDevice


def read(x):
    return x.copy_to_host()


@runs
def test_stays_on_the_device(device):
    arrays = SMALL.arrays()
    opts = options(["mask", "bias", "alibi", "sinks", "softcap", "spans"], SMALL)
    p = make_problem(*arrays, return_lse=True, return_weights=True, **opts)
    there = {n: device(x) if n in ("mask", "bias") else x for n, x in opts.items()}
    results = fastattn.scaled_dot(
        *map(device, arrays), return_lse=True, return_weights=True, **there
    )
    assert all(hasattr(x, "__cuda_array_interface__") for x in results)
    assert_solves(tuple(map(read, results)), p)


@runs
@pytest.mark.parametrize("layout", ["sequence first", "transposed", "backwards", "every other"])
def test_strides_on_the_device(device, layout):
    arrays = Shape(2, 2, 3, 4, 4, kv_heads=1).arrays()
    laid_out = [LAYOUTS[layout](x) for x in arrays]
    result = fastattn.scaled_dot(*map(device, laid_out))
    assert_solves(read(result), make_problem(*arrays))
    order = fastattn.scaled_dot(*laid_out, backend="reference").strides
    assert result.__cuda_array_interface__["strides"] == order


@runs
def test_broadcast_on_the_device(device):
    q, k, v = Shape(2, 2, 3, 4, 4).arrays()
    wide = np.broadcast_to(k[:1], k.shape)
    mask = np.array([True, False, True, True])
    result = fastattn.scaled_dot(device(q[0]), device(wide), device(v), mask=device(mask))
    assert_solves(read(result), make_problem(q[0], wide, v, mask=mask))


@runs
@pytest.mark.parametrize(
    "dtypes", [("f2", "f4", "f2"), ("i2", "f4", "f8"), ("f2", "f2", "f2")], ids=str
)
def test_dtypes_on_the_device(device, dtypes):
    arrays = [(4 * x).astype(d) for x, d in zip(SMALL.arrays(), dtypes, strict=True)]
    result = read(fastattn.scaled_dot(*map(device, arrays)))
    assert_solves(result, make_problem(*arrays))


@runs
def test_bfloat16_on_the_device(device):
    arrays = SMALL.arrays("bfloat16")
    result = fastattn.scaled_dot(*(device(x, "<V2") for x in arrays))
    assert result.__cuda_array_interface__["typestr"] == "<V2"
    assert_solves(read(result), make_problem(*arrays))


@runs
def test_one_head_on_the_device(device):
    arrays = [x[0, 0] for x in SMALL.arrays()]
    results = fastattn.scaled_dot(*map(device, arrays), return_lse=True)
    assert_solves(tuple(map(read, results)), make_problem(*arrays, return_lse=True))


@runs
def test_out_on_the_device(device):
    arrays = SMALL.arrays()
    out = device(np.zeros((1, 2, 5, 8), np.float32))
    assert fastattn.scaled_dot(*map(device, arrays), out=out) is out
    assert_solves(out.host().view(np.float32).reshape(1, 2, 5, 8), make_problem(*arrays))
    flat = device(np.zeros((5, 8), np.float32))
    one = [x[0, 0] for x in arrays]
    assert fastattn.scaled_dot(*map(device, one), out=flat) is flat
    assert_solves(flat.host().view(np.float32).reshape(5, 8), make_problem(*one))


@runs
def test_out_that_is_an_input_on_the_device(device):
    cuda = importlib.import_module("numba.cuda")
    heads = Shape(1, 2, 5, 5, 8).arrays()
    for arrays in (heads, [x[0, 0] for x in heads]):
        for place in range(3):
            there = [cuda.to_device(x) for x in arrays]
            assert fastattn.scaled_dot(*there, out=there[place]) is there[place]
            assert_solves(read(there[place]), make_problem(*arrays))


class Described:
    """What says that it is on a device, and is never read."""

    def __init__(self, x, **more):
        self.__cuda_array_interface__ = {
            "shape": x.shape, "strides": x.strides, "typestr": x.dtype.str, "data": (4096, False),
            "version": 3, **more,
        }  # fmt: skip


class WithGradient:
    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("Can't get it on Variable that requires grad; use var.detach()")


def test_mistakes_on_the_device():
    """Validated like any other, on any machine, before anything is read."""
    arrays = SMALL.arrays()
    q, k, v = map(Described, arrays)

    def fails(error, message, q=q, k=k, v=v, **opts):
        with pytest.raises(error, match=message):
            fastattn.scaled_dot(q, k, v, **opts)

    fails(TypeError, r"^k: expected .* on the CUDA device like q, got .* host's", k=arrays[1])
    fails(TypeError, r"^v: expected .* host's memory like q", q=arrays[0], k=arrays[1])
    fails(TypeError, r"^mask: expected .* CUDA device", mask=np.ones(11, bool))
    fails(TypeError, r"^bias: expected .* CUDA device", bias=np.ones(11))
    fails(TypeError, r"^out: expected .* CUDA device", out=np.ones((1, 2, 5, 8), "f"))
    fails(TypeError, r"^bias: expected .* host's memory", *arrays, bias=Described(np.ones(11)))
    fails(TypeError, r"^alibi: expected .* host's memory", alibi=Described(np.ones(2)))
    fails(TypeError, r"^q: .*requires grad", q=WithGradient())
    fails(TypeError, r"^q: expected a plain array", q=Described(arrays[0], mask=k))
    fails(TypeError, r"^q: <c8|complex64", q=Described(arrays[0].astype("c8")))
    fails(TypeError, r"^q: .* got >f4", q=Described(arrays[0].astype(">f4")))
    fails(ValueError, r"^q: expected strides", q=Described(arrays[0], strides=(6, 6, 6, 6)))
    fails(ValueError, r"^k: expected head_dim 8 as in q, got 4", k=Described(arrays[1][..., :4]))
    fails(ValueError, r"^mask: .* got \(3,\)", mask=Described(np.ones(3, bool)))
    fails(TypeError, r"^mask: expected bool, got float64", mask=Described(np.ones(11)))
    fails(ValueError, r"^out: expected a writeable", out=Described(arrays[0], data=(1 << 20, True)))
    fails(ValueError, r"^out: expected shape", out=Described(arrays[1], data=(1 << 20, False)))
    fails(ValueError, r"^out: expected no overlap", out=Described(arrays[0], strides=(0, 0, 0, 4)))
    fails(ValueError, r"^backend: 'numpy' given.*on a CUDA device", backend="numpy")
    if backend.missing():
        fails(ValueError, rf"^q: on a CUDA device.*{backend.missing().split(' (')[0]}")


def test_operands_on_several_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())

    class Array(Described):
        __module__ = "cupy"

        def __init__(self, x, device):
            super().__init__(x)
            self.device = SimpleNamespace(id=device)

    q, k, v = SMALL.arrays()
    with pytest.raises(ValueError, match=r"^v: expected .* CUDA device 0 like q, .* device 1"):
        fastattn.scaled_dot(Array(q, 0), Array(k, 0), Array(v, 1))
    with pytest.raises(ValueError, match=r"^out: expected .* got one on device 1$"):
        fastattn.scaled_dot(Array(q, 0), Array(k, 0), Array(v, 0), out=Array(q, 1))


def test_results_are_torchs():
    """The allocation alone, in the host's memory."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Tensor(Described):
        __module__ = "torch"
        device = torch.device("cpu")

    q = LAYOUTS["sequence first"](np.zeros((2, 3, 5, 4), np.float16))
    p = make_problem(*[Tensor(q)] * 3)
    planned = p.new_result()
    made = p.q.allocate(planned.shape, planned.strides, planned.dtype)
    assert (made.shape, made.dtype) == ((2, 3, 5, 4), torch.float16)
    assert tuple(2 * n for n in made.stride()) == q.strides


# ------------------------------------------------------------------------------ the compiler


def ptx_of(monkeypatch, spec, opt=True, processor=(9, 0), **types_of):
    """The PTX of a kernel of multiply-adds."""
    kernel = importlib.import_module("fastattn.backends.cuda.multiply_add")
    real = spec.real
    of = {n: types_of.get(n, real) for n in ("q", "k", "v", "out", "mask", "bias")}
    arguments = (
        *(f"[{t}]" for t in of.values()), "[int64]", "[int64]", f"[{real}]", f"[{real}]",
        f"[{of['out']}]", "[int64]", f"[{real}]", "[int64]", "[int32]", real, real, "int64",
    )  # fmt: skip
    return compile_ptx(monkeypatch, kernel.compiled(spec), arguments, processor, opt)


def spec_of(*arrays, **options):
    call = importlib.import_module("fastattn.backends.cuda.call")
    return call.spec_of(make_problem(*arrays, **options))._replace(simulated=False)


@pytest.fixture
def compiler(monkeypatch):
    """`ptx_of`, where NVIDIA's compiler library is."""
    if SIMULATED:
        pytest.skip("the simulator compiles nothing")
    need_compiler()
    return lambda *args, **types_of: ptx_of(monkeypatch, *args, **types_of)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiled_kernel_is_what_was_meant(compiler, head_dim):
    """What the simulator cannot show: types, registers, vector loads, shared memory."""
    ptx = compiler(spec_of(*Shape(1, 1, 64, 1, head_dim).arrays()))
    assert ".f64" not in ptx
    assert ".local" not in ptx  # the sums are in registers
    inner = [b for b in re.split(r"^\$L", ptx, flags=re.M) if b.count("fma.rn.f32") >= 64]
    assert len(inner) >= 2
    products = [b for b in inner if b.count("ld.shared.v4.f32") * 4 * 16 >= b.count("fma.rn.f32")]
    assert len(products) >= 2
    shared = sum(int(n) for n in re.findall(r"\.shared .*\[(\d+)\]", ptx))
    assert 0 < shared <= 48 << 10


def test_compiles_for_a_few_queries(compiler):
    """Parts of the keys, and the rows that the kernel of tensor cores has flagged."""
    spec = spec_of(*Shape(1, 1, 1, 1, 128).arrays("float64"), return_max=True)
    assert spec.few
    compiler(spec._replace(partial=True, redo=True), False, out="float64")


@pytest.mark.parametrize(
    ("dtype", "processor"), [("bfloat16", (8, 0)), *((dtype, (9, 0)) for dtype in DTYPES)], ids=str
)
def test_compiles_with_everything(compiler, dtype, processor):
    shape = Shape(1, 2, 3, 4, 33, kv_heads=1, value_dim=200)
    names = ["softcap", "bias", "alibi", "sinks", "mask", "causal"]
    opts = {**options(names, shape), "bias": np.zeros(4), "return_lse": True}
    spec = spec_of(*shape.arrays(dtype), **opts, return_weights=True)
    stored = "uint16" if dtype == "bfloat16" else dtype
    types = dict.fromkeys(("q", "k", "v", "out"), stored)
    # Unoptimised, to be quick: types and the verifier are what is tested.
    ptx = compiler(spec, False, processor, **types, mask="uint8", bias="float64")
    assert f"sm_{processor[0]}{processor[1]}" in ptx
