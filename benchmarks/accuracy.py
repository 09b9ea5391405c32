"""Error beside speed: ``python benchmarks/accuracy.py benchmarks/results/NAME-accuracy.json``.

For every instruction set of the machine and every dtype: the root-mean-square error of the compiled
kernels and of plain NumPy in that dtype, against the exact results of some queries, and the time of
a call. ``--repeat 0`` leaves out the times, where the machine is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn.bench import machine, timing
from fastattn.bench.candidates import named
from fastattn.bench.cases import Case
from fastattn.bench.exact import exact_rows
from fastattn.bench.ranking import conditions, prepare, rms_error

SHAPE = (1, 8, 4096, 4096, 64)
DTYPES = ("float32", "float64", "float16", "bfloat16")
OURS = "fastattn-cython"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="of the JSON file to write")
    parser.add_argument("--repeat", type=int, default=5, help="timed rounds of a dtype; default: 5")
    parser.add_argument("--only-here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    threads = machine.default_threads()
    found: dict[str, Any]
    if chosen.only_here:
        found = {dtype: measure(dtype, threads, chosen.repeat) for dtype in DTYPES}
    else:
        every = machine.info()["instruction sets"]
        sets = {name: in_process(every[:place], chosen) for place, name in enumerate(every)}
        found = {**conditions(threads), "repeat": chosen.repeat, "shape": SHAPE, "errors": sets}
    chosen.path.parent.mkdir(parents=True, exist_ok=True)
    chosen.path.write_text(json.dumps(found, indent=1) + "\n")


def in_process(forbidden: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds of each dtype where the faster instruction sets are forbidden."""
    command = [sys.executable, __file__, str(chosen.path), "--only-here"]
    environment = {
        **os.environ,
        "FASTATTN_DISABLE_CPU_FEATURES": " ".join(forbidden),
        "FASTATTN_ENABLE_CPU_FEATURES": "avx512_bf16",  # slow on some processors
    }
    subprocess.run([*command, "--repeat", str(chosen.repeat)], env=environment, check=True)
    return json.loads(chosen.path.read_text())


def measure(dtype: str, threads: int, repeat: int) -> dict[str, Any]:
    """Root mean squares of the result and of errors; the seconds of a call if it is repeated."""
    case = Case(*SHAPE, dtype=dtype)
    q, k, v = case.arrays()
    rows, exact = exact_rows(case, q, k, v)
    plain = np.empty_like(q)
    plain[..., rows, :] = plain_numpy(q[..., rows, :], k, v)
    calls, errors = prepare(case, [named(OURS)], threads)
    times = timing.interleave(calls, repeat, lambda name: None)[OURS] if repeat else None
    print(machine.instruction_set(), dtype, fastattn.__version__, errors[OURS])
    return {
        "result": float(np.sqrt(np.mean(np.square(exact)))),
        "error": errors[OURS],
        "plain NumPy": rms_error(plain, rows, exact),
        "median": times.median if times else None,
    }


def plain_numpy(q, k, v):
    """As one writes it, every step rounded to the dtype of `q`."""
    scores = (q @ k.swapaxes(-1, -2)).astype(q.dtype) * q.dtype.type(q.shape[-1] ** -0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True, dtype=q.dtype)
    return (weights @ v).astype(q.dtype)


if __name__ == "__main__":
    main()
