"""The ``cuda`` backend beside torch's `scaled_dot_product_attention`, on one GPU, in minutes.

``python benchmarks/cuda.py OUT.json`` prints a table and writes it with what it was measured on.
``--tiny`` only shows that the program works, without torch and, with ``NUMBA_ENABLE_CUDASIM=1``,
without a GPU: it times nothing worth knowing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import fastattn

LIMIT = 300  # seconds, after which what is left is skipped
REPEATS = 7
TIMED = 0.2  # seconds that the calls of one repetition take together, or one call


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    dim: int
    causal: bool = False
    window: int | None = None

    @property
    def flops(self) -> float:
        """Of both products over the keys that are seen."""
        i = np.arange(self.n_queries)[:, None] + self.n_keys - self.n_queries
        last = i if self.causal else np.full_like(i, self.n_keys - 1)
        first = np.zeros_like(i)
        if self.window is not None:
            first, last = i - self.window, i + self.window
        seen = np.minimum(last, self.n_keys - 1) - np.maximum(first, 0) + 1
        return 4.0 * self.batch * self.heads * self.dim * float(seen.sum())


def square(name, dtype, batch, heads, n, dim, kv_heads=None, **options):
    return Case(name, dtype, batch, heads, kv_heads or heads, n, n, dim, **options)


CASES = (
    square("D 64", "bfloat16", 4, 16, 4096, 64),
    square("D 64", "float16", 4, 16, 4096, 64),
    square("D 128", "bfloat16", 4, 16, 4096, 128),
    square("D 128", "float16", 4, 16, 4096, 128),
    square("D 128, causal", "bfloat16", 4, 16, 4096, 128, causal=True),
    square("32/8 heads, causal", "bfloat16", 1, 32, 16384, 128, 8, causal=True),
    square("D 64", "float32", 1, 8, 4096, 64),
    square("D 128", "float32", 1, 16, 4096, 128),
    square("D 128, long", "float32", 1, 4, 16384, 128),
    square("D 64", "float64", 1, 8, 4096, 64),
    square("window of 256", "bfloat16", 1, 8, 16384, 128, window=256),
    Case("decode, batch 8", "bfloat16", 8, 32, 8, 1, 8192, 128),
    Case("decode, batch 1", "bfloat16", 1, 32, 8, 1, 8192, 128),
    Case("decode, batch 8", "float32", 8, 32, 32, 1, 8192, 128),
    square("a call", "float32", 1, 4, 16, 64),
    square("a call", "bfloat16", 1, 4, 16, 64),
)


def tiny(case: Case) -> Case:
    """As many queries and keys as the simulator can do in seconds."""
    n_queries, heads = min(case.n_queries, 3), min(case.heads, 2)
    return replace(
        case, batch=1, heads=heads, kv_heads=min(case.kv_heads, heads), n_queries=n_queries,
        n_keys=9, dim=8, window=case.window and 2,
    )  # fmt: skip


class Arrays:
    """The arrays of a case, of torch on the GPU, or of NumPy."""

    def __init__(self, case: Case, torch):
        self.case, self.torch = case, torch
        rows, keys = (case.batch, case.heads, case.n_queries), (case.batch, case.kv_heads)
        shapes = [(*rows, case.dim)] + [(*keys, case.n_keys, case.dim)] * 2
        if torch is None:
            self.qkv = [np.random.default_rng(0).standard_normal(s).astype(kind(case.dtype))
                        for s in shapes]  # fmt: skip
        else:
            torch.manual_seed(0)
            real = getattr(torch, case.dtype)
            self.qkv = [torch.randn(s, device="cuda", dtype=torch.float32).to(real) for s in shapes]

    def ours(self):
        options = {} if self.case.window is None else {"window": self.case.window}
        backend = {"backend": "cuda"}
        return fastattn.scaled_dot(*self.qkv, causal=self.case.causal, **options, **backend)

    def theirs(self):
        """A window is a mask to torch, made before the clock runs."""
        attend = self.torch.nn.functional.scaled_dot_product_attention
        options = {"enable_gqa": True} if self.case.kv_heads != self.case.heads else {}
        if self.case.window is None:
            # With as many queries as keys causal is the same to both.
            return lambda: attend(*self.qkv, is_causal=self.case.causal, **options)
        i = self.torch.arange(self.case.n_keys, device="cuda")
        mask = (i[:, None] - i[None]).abs() <= self.case.window
        return lambda: attend(*self.qkv, attn_mask=mask, **options)


def kind(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def seconds(call, synchronize) -> float:
    """The median time of a call, of several in a row."""
    start = time.perf_counter()
    call()
    synchronize()
    count = max(1, min(1000, round(TIMED / max(time.perf_counter() - start, 1e-6))))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize()
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def measure(case: Case, torch) -> dict:
    """A row of the table: times in seconds, `ratio` how many times as fast as torch."""
    arrays = Arrays(case, torch)
    synchronize = (lambda: None) if torch is None else torch.cuda.synchronize
    start = time.perf_counter()
    result = arrays.ours()
    synchronize()
    row = {**vars(case), "first_call": time.perf_counter() - start}
    row["plan"] = fastattn.explain(*arrays.qkv, causal=case.causal, backend="cuda").plan
    row["ours"] = seconds(arrays.ours, synchronize) if torch is not None else None
    if torch is not None:
        theirs = arrays.theirs()
        row["difference"] = float((result.double() - theirs().double()).abs().max())
        row["theirs"] = seconds(theirs, synchronize)
        row["ratio"] = row["theirs"] / row["ours"]
        row["tflops"] = case.flops / row["ours"] / 1e12
    return row


def machine(torch) -> dict:
    found = {"gpu": None if torch is None else torch.cuda.get_device_name(), "python": sys.version}
    for package in ("numba-cuda", "numpy", "torch", "cupy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def line(row: dict) -> str:
    times = f"{row['dtype']:9} {row['name']:20} first call {row['first_call']:6.2f} s"
    if row["ours"] is None:
        return times
    return (
        f"{times}   {row['ours'] * 1e3:9.3f} ms, torch {row['theirs'] * 1e3:9.3f} ms"
        f"   {row['tflops']:6.1f} TFLOP/s   {row['ratio']:.2f}x   differs by"
        f" {row['difference']:.1e}   {row['plan']['kernel']}"
    )


def main():
    # The package `cuda`, which Numba imports, must not be found to be this file.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != folder]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", help="a file for the table as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes, without torch")
    options = parser.parse_args()
    torch = None
    if not options.tiny:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch finds no GPU")
    start, rows = time.perf_counter(), []
    for case in CASES:
        if time.perf_counter() - start > LIMIT:
            print(f"skipped after {LIMIT} s: {case.dtype} {case.name}")
            continue
        rows.append(measure(tiny(case) if options.tiny else case, torch))
        print(line(rows[-1]), flush=True)
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"machine": machine(torch), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
