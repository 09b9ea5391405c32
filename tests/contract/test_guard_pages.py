"""Nothing is read or written beyond an operand: on both sides of each lies forbidden memory.

As a program, ``python tests/test_guard_pages.py BACKEND``, this makes the calls, and prints each
before it makes it, so that the last line says which one was ended by the system.
"""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.subprocesses import child_environment

import fastattn

SIZES = range(1, 131)
OTHER_SIZES = (1, 6, 65)
DIMS = (*range(1, 21), 31, 32, 33, 63, 64, 65)
BIAS_DTYPES = ("f4", "f8", "f2", "i1", ">f4", "g")
LAYOUTS = ("packed", "transposed", "gaps", "backwards")
GRID = ("heads", "queries", "keys")
OPTIONS = (  # the axes of mask and bias, where given; and what else is
    ({}, {}),
    ({}, {"causal": True}),
    ({"mask": GRID}, {}),
    ({"bias": GRID}, {}),
    ({"mask": ("keys",)}, {"return_weights": True}),
    ({"bias": ("queries", "one")}, {"window": (40, 3)}),
    ({"mask": GRID, "bias": GRID}, {"softcap": 2.0, "return_lse": True, "return_weights": True}),
)


class Guarded:
    """Room for one array between two pages that may not be touched."""

    def __init__(self, size):
        page = mmap.PAGESIZE
        size = -(-size // page) * page
        self.memory = mmap.mmap(-1, size + 2 * page)
        self.begin, self.end = page, page + size
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        address = np.frombuffer(self.memory, np.uint8).ctypes.data
        for guard in (address, address + self.end):
            if libc.mprotect(guard, page, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, shape, dtype, layout, side):
        """An array that begins where the room begins, or ends where it ends."""
        dtype = np.dtype(dtype)
        axes = range(len(shape)) if layout == "transposed" else reversed(range(len(shape)))
        strides, step = [0] * len(shape), dtype.itemsize * (2 if layout == "gaps" else 1)
        for axis in axes:
            strides[axis] = step
            step *= shape[axis]
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        offset = self.begin if side == "begin" else self.end - last - dtype.itemsize
        if layout == "backwards":
            offset, strides = offset + last, [-s for s in strides]
        return np.ndarray(shape, dtype, self.memory, offset, strides)


def calls():
    """``(side, layout, sizes, dtype, bias_dtype, options)``: every option at every size."""
    pairs = {(n, other) for n in SIZES for other in OTHER_SIZES}
    pairs |= {(other, n) for n, other in pairs}
    kinds = list(itertools.product(("f4", "f8"), OPTIONS))
    for n, (n_queries, n_keys) in enumerate(sorted(pairs)):
        sizes = {"one": 1, "heads": 1 + n % 3, "queries": n_queries, "keys": n_keys,
                 "dim": DIMS[n % 26], "value_dim": DIMS[n * 5 // 3 % 26]}  # fmt: skip
        for kind in kinds:  # what vectors read beyond lies behind packed rows
            yield "end", "packed", sizes, kind[0], BIAS_DTYPES[n % 6], kind[1]
        for m, (side, layout) in enumerate(itertools.product(("begin", "end"), LAYOUTS)):
            dtype, options = kinds[(n + m) % len(kinds)]
            yield side, layout, sizes, dtype, BIAS_DTYPES[(n + m) % 6], options


def attend(backend, room, numbers, side, layout, sizes, dtype, bias_dtype, options):
    axes, others = options
    axes = {
        "q": ("heads", "queries", "dim"),
        "k": ("one", "keys", "dim"),
        "v": ("one", "keys", "value_dim"),
        "out": ("heads", "queries", "value_dim"),
        **axes,
    }
    dtypes = {"mask": bool, "bias": bias_dtype}
    arrays = {}
    for name, names in axes.items():
        shape = tuple(sizes[axis] for axis in names)
        arrays[name] = room[name].array(shape, dtypes.get(name, dtype), layout, side)
        # Small whole numbers; of a mask, those that are not 0 are True.
        arrays[name][...] = numbers[tuple(slice(n) for n in (1,) * (3 - len(shape)) + shape)]
    fastattn.scaled_dot(**arrays, **others, backend=backend)


def main(backend):
    room = {name: Guarded(3 * 130 * 130 * 32) for name in ("q", "k", "v", "out", "mask", "bias")}
    numbers = np.random.default_rng(0).integers(-3, 4, (3, 130, 130)).astype("i1")
    for call in calls():
        print(*call, flush=True)
        attend(backend, room, numbers, *call)


@pytest.mark.skipif(os.name != "posix", reason="uses mprotect")
def test_nothing_beyond_an_operand_is_touched(target):
    """Data that begins where a page begins, and data that ends where one ends."""
    if target.backend == "numpy":
        pytest.skip("NumPy's own loops and BLAS alone touch what it computes with")
    child = subprocess.run(
        [sys.executable, __file__, target.backend],
        env=child_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.returncode == 0, f"ended by {child.returncode} in {child.stdout.splitlines()[-1:]}"
    assert child.stdout.count("\n") > 10_000


if __name__ == "__main__":
    main(sys.argv[1])
