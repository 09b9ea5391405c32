"""For programs that measure the memory that a call takes; all sizes are in MiB."""

from __future__ import annotations

import ctypes
import json

import numpy as np

MIB = 2**20


def status(key: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def held() -> float:
    """What the process holds, without what it has freed and the allocator keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return status("VmRSS")


def extra(call) -> float:
    """By how much a call raises the peak beyond what is held before and what it returns."""
    before = held()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what is held now
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    return status("VmHWM") - before - sum(x.nbytes for x in results) / MIB


def filled(*shape, dtype="float32"):
    """An array that lies in memory, of a dtype by its name."""
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype
    return np.full(shape, 0.01, dtype)


def report(**cases: float) -> None:
    print(json.dumps(cases))


def reported(printed: str, most: float) -> dict[str, float]:
    """Those of the reported cases that take more than they may, which ought to be none."""
    cases = json.loads(printed)
    assert cases
    return {case: size for case, size in cases.items() if not size < most}
