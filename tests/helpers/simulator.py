"""Numba's CUDA simulator, made quicker and safe: each thread of the device is one of Python's."""

import importlib
import sys
import threading

import numpy as np


class Rendezvous:
    """A barrier of the threads of a block that are still running."""

    def __init__(self, threads: int):
        self.running, self.waiting, self.round, self.broken = threads, 0, 0, False
        self.changed = threading.Condition()

    def wait(self):
        with self.changed:
            self.waiting += 1
            here = self.round
            self._open_if_complete()
            self.changed.wait_for(lambda: self.round != here or self.broken)
            if self.broken:
                raise RuntimeError("another thread of the block has failed")

    def leave(self, failed: bool):
        with self.changed:
            self.running -= 1
            if failed:
                self.broken = True
                self.changed.notify_all()
            self._open_if_complete()

    def _open_if_complete(self):
        if self.waiting and self.waiting == self.running:
            self.waiting, self.round = 0, self.round + 1
            self.changed.notify_all()


def prepare():
    """To be called once in a process with NUMBA_ENABLE_CUDASIM=1."""
    _make_shared_arrays_once()
    _wait_without_polling()


def _make_shared_arrays_once():
    """The simulator looks whether another thread has made the array, and makes it, in two steps, so
    that two threads may make one each.
    """
    shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared
    lock = threading.Lock()

    def array(self, shape, dtype, alignment=None):
        frame = sys._getframe(1)
        with lock:
            place = (frame.f_code.co_filename, frame.f_lineno)
            if place not in self._allocations:
                self._allocations[place] = np.empty(shape, dtype)
            return self._allocations[place]

    shared.array = array


def _wait_without_polling():
    """The simulator asks all threads of a block in turn whether they wait, for as long as they run,
    which takes most of the time from them.
    """
    kernel = importlib.import_module("numba.cuda.simulator.kernel")

    class Thread(kernel.BlockThread):
        def run(self):
            super().run()
            self._manager.rendezvous.leave(failed=self.exception is not None)

        def syncthreads(self):
            self._manager.rendezvous.wait()

    def run(self, grid_point, *args):
        points = list(np.ndindex(*self._block_dim))
        self.rendezvous = Rendezvous(len(points))
        threads = [
            Thread(lambda: self._f(*args), self, grid_point, point, self._debug) for point in points
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # What one thread has raised, others have not waited out.
        failures = [thread.exception for thread in threads if thread.exception]
        for failure, trace in sorted(failures, key=lambda x: isinstance(x[0], RuntimeError)):
            raise failure.with_traceback(trace)

    kernel.BlockManager.run = run
