"""Numba's CUDA simulator, made quicker and safe: each thread of the device is one of Python's."""

import importlib
import sys
import threading
from collections import deque
from contextlib import ExitStack

import numpy as np


class Turns:
    """The threads of a block, one of which runs at a time, until it waits for the others or ends.

    Threads that all want the GIL would spend more time on switching than on their work. Each time
    that they have met they go on in the opposite order, so that a barrier that is missing shows in
    what is read too early as well as in what is written too early.
    """

    def __init__(self, threads):
        self.ready, self.broken = deque(threads), False
        self.running = len(threads)
        self.meetings = []

    def next(self):
        if not self.ready and any(meeting.waiting for meeting in self.meetings):
            self.fail()  # the threads wait at different barriers
        if self.ready:
            self.ready.popleft().turn.release()

    def fail(self):
        self.broken = True
        for meeting in self.meetings:
            self.ready.extend(meeting.waiting)
            meeting.waiting.clear()

    def leave(self, failed: bool):
        self.running -= 1
        if failed:
            self.fail()
        for meeting in self.meetings:
            meeting.open_if_complete()
        self.next()


class Meeting:
    """A barrier of threads that take turns: of so many, or of those of a block that still run."""

    def __init__(self, parties=None, action=None, timeout=None):
        self.turns = threading.current_thread()._manager.turns
        self.turns.meetings.append(self)
        self.parties, self.action, self.waiting = parties, action, []

    def open_if_complete(self) -> bool:
        wanted = self.turns.running if self.parties is None else self.parties
        complete = bool(self.waiting) and len(self.waiting) == wanted
        if complete:
            self.action()
            self.turns.ready.extend(reversed(self.waiting))
            self.waiting.clear()
        return complete

    def wait(self):
        thread = threading.current_thread()
        self.waiting.append(thread)
        self.open_if_complete()
        self.turns.next()
        thread.turn.acquire()
        if self.turns.broken:
            raise RuntimeError("another thread of the block has failed, or waits for this one")


def prepare():
    """To be called once in a process with NUMBA_ENABLE_CUDASIM=1."""
    _make_shared_arrays_once()
    _take_turns()


def _make_shared_arrays_once():
    """The simulator looks for the array's place in the whole stack."""
    shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared

    def array(self, shape, dtype, alignment=None):
        frame = sys._getframe(1)
        place = (frame.f_code.co_filename, frame.f_lineno)
        if place not in self._allocations:
            self._allocations[place] = np.empty(shape, dtype)
        return self._allocations[place]

    shared.array = array


def _take_turns():
    """The simulator asks all threads of a block in turn whether they wait, for as long as they run,
    and exchanges the module `cuda` of a device function at each call.
    """
    kernel = importlib.import_module("numba.cuda.simulator.kernel")
    instructions = importlib.import_module("fastattn.backends.cuda.simulated_instructions")
    launch = kernel.FakeCUDAKernel.__call__

    class Thread(kernel.BlockThread):
        def __init__(self, *args):
            super().__init__(*args)
            self.turn = threading.Lock()
            self.turn.acquire()

        def run(self):
            self.turn.acquire()
            super().run()
            self._manager.turns.leave(failed=self.exception is not None)

        def syncthreads(self):
            self._manager.meet()

        def syncthreads_or(self, value):
            self._manager.votes.append(value)
            self._manager.meet()
            return self._manager.any_vote

    def meet(self):
        if self.meeting is None:
            self.meeting = Meeting(action=self.count_votes)
        self.meeting.wait()

    def count_votes(self):
        self.any_vote = int(any(self.votes))
        self.votes.clear()

    def run(self, grid_point, *args):
        points = list(np.ndindex(*self._block_dim))
        threads = [
            Thread(lambda: self._f(*args), self, grid_point, point, self._debug) for point in points
        ]
        self.turns, self.meeting, self.votes = Turns(threads), None, []
        with ExitStack() as self.exchanged:
            self.modules = set()
            for thread in threads:
                thread.start()
            self.turns.next()
            for thread in threads:
                thread.join()
        # What one thread has raised, others have not waited out.
        failures = [thread.exception for thread in threads if thread.exception]
        for failure, trace in sorted(failures, key=lambda x: isinstance(x[0], RuntimeError)):
            raise failure.with_traceback(trace)

    def call(self, *args):
        manager = getattr(threading.current_thread(), "_manager", None)
        if manager is None:
            return launch(self, *args)
        module = id(self.fn.__globals__)
        if module not in manager.modules:
            manager.modules.add(module)
            swapped = kernel.swapped_cuda_module(self.fn, kernel._get_kernel_context())
            manager.exchanged.enter_context(swapped)
        return self.fn(*args)

    manager = kernel.BlockManager
    manager.run, manager.meet, manager.count_votes = run, meet, count_votes
    kernel.FakeCUDAKernel.__call__ = call
    instructions.Barrier = Meeting
