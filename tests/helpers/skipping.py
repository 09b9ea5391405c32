"""Calls of which some keys lie in memory that may not be read: to read them ends the process.

As a program, ``python -m helpers.skipping BACKEND WHAT...``, this makes the calls of every case and
prints each before, so that the last line says which one ended it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

import fastattn

N_KEYS, DIM = 8192, 64
CASES = ("kv_lengths", "causal", "window", "spans", "nothing", "mask", "bias", "windows apart")


def guarded(first, last):
    """Keys of which only first..last may be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    memory = mmap.mmap(-1, N_KEYS * DIM * 4)
    x = np.frombuffer(memory, np.float32).reshape(N_KEYS, DIM)
    x[...] = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    for begin, end in ((0, first), (last, N_KEYS)):
        if begin < end:
            address, size = x.ctypes.data + begin * DIM * 4, (end - begin) * DIM * 4
            if libc.mprotect(address, size, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
    return x


def problem(case, n_queries):
    """``(first, last, options)``. Tiles of up to 1024 keys may be read whole where they hold a key
    that is seen.
    """
    j = np.arange(N_KEYS)
    return {
        "kv_lengths": (0, 3072, {"kv_lengths": 3000}),
        "causal": (0, 3072, {"causal": True, "q_offset": 3000 - n_queries}),
        "window": (3072, 6144, {"window": (200, 200), "q_offset": 5000}),
        "spans": (2048, 5120, {"spans": (3000, 5000)}),
        "nothing": (0, 0, {"kv_lengths": 0}),
        "mask": (2048, 5120, {"mask": (j >= 3000) & (j < 5000)}),
        "bias": (2048, 5120, {"bias": np.where(abs(j - 4000) < 1000, 1, -np.inf)}),
        "windows apart": (3072, 6144, {"window": (200, 200), "q_offset": 5000, "kv_lengths": 5100}),
    }[case]


def moved(options, first, last):
    """The same of the keys first..last alone."""
    options = dict(options)
    for name in {"kv_lengths", "q_offset"} & options.keys():
        options[name] -= first
    if "spans" in options:
        options["spans"] = tuple(x - first for x in options["spans"])
    for name in {"mask", "bias"} & options.keys():
        options[name] = options[name][first:last]
    return options


def attend(backend, q, k, v, first, last, options):
    out = fastattn.scaled_dot(q, k, v, backend=backend, threads=2, **options)
    if first == last:
        assert not out.any()
        return
    shown = k[first:last], v[first:last]
    wanted = fastattn.scaled_dot(q, *shown, backend="reference", **moved(options, first, last))
    assert np.allclose(out, wanted, rtol=1e-4, atol=1e-5)  # that the right keys were read


def differentiate(backend, q, k, v, first, last, options):
    out, lse = fastattn.scaled_dot(q, k, v, backend=backend, return_lse=True, **options)
    grads = fastattn.scaled_dot_backward(out, q, k, v, out, lse, backend=backend, **options)
    assert all(np.isfinite(x).all() for x in grads)
    assert not any(x[:first].any() or x[last:].any() for x in grads[1:])
    assert first == last or all(x.any() for x in grads)


def make_maps(backend, q, k, v, first, last, options):
    importance = fastattn.key_importance(q, k, backend=backend, **options)
    indices, _ = fastattn.top_keys(q, k, 9, backend=backend, **options)
    assert not importance[:first].any() and not importance[last:].any()
    assert ((indices < 0) | (first <= indices) & (indices < last)).all()
    assert first == last or (importance.any() and (indices >= 0).any())


def main(backend, *whats):
    for case in CASES:
        for n_queries in (1, 5, 300):
            first, last, options = problem(case, n_queries)
            q = np.random.default_rng(1).standard_normal((n_queries, DIM), np.float32)
            k, v = guarded(first, last), guarded(first, last)
            for what in whats:
                print(case, n_queries, what, flush=True)
                globals()[what](backend, q, k, v, first, last, options)
    print("fine")


if __name__ == "__main__":
    main(*sys.argv[1:])
