"""Numba's CUDA simulator, made quicker and safe: each thread of the device is one of Python's."""

import importlib
import sys
import threading

import numpy as np


def prepare():
    """To be called once in a process with NUMBA_ENABLE_CUDASIM=1."""
    # Threads wait for each other by asking again and again.
    sys.setswitchinterval(1e-4)
    shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared
    lock = threading.Lock()

    # Its own looks whether another thread has made the array, and makes it, in two steps; now and
    # then two threads make one each.
    def array(self, shape, dtype, alignment=None):
        frame = sys._getframe(1)
        with lock:
            place = (frame.f_code.co_filename, frame.f_lineno)
            if place not in self._allocations:
                self._allocations[place] = np.empty(shape, dtype)
            return self._allocations[place]

    shared.array = array
