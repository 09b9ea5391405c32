"""Times that may be compared: interleaved rounds, medians, and quiet between the contestants.

Two things would otherwise decide a ranking. The machine drifts (its clock, its other users), so
every contestant runs once per round, and each round is one moment. And the thread pools of OpenMP,
TBB and others spin for some milliseconds after a call, on the cores of whoever comes next; so each
turn begins with a pause and, as the pause puts the contestant's own threads to sleep, a warm call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

__all__ = ["Times", "calls_per_sample", "interleave", "seconds"]

PAUSE = 0.06
SHORTEST = 0.005  # a sample lasts at least this long, in as many calls as it takes
WARMS_ITSELF = 0.25  # in a call as long as this, waking the threads is a part in a thousand

# Who takes this many times as long as the fastest needs no better median than of so many rounds.
LAGGARD, LAGGARD_ROUNDS = 3, 3


class Times(NamedTuple):
    """Seconds per call, one sample per round."""

    samples: list[float]
    calls: int  # in each sample

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)


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
    each_round: Callable[[], Any] = lambda: None,
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
    each_round
        Called at the beginning of each round.
    """
    times: dict[str, Times] = {}
    for done in range(rounds):
        sleep(PAUSE)
        each_round()
        fastest = min((t.best for t in times.values()), default=0.0)
        for name, call in calls.items():
            tick(name)
            if done >= LAGGARD_ROUNDS and times[name].best > LAGGARD * fastest:
                continue
            sleep(PAUSE)
            if name not in times:
                long = seconds(call) >= WARMS_ITSELF
                times[name] = Times([], 1 if long else calls_per_sample(call))
            elif times[name].best < WARMS_ITSELF:
                call()
            times[name].samples.append(_sample(call, times[name].calls))
    return times


def _sample(call: Callable[[], Any], n: int) -> float:
    began = perf_counter()
    for _ in range(n):
        call()
    return (perf_counter() - began) / n
