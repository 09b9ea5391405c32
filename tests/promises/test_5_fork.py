"""Promise 5: a forked child works."""

import ctypes.util
import os

import pytest

import fastattn

FIRST = fastattn.available_backends()[0]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

COMMON = """
import multiprocessing, os, sys, warnings
import numpy as np
import fastattn

warnings.simplefilter("ignore")  # Python's own, on a fork with threads
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 4, 300, 64), np.float32) for _ in range(3))

def attend(_=None):
    return fastattn.scaled_dot(q, k, v, causal=True, backend=sys.argv[1], threads=2)

def right(out):  # not a measure of rounding: a broken child hangs or returns garbage
    return np.allclose(out, wanted, rtol=1e-4, atol=1e-5)

wanted = attend()
"""

FORK = """
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if right(attend()) and right(attend()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right(attend())  # so does the parent
print("fork", flush=True)
"""

GRANDCHILD = """
child = os.fork()
if child == 0:
    fine = right(attend())
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if right(attend()) else 1)
    os._exit(0 if fine and os.waitpid(grandchild, 0)[1] == 0 else 1)
assert os.waitpid(child, 0)[1] == 0
print("grandchild", flush=True)
"""

POOL = """
with multiprocessing.get_context("fork").Pool(2) as pool:
    results = pool.map(attend, range(4))
assert all(map(right, results))
print("pool", flush=True)
"""

THREAD = """
import threading

def forks():
    attend()
    child = os.fork()
    if child == 0:
        os._exit(0 if right(attend()) and in_a_thread(attend) else 1)
    assert os.waitpid(child, 0)[1] == 0
    global fine
    fine = True

def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return right(found[0])

thread = threading.Thread(target=forks)
thread.start()
thread.join()
assert fine
print("thread", flush=True)
"""

GRADIENTS = """
def gradient():
    return fastattn.vjp(fastattn.scaled_dot, q, k, v, threads=2)[1](v)[0]

before = gradient()
child = os.fork()
if child == 0:
    os._exit(0 if np.allclose(gradient(), before, rtol=1e-4, atol=1e-5) else 1)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""

# By a C library, as a server that embeds Python may do it.
IN_C = """
import ctypes
child = ctypes.PyDLL(None).fork()
if child == 0:
    os._exit(0 if right(attend()) else 1)
assert os.waitpid(child, 0)[1] == 0
print("C", flush=True)
"""


@pytest.mark.one_instruction_set
def test_child_works(target, run_python):
    """After the parent has used its threads; a child that hangs fails here, too."""
    if target.backend == "cuda":
        pytest.skip("CUDA works in no forked child once its parent has used it")
    programs = {"C": IN_C, "fork": FORK, "grandchild": GRANDCHILD, "pool": POOL, "thread": THREAD}
    if target.backend == "numba":
        # Its threads are Python's. One that waits for the GIL when C forks leaves that lock broken
        # in the child, where Python, which has not heard of the fork, does not make it anew.
        del programs["C"]
    printed = run_python(COMMON + "".join(programs.values()), target.backend)
    assert printed.split() == list(programs)


def test_gradients_in_a_child(run_python):
    assert run_python(COMMON + GRADIENTS, FIRST).strip() == "fine"


# Another library's region on the pool that all share: `start_pool()`.
POOL_OF_TORCH = """
import torch
def start_pool():
    torch.set_num_threads(2)
    torch.randn(1_000_000).exp().sum()
"""

# The same by the runtime alone; it calls back from threads that Python does not know.
POOL_OF_OPENMP = """
import ctypes, ctypes.util
def start_pool():
    openmp = ctypes.CDLL(ctypes.util.find_library("gomp"))
    nothing = ctypes.CDLL(None).abs
    openmp.GOMP_parallel(nothing, None, 2, 0)
"""

IMPORTED_BEFORE = "import fastattn\n"

OTHERS = """
import os, warnings
import numpy as np

warnings.simplefilter("ignore")
start_pool()
child = os.fork()
if child == 0:
    import fastattn
    q = np.random.default_rng(0).standard_normal((8, 300, 64), np.float32)
    one, two = (fastattn.scaled_dot(q, q, q, threads=n) for n in (1, 2))
    assert np.array_equal(one, two)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("starts", ["openmp", "torch"])
def test_pool_of_another_library(run_python, starts, imported):
    """Whoever has started the pool, and wherever fastattn is imported."""
    if starts == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    elif ctypes.util.find_library("gomp") is None:
        pytest.skip("no GNU OpenMP runtime here")
    program = (IMPORTED_BEFORE if imported == "before" else "") + (
        POOL_OF_TORCH if starts == "torch" else POOL_OF_OPENMP
    )
    assert run_python(program + OTHERS).strip() == "fine"


LOADER = """
import warnings
import numpy as np
import torch
import fastattn

warnings.simplefilter("ignore")
torch.set_num_threads(2)
torch.randn(1_000_000).exp().sum()
q = np.ones((8, 300, 64), np.float32)

class Attended(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return fastattn.scaled_dot(q, q, q, threads=2)[i]

loader = torch.utils.data.DataLoader(
    Attended(), num_workers=2, multiprocessing_context="fork"
)
assert all((batch == 1).all() for batch in loader)
print("fine")
"""


def test_workers_of_a_torch_loader(run_python):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert run_python(LOADER).strip() == "fine"


COMPILING = """
import os, signal, threading, time, warnings
import numpy as np
import fastattn
from fastattn.backends.numba import launch
from numba.core.compiler_lock import global_compiler_lock

warnings.simplefilter("ignore")

compiling = threading.Event()

def compile_for_long():
    with global_compiler_lock:
        compiling.set()
        time.sleep(0.5)

other = threading.Thread(target=compile_for_long)
other.start()
compiling.wait()
child = os.fork()
if child == 0:
    signal.alarm(200)
    q = np.ones((2, 5, 8), np.float32)
    fastattn.scaled_dot(q, q, q, backend="numba")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
other.join()
print("fine")
"""


def test_child_of_a_parent_that_compiles(run_python):
    """Numba's lock, which another thread holds, is free in the child."""
    pytest.importorskip("numba", reason="only Numba compiles at run time")
    assert run_python(COMPILING).strip() == "fine"
