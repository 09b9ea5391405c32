"""More than 2**31 elements, in memory that is reserved and hardly touched, or through stride 0."""

import mmap
import sys

import numpy as np
import pytest
from helpers.oracles import assert_solves
from helpers.problems import Shape

from fastattn.core.problem import make_problem

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves memory")

FAR = 2**31 + 16  # elements, so further than 32 bits reach, whether they count these or bytes
SHAPE = Shape(2, 4, 5, 9, 3, kv_heads=2)
SEEN = 700  # keys
N_KEYS = 2**31 + SEEN

MAP_NORESERVE = 0x4000  # on x86 and arm; the module has no name for it before Python 3.13


def reserved(shape, dtype, strides=None):
    """Zeros that take no memory until they are written; `strides` counts elements."""
    dtype = np.dtype(dtype)
    if strides is None:
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, (last + 1) * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"{last >> 30} Gi elements cannot be reserved here: {error}")
    return np.ndarray(shape, dtype, memory, 0, [s * dtype.itemsize for s in strides])


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_strides(target, axis, dtype):
    """One axis of each operand steps over more than 2**31 elements."""
    rng = np.random.default_rng(0)
    q, k, v = SHAPE.arrays(dtype)
    grid = (2, 4, 5, 9)
    near = {
        "q": q, "k": k, "v": v, "bias": rng.standard_normal(grid, np.float32),
        "mask": rng.random(grid) < 0.8, "out": np.empty_like(q),
    }  # fmt: skip
    far = {}
    for name, x in near.items():
        strides = [FAR if a == axis else s // x.itemsize for a, s in enumerate(x.strides)]
        far[name] = reserved(x.shape, x.dtype, strides)
        far[name][...] = x
    results = target.attend(**far, return_lse=True)
    assert results[0] is far["out"]
    del near["out"]
    assert_solves(results, make_problem(**near, return_lse=True))


OPTIONS = {
    "window": {"window": (SEEN - 50, 0)},
    "spans": {"spans": (N_KEYS - np.arange(SEEN - 10, SEEN), N_KEYS - np.arange(10))},
    "alibi": {"spans": (N_KEYS - SEEN, N_KEYS), "alibi": [0.01, 0.5]},
}


def keys(kind, rng, dim):
    """``(many, last)``: more than 2**31 keys, and those of them that are seen."""
    if kind == "stride 0":
        many = np.broadcast_to(rng.standard_normal((2, 1, dim), np.float32), (2, N_KEYS, dim))
        return many, many[:, -SEEN:]
    many = reserved((2, N_KEYS, dim), np.float32)
    many[:, -SEEN:] = rng.standard_normal((2, SEEN, dim), np.float32)
    return many, many[:, -SEEN:]


@pytest.mark.parametrize("kind", ["stride 0", "reserved"])
@pytest.mark.parametrize("option", OPTIONS)
def test_keys(target, option, kind):
    """More than 2**31 of them, of which the last are seen."""
    if target.backend == "cuda":
        pytest.skip("no device holds the mask and the bias of so many keys")
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 10, 8), np.float32)
    (k, last_k), (v, last_v) = keys(kind, rng, 8), keys(kind, rng, 5)
    mask, bias = reserved((10, N_KEYS), bool), reserved((2, 10, N_KEYS), np.float16)
    mask[:, -SEEN:] = rng.random((10, SEEN)) < 0.8
    bias[..., -SEEN:] = rng.standard_normal((2, 10, SEEN))
    options = OPTIONS[option]
    results = target.attend(q, k, v, mask=mask, bias=bias, return_lse=True, **options)
    first = N_KEYS - SEEN
    near = {n: x for n, x in options.items() if n != "spans"}
    if "spans" in options:
        near["spans"] = tuple(x - first for x in options["spans"])
    p = make_problem(
        q, last_k, last_v, mask=mask[:, -SEEN:], bias=bias[..., -SEEN:], return_lse=True, **near
    )
    assert_solves(results, p)
