"""How many threads a call may use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from .arguments import count
from .environment import getenv
from .extension import kernels
from .problem import Problem

__all__ = ["affinity", "flops", "openmp_setting", "thread_count"]

# With fewer, the time goes into reading the keys, and the arithmetic is for nothing.
FEWEST_QUERIES = 4


# No machine has use for more; a request for any number of threads is one for so many at most.
MOST_THREADS = 1024


def thread_count(requested: int | None, openmp: int) -> int:
    """``threads=``, else ``FASTATTN_NUM_THREADS``, else the least of the OpenMP setting (which
    `threadpoolctl.threadpool_limits` changes), the CPU affinity and the cgroup's quota.
    """
    if requested is not None:
        return min(requested, MOST_THREADS)
    setting = getenv("FASTATTN_NUM_THREADS")
    if setting:
        try:
            n = int(setting)
        except ValueError:
            raise ValueError(
                f"FASTATTN_NUM_THREADS: expected an integer, got {setting!r}"
            ) from None
        return min(count("FASTATTN_NUM_THREADS", n), MOST_THREADS)
    return max(1, min(openmp, affinity(), _cgroup_quota()))


def openmp_setting() -> int:
    """How many threads OpenMP would use; by its variable alone where the extension is missing, or
    was built without OpenMP.
    """
    if kernels is not None and (n := kernels.openmp_threads()):
        return n
    first = (getenv("OMP_NUM_THREADS") or "").partition(",")[0]
    return int(first) if first.strip().isdecimal() else affinity()


def flops(problem: Problem) -> int:
    """What a problem takes if no key is hidden; with few queries, what reading the keys does."""
    p = problem
    queries = p.n_queries if p.n_queries > FEWEST_QUERIES else FEWEST_QUERIES
    scores = queries * p.n_keys if p.packing is None else p.packing.scores()
    n = 2 * scores * (p.head_dim + p.value_dim) * p.heads
    for entries in p.batch:
        n *= entries
    return n


def affinity() -> int:
    """The number of CPUs that this process may run on.

    Where OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY let OpenMP bind its threads, it has bound
    the calling one to a single place, so that its mask is not the answer.
    """
    in_places = _cpus_in_places()
    if in_places:
        return in_places
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpus_in_places() -> int:
    return 0 if kernels is None else kernels.cpus_in_places()


@cache
def _cgroup_quota() -> int:
    """The CPU quota of this process's control group in whole CPUs, at least 1."""
    unlimited = 1 << 30
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().rsplit("::", 1)[-1].strip().lstrip("/")
    except OSError:
        return unlimited
    quotas = [unlimited]
    for group in (root / own, *(root / own).parents):
        for read in (_quota_v2, _quota_v1):
            try:
                quotas.append(read(group))
            except (OSError, ValueError):  # no such controller here, or no limit set
                continue
        if group == root:
            break
    return min(quotas)


def _quota_v2(group: Path) -> int:
    quota, period = (group / "cpu.max").read_text().split()
    return max(1, -(-int(quota) // int(period)))  # "max" is no number: ValueError, no limit


def _quota_v1(group: Path) -> int:
    quota = int((group / "cpu" / "cpu.cfs_quota_us").read_text())
    if quota <= 0:
        raise ValueError("no limit set")
    return max(1, -(-quota // int((group / "cpu" / "cpu.cfs_period_us").read_text())))
