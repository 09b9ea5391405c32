"""Threads that share out launches (promises 5 and 8), and how they end."""

import os
import signal
import threading
import time

import pytest

from fastattn.core import thread_pool


class Launches:
    """Launches of 10 ms, and what they did."""

    def __init__(self, fails=None):
        self.done, self.running, self.threads, self.fails = [], 0, set(), fails

    def start(self):
        self.threads.add(threading.get_ident())
        return self.launch

    def launch(self, begin, end):
        self.running += 1
        try:
            if self.fails is not None:
                self.fails(begin)
            time.sleep(0.01)
            self.done += range(begin, end)
        finally:
            self.running -= 1

    def assert_over(self):
        """None runs, and none begins any more."""
        assert self.running == 0
        done = len(self.done)
        time.sleep(0.05)
        assert (self.running, len(self.done)) == (0, done)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_item_once(threads):
    launches = Launches()
    thread_pool.share(23, 3, threads, launches.start)
    assert sorted(launches.done) == list(range(23))
    assert 1 <= len(launches.threads) <= threads


@pytest.mark.parametrize("item", [0, 1, 5])
def test_what_a_launch_raises_ends_all(item):
    def fails(begin):
        if begin == item:
            raise OverflowError("here")

    launches = Launches(fails)
    with pytest.raises(OverflowError, match="here"):
        thread_pool.share(100, 1, 3, launches.start)
    launches.assert_over()
    assert len(launches.done) < 99


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that sends signals here")
def test_signals_that_raise_leave_nothing_behind():
    """Again and again while the launches that run are waited for, too."""
    left = 3

    def handler(number, frame):
        nonlocal left
        left -= 1
        if left == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    launches = Launches(lambda begin: time.sleep(0 if begin == 0 else 0.1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03, 0.01)
        with pytest.raises(Interrupted):
            thread_pool.share(1000, 1, 3, launches.start)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    launches.assert_over()


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_no_thread_to_be_had(monkeypatch, error):
    def refuse(*args):
        raise error

    monkeypatch.setattr(thread_pool, "start_new_thread", refuse)
    monkeypatch.setattr(thread_pool, "_idle", type(thread_pool._idle)())
    launches = Launches()
    thread_pool.share(5, 1, 4, launches.start)
    assert sorted(launches.done) == list(range(5))
    assert launches.threads == {threading.get_ident()}


def test_no_memory_for_a_helper():
    """The caller carries out all."""
    launches, caller = Launches(), threading.get_ident()

    def start():
        if threading.get_ident() != caller:
            raise MemoryError
        return launches.launch

    thread_pool.share(5, 1, 3, start)
    assert sorted(launches.done) == list(range(5))


def test_after_the_main_thread_has_ended(run_python):
    """In a thread that outlives it, and in what runs at exit."""
    program = """
import atexit, threading, time
from fastattn.core import thread_pool

def attend(word):
    done = []
    thread_pool.share(9, 1, 3, lambda: lambda begin, end: (time.sleep(.001), done.append(begin)))
    print(word, len(done), flush=True)

def later():
    threading.main_thread().join()
    time.sleep(0.1)
    attend("thread")

attend("main")
atexit.register(attend, "exit")
threading.Thread(target=later).start()
"""
    assert run_python(program).split() == ["main", "9", "thread", "9", "exit", "9"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own, on a fork with threads
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's, where a test imported it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_fork_while_others_work():
    launches = Launches()
    other = threading.Thread(target=thread_pool.share, args=(50, 1, 3, launches.start))
    other.start()
    time.sleep(0.03)
    child = os.fork()
    if child == 0:
        own = Launches()
        thread_pool.share(9, 1, 3, own.start)
        os._exit(len(own.done) != 9)
    assert os.waitpid(child, 0)[1] == 0
    other.join()
    assert sorted(launches.done) == list(range(50))
