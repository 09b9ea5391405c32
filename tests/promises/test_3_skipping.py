"""Promise 3: tiles that no query sees are neither read nor computed."""

import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")

# The pages of the keys and values that no query sees are forbidden: to read one ends the program.
PROGRAM = """
import ctypes, mmap, sys
import numpy as np
import fastattn

backend, case = sys.argv[1:]
n_keys, dim = 8192, 64
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

def guarded(first, last):
    '''Keys of which only first..last may be read.'''
    memory = mmap.mmap(-1, n_keys * dim * 4)
    x = np.frombuffer(memory, np.float32).reshape(n_keys, dim)
    x[...] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    for begin, end in ((0, first), (last, n_keys)):
        if begin < end:
            address, size = x.ctypes.data + begin * dim * 4, (end - begin) * dim * 4
            if libc.mprotect(address, size, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
    return x, memory

for n_queries in (1, 5, 300):
    # Tiles of up to 1024 keys may be read whole where they hold a key that is seen.
    first, last, options = {
        "kv_lengths": (0, 3072, {"kv_lengths": 3000}),
        "causal": (0, 3072, {"causal": True, "q_offset": 3000 - n_queries}),
        "window": (3072, 6144, {"window": (200, 200), "q_offset": 5000}),
        "spans": (2048, 5120, {"spans": (3000, 5000)}),
        "nothing": (0, 0, {"kv_lengths": 0}),
        "mask": (2048, 5120, {"mask": (np.arange(n_keys) >= 3000) & (np.arange(n_keys) < 5000)}),
        "bias": (2048, 5120, {"bias": np.where(abs(np.arange(n_keys) - 4000) < 1000, 1, -np.inf)}),
        "windows apart": (3072, 6144, {"window": (200, 200), "q_offset": 5000, "kv_lengths": 5100}),
    }[case]
    q = np.random.default_rng(1).standard_normal((n_queries, dim), np.float32)
    (k, keep), (v, keep_too) = guarded(first, last), guarded(first, last)
    out = fastattn.scaled_dot(q, k, v, backend=backend, threads=2, **options)
    shown = [k[first:last], v[first:last]]
    if case != "nothing":
        moved = dict(options)
        if "kv_lengths" in moved:
            moved["kv_lengths"] -= first
        if "q_offset" in moved:
            moved["q_offset"] -= first
        if "spans" in moved:
            moved["spans"] = tuple(x - first for x in moved["spans"])
        for name in {"mask", "bias"} & moved.keys():
            moved[name] = moved[name][first:last]
        wanted = fastattn.scaled_dot(q, *shown, backend="reference", **moved)
        assert np.allclose(out, wanted, rtol=1e-4, atol=1e-5)  # that the right keys were read
    else:
        assert (out == 0).all()
print("fine")
"""

CASES = ["kv_lengths", "causal", "window", "spans", "nothing", "mask", "bias", "windows apart"]


@pytest.mark.parametrize("case", CASES)
def test_unseen_tiles_are_not_read(target, run_python, case):
    """Keys and values a block away from any that is seen lie in memory that may not be read."""
    assert run_python(PROGRAM, target.backend, case).strip() == "fine"
