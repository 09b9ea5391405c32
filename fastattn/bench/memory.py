"""How much memory a call needs beyond its inputs and its result.

Measured in a fresh process per candidate and case, because allocators and arenas keep what an
earlier call has used. There a small call comes first, so that what a library sets up once, threads
and code, is not counted; then the peak of the resident set is reset and the call is made.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from .cases import Case

__all__ = ["extra_memory"]

SMALL = 128  # queries and keys of the call that comes first
STATUS = Path("/proc/self/status")


def extra_memory(candidate: str, case: Case, threads: int, timeout: float = 600) -> int | None:
    """Bytes that a call of `candidate` needs at its peak; None where the system cannot say, or the
    candidate crashed: a ranking of an hour does not end with a peer.
    """
    if not STATUS.exists():
        return None
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", __name__, candidate, json.dumps(case._asdict()), str(threads)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=timeout,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def measure(candidate: str, case: Case, threads: int) -> int:
    """The same for this process, which must be fresh."""
    from .candidates import named

    peer = named(candidate)
    small = case._replace(n_queries=min(SMALL, case.n_queries), n_keys=min(SMALL, case.n_keys))
    call, _ = peer.prepare(*small.arrays(), small, threads)
    call()
    call()
    q, k, v = case.arrays()
    call, _ = peer.prepare(q, k, v, case, threads)
    _reset_peak()
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before - q.nbytes)


def _reset_peak() -> None:
    """Give free memory back, so that using it again counts, and forget the peak until now."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes the present size


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    name, case, threads = sys.argv[1:]
    fields = json.loads(case)
    window = fields.pop("window")  # JSON made a list of it
    print(measure(name, Case(**fields, window=window and tuple(window)), int(threads)))
