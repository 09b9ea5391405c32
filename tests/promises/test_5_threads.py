"""Who decides the number of threads, and calls from many threads at once (promise 5)."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.oracles import assert_solves, same_bits
from helpers.problems import Shape, options

from fastattn.core import threads
from fastattn.core.problem import make_problem


@pytest.fixture
def machine(monkeypatch):
    """``machine(affinity, quota)``: a machine that allows so many CPUs."""

    def allow(affinity, quota):
        monkeypatch.setattr(threads, "affinity", lambda: affinity)
        monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)

    return allow


@pytest.mark.parametrize("setting", [
    {"OMP_PROC_BIND": "true"}, {"OMP_PLACES": "threads"}, {"GOMP_CPU_AFFINITY": "0-1023"}
])  # fmt: skip
def test_bound_threads(run_python, setting):
    """OpenMP binds the calling thread to one CPU then, and has the others all the same."""
    program = """
import os
before = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
import fastattn
from fastattn.core import threads
assert threads.affinity() == before, (threads.affinity(), before)
print("fine")
"""
    assert run_python(program, **setting).strip() == "fine"


class TestOrder:
    """``threads=``, then FASTATTN_NUM_THREADS, then the least of the others."""

    def test_argument_first(self, machine, monkeypatch):
        machine(3, 4)
        monkeypatch.setenv("FASTATTN_NUM_THREADS", "6")
        assert threads.thread_count(9, openmp=2) == 9

    def test_environment_next(self, machine, monkeypatch):
        machine(3, 4)
        monkeypatch.setenv("FASTATTN_NUM_THREADS", "6")
        assert threads.thread_count(None, openmp=2) == 6

    @pytest.mark.parametrize("openmp, affinity, quota", [(2, 3, 4), (4, 2, 3), (3, 4, 2)])
    def test_then_the_least(self, machine, openmp, affinity, quota):
        machine(affinity, quota)
        assert threads.thread_count(None, openmp) == 2

    def test_empty_setting_is_none(self, machine, monkeypatch):
        machine(3, 4)
        monkeypatch.setenv("FASTATTN_NUM_THREADS", "")
        assert threads.thread_count(None, openmp=2) == 2

    def test_at_least_one(self, machine):
        machine(1, 1)
        assert threads.thread_count(None, openmp=0) == 1

    @pytest.mark.parametrize("setting", ["0", "-2", "two", "1.5", "2 3"])
    def test_bad_setting(self, monkeypatch, setting):
        monkeypatch.setenv("FASTATTN_NUM_THREADS", setting)
        with pytest.raises(ValueError, match=rf"^FASTATTN_NUM_THREADS: .*{setting}"):
            threads.thread_count(None, openmp=2)

    @pytest.mark.parametrize("n", [2**31, 2**70])
    def test_any_number_is_at_most(self, machine, monkeypatch, n):
        """More than an int of C holds, or than any machine has use for."""
        machine(3, 4)
        assert threads.thread_count(n, openmp=2) == threads.MOST_THREADS
        monkeypatch.setenv("FASTATTN_NUM_THREADS", str(n))
        assert threads.thread_count(None, openmp=2) == threads.MOST_THREADS


BIG = Shape(1, 8, 300, 300, 64)


def test_bad_setting_reaches_the_caller(target, monkeypatch):
    if target.backend in ("numpy", "cuda"):
        pytest.skip(f"the threads of {target.backend} are not ours to set")
    monkeypatch.setenv("FASTATTN_NUM_THREADS", "many")
    with pytest.raises(ValueError, match=r"^FASTATTN_NUM_THREADS: expected an integer, got 'many'"):
        target.attend(*BIG.arrays())
    target.attend(*BIG.arrays(), threads=1)  # which wins, so the setting is not looked at


@pytest.mark.parametrize("setting", ["1", "2", "5"])
def test_setting_changes_no_result(target, monkeypatch, setting):
    arrays = BIG.arrays()
    monkeypatch.setenv("FASTATTN_NUM_THREADS", setting)
    assert_solves(target.attend(*arrays), make_problem(*arrays))


@pytest.mark.parametrize("n", [2**31, 2**70])
def test_any_number_of_threads(target, monkeypatch, n):
    arrays = BIG.arrays()
    expected = target.attend(*arrays, threads=1)
    np.testing.assert_allclose(target.attend(*arrays, threads=n), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("FASTATTN_NUM_THREADS", str(n))
    np.testing.assert_allclose(target.attend(*arrays), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.one_instruction_set
@pytest.mark.parametrize("names", [["causal"], ["window"], ["kv_lengths", "bias"]], ids=" ".join)
def test_more_threads_than_cores(target, names):
    """Threads that wait for each other's part of a sum make way for those that compute it."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} uses no threads of ours")
    shape = Shape(3, 4, 300, 1100, 16, kv_heads=2)
    arrays, opts = shape.arrays(), {**options(names, shape), "return_lse": True}
    wrt = [name for name in ("bias",) if name in opts]

    def results(threads):
        found = target.attend(*arrays, threads=threads, **opts)
        if target.unsupported_backward(*arrays, **opts) is not None:
            return found
        _, pull = target.vjp(*arrays, wrt=wrt, threads=threads, **opts)
        return (*found, *pull(found[0]))

    alone = results(1)
    for _ in range(3):
        for got, wanted in zip(results(64), alone, strict=True):
            assert same_bits(got, wanted)


