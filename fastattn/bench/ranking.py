"""One case, every candidate that can take part: time, rate, memory and error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from statistics import median
from typing import Any

import numpy as np

from ..core.dtypes import float_type
from . import machine, memory, timing
from .candidates import Candidate
from .cases import Case
from .exact import exact_rows

__all__ = ["add_ratios", "conditions", "rank", "steps"]

# Some 4 ms of multiply-adds, right after fastattn's kernel has run. A processor lowers its clock
# under a kernel that reads and writes memory, and raises it again within 10 ms or so of work in
# registers: a longer burst would be measured at a clock that no kernel ever sees.
PEAK_ROUNDS = 1_000_000


def conditions(threads: int) -> dict[str, Any]:
    """What a ranking was measured on and with."""
    found = machine.info()
    told = ("fastattn", "python", "numpy", "blas", "machine", "environment")
    return {
        **{key: found[key] for key in told},
        "instruction set": found["instruction set in use"],
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
    }


def rank(
    name: str,
    case: Case,
    candidates: Iterable[Candidate],
    threads: int,
    repeat: int = 5,
    with_memory: bool = True,
    tick: Callable[[str], Any] = lambda name: None,
) -> dict[str, Any]:
    """Measure `case` and return its ranking, fastest first, as plain data."""
    absent, present = {}, []
    for candidate in candidates:
        if not candidate.belongs(case):
            continue
        reason = candidate.unavailable(case, threads)
        if reason is None:
            present.append(candidate)
        else:
            absent[candidate.name] = reason
    calls, errors = prepare(case, present, threads, tick)
    plain, without = _plain(case, present, threads, tick)
    peaks: list[float] = []

    def after_first():
        peaks.extend(_peak(case, threads))
        if plain is not None:
            plain["samples"] += timing.interleave({"": without}, 1)[""].samples

    times = timing.interleave(calls, repeat, tick, after_first)
    peak = _highest(peaks, case, times)
    if plain is not None:
        plain["median"] = median(plain["samples"])
    entries = []
    for candidate in present:
        extra = None
        if with_memory:
            tick(f"memory of {candidate.name}")
            extra = memory.extra_memory(candidate.name, case, threads)
        taken = times[candidate.name]
        entries.append({**_entry(candidate, case, taken, peak), "memory": extra,
                        "error": errors[candidate.name]})  # fmt: skip
    entries.sort(key=lambda entry: entry["median"])
    add_ratios(entries)
    return {
        "name": name,
        "case": str(case),
        **case._asdict(),
        "flops": case.flops,
        "bytes": case.bytes,
        "decodes": case.decodes,
        "peak": peak,
        "plain": plain,
        "entries": entries,
        "absent": absent,
    }


def steps(candidates: int, repeat: int, with_memory: bool) -> int:
    """How many ticks one `rank` makes at most, for a progress bar."""
    return 2 + candidates * (1 + repeat + with_memory)


def prepare(
    case: Case,
    candidates: Iterable[Candidate],
    threads: int,
    tick: Callable[[str], Any] = lambda name: None,
):
    """``(calls, errors)`` by name; each call has run once, and its result been compared."""
    candidates = list(candidates)
    if not candidates:
        return {}, {}
    tick("preparing the exact result")
    q, k, v = case.arrays()
    rows, exact = exact_rows(case, q, k, v)
    calls: dict[str, Callable[[], Any]] = {}
    errors = {}
    for candidate in candidates:
        tick(f"preparing {candidate.name}")
        call, read = candidate.prepare(q, k, v, case, threads)
        found = read(call())
        by_chance = candidate.draws_its_own(case)
        errors[candidate.name] = None if by_chance else rms_error(found, rows, exact)
        calls[candidate.name] = call
    return calls, errors


def _plain(case: Case, present: list[Candidate], threads: int, tick):
    """What is known before it is timed of the call without the option, by the first of ours, and
    this call; ``(None, None)`` where there is none.
    """
    candidate = next((c for c in present if c.ours), None)
    if candidate is None or case.plain is None:
        return None, None
    tick(f"preparing {candidate.name} without {case.extra}")
    call, _ = candidate.prepare(*case.plain.arrays(), case.plain, threads)
    call()
    return {"name": candidate.name, "without": case.extra, "samples": []}, call


def rms_error(out: np.ndarray, rows: np.ndarray, exact: np.ndarray) -> float:
    """The root of the mean square distance of some queries' results from the exact ones."""
    return float(np.sqrt(np.mean(np.square(out[..., rows, :].astype(exact.dtype) - exact))))


def _peak(case: Case, threads: int) -> list[float]:
    """The roof over every kernel, if it can be measured: the bytes per second that memory gives
    where the case decodes, else the flop/s of multiply-adds in registers.
    """
    compiled = machine.kernels()
    if compiled is None:
        return []
    if case.decodes:
        return [compiled.read_bandwidth(threads)]
    return [compiled.peak_flops(float_type(case.dtype), threads, PEAK_ROUNDS)]


def _highest(peaks: list[float], case: Case, times: Mapping[str, timing.Times]) -> float | None:
    """The highest rate that was measured: no share of it is above 1, although the clock of the
    machine drifts, keys come from a cache, and AMX multiplies faster than multiply-adds do.
    """
    work = case.bytes if case.decodes else case.flops
    return max([*peaks, *(work / taken.median for taken in times.values())]) if peaks else None


def _entry(candidate: Candidate, case: Case, times: timing.Times, peak) -> dict[str, Any]:
    rate = case.flops / times.median
    read = case.bytes / times.median
    return {
        "name": candidate.name,
        "version": candidate.version(),
        "ours": candidate.ours,
        "median": times.median,
        "best": times.best,
        "samples": times.samples,
        "flops per second": rate,
        "bytes per second": read,
        "share of peak": (read if case.decodes else rate) / peak if peak else None,
    }


def add_ratios(entries: list[dict[str, Any]]) -> None:
    """How many times as long each takes as the fastest of ours."""
    ours = [entry["median"] for entry in entries if entry["ours"]]
    for entry in entries:
        entry["ratio"] = entry["median"] / ours[0] if ours else None
