"""Times that may be compared: interleaved rounds, medians, and quiet between the candidates.

Two things would otherwise decide a ranking. The machine drifts (its clock, its other users), so
every candidate runs once per round, and each round is one moment. And thread pools spin after a
call, on the cores of whoever comes next: OpenMP's for 5 ms, onnxruntime's for 25, OpenBLAS's for
100, and on few cores a call of 0.1 ms then takes 8. So each turn begins by waiting until they all
sleep and, as the candidate's own threads do so too, with a warm call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any, NamedTuple

__all__ = ["Times", "calls_per_sample", "interleave", "seconds", "settle"]

STEP = 0.025
LONGEST_WAIT = 1.0
SHORTEST = 0.02  # a sample lasts at least this long, in as many calls as it takes
WARMS_ITSELF = 0.25  # in a call as long as this, waking the threads is a part in a thousand

# Who takes this many times as long as the fastest needs no better median than of so many rounds.
LAGGARD, LAGGARD_ROUNDS = 3, 1


class Times(NamedTuple):
    """Seconds per call, one sample per round: the median of its calls, since one in a hundred is
    a hundred times as long where the scheduler wakes two threads on one core.
    """

    samples: list[float]
    calls: int  # in each sample

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)


def settle() -> None:
    """Wait until no thread of this process is busy any more."""
    began = perf_counter()
    while perf_counter() - began < LONGEST_WAIT:
        used = process_time()  # by all threads
        sleep(STEP)
        if process_time() - used < STEP / 5:
            return


def seconds(call: Callable[[], Any]) -> float:
    """The duration of one call."""
    began = perf_counter()
    call()
    return perf_counter() - began


def calls_per_sample(call: Callable[[], Any]) -> int:
    """How many calls one sample takes, by a trial; the caller has warmed `call` up."""
    return max(1, round(SHORTEST / max(min(seconds(call) for _ in range(3)), 1e-7) + 0.5))


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    tick: Callable[[str], Any] = lambda name: None,
    after_first: Callable[[], Any] = lambda: None,
) -> dict[str, Times]:
    """Time every call once per round.

    Parameters
    ----------
    calls
        What to time, by name. Each must have run once, so that nothing is built while timed.
    rounds
        How many samples to take of each, but for those that lag far behind.
    tick
        Called with the name before each sample, for a progress bar.
    after_first
        Called in each round right after the first of the calls, at the clock that it leaves.
    """
    times: dict[str, Times] = {}
    for done in range(rounds):
        fastest = min((t.best for t in times.values()), default=0.0)
        for place, (name, call) in enumerate(calls.items()):
            tick(name)
            if done >= LAGGARD_ROUNDS and times[name].best > LAGGARD * fastest:
                continue
            settle()
            sample = seconds(call)
            if sample < WARMS_ITSELF:  # else a first call is as good as another
                n = times[name].calls if name in times else calls_per_sample(call)
                sample = median(seconds(call) for _ in range(n))
                times.setdefault(name, Times([], n))
            times.setdefault(name, Times([], 1)).samples.append(sample)
            if place == 0:
                after_first()
    return times