LIMITED = """
import resource, sys
import numpy as np
import fastattn

q = np.random.default_rng(0).standard_normal((64, 300, 64), np.float32)
expected = fastattn.scaled_dot(q, q, q, threads=1)
with open("/proc/self/statm") as sizes:
    size = int(sizes.read().split()[0]) * resource.getpagesize()
room = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
for threads in (2, 64, 3, 64):
    try:
        out, pull = fastattn.vjp(fastattn.scaled_dot, q, q, q, threads=threads)
        assert np.array_equal(out, expected)
        pull(q)
    except MemoryError:
        pass
print("fine")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a process's memory")
@pytest.mark.parametrize("room", [10, 50, 200])
@pytest.mark.parametrize("stack", ["", "20M", "30000"])
def test_threads_that_cannot_be_created(run_python, room, stack):
    """Each takes a stack of some MiB: fewer are used then, or there is a MemoryError."""
    settings = {"OMP_STACKSIZE": stack} if stack else {}
    assert run_python(LIMITED, str(room), **settings).strip() == "fine"


def test_threadpool_limits(target):
    """A limit set by threadpoolctl is no obstacle, and is left as it was."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    arrays = BIG.arrays()
    target.attend(*arrays)  # so that every library is there

    def settings():
        return [(x["filepath"], x["num_threads"]) for x in threadpoolctl.threadpool_info()]

    before = settings()
    with threadpoolctl.threadpool_limits(1):
        limited = settings()
        assert_solves(target.attend(*arrays), make_problem(*arrays))
        assert settings() == limited
    target.attend(*arrays, threads=3)
    assert settings() == before


def test_many_python_threads(target):
    """Safe from many threads: each gets the result that it would get alone."""
    problems = []
    for seed in range(24):
        shape = Shape(1 + seed % 3, 4, 20 + 7 * seed, 300 - 9 * seed, 8 + seed, kv_heads=2)
        arrays = shape.arrays("float64" if seed % 4 == 0 else "float32", seed)
        names = [["causal", "kv_lengths"], [], ["mask", "softcap", "sinks"], ["-inf", "alibi"]]
        opts = options(names[seed % 4], shape, seed)
        problems.append((arrays, {**opts, "threads": 1 + seed % 3, "return_lse": True}))
    alone = [target.attend(*arrays, **opts) for arrays, opts in problems]
    start = threading.Barrier(8)

    def work(first):
        start.wait()
        order = [(first + i) % len(problems) for i in range(len(problems))]
        return [(n, target.attend(*problems[n][0], **problems[n][1])) for n in order]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(0, 24, 3)):
            for n, together in results:
                for got, wanted in zip(together, alone[n], strict=True):
                    if target.bitwise:
                        assert same_bits(got, wanted)
                    else:  # BLAS may divide the work in another way: a few ulp
                        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.one_instruction_set
def test_gil_is_released(target):
    """Other Python threads run while a call computes, if it takes long enough: one that holds the
    GIL lets them run before it and after it, however long it takes.
    """

    def turns(n_queries):
        arrays = Shape(1, 1, n_queries, 8192, 64).arrays()
        done, turns = threading.Event(), 0

        def call():
            target.attend(*arrays, threads=1)
            done.set()

        thread = threading.Thread(target=call)
        thread.start()
        while not done.is_set():
            time.sleep(0.001)
            turns += 1
        thread.join()
        return turns

    turns(1)  # whatever is made once
    assert any(turns(500 << n) >= 5 for n in range(6))
