"""Promise 5: a forked child works."""

import os

import pytest

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
print("fine")
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
print("fine")
"""

POOL = """
with multiprocessing.get_context("fork").Pool(2) as pool:
    results = pool.map(attend, range(4))
assert all(map(right, results))
print("fine")
"""


@pytest.mark.parametrize("program", [FORK, GRANDCHILD, POOL], ids=["fork", "grandchild", "pool"])
def test_child_works(target, run_python, program):
    """After the parent has used its threads; in time, too: a child that hangs fails here."""
    if target.backend == "cuda":
        pytest.skip("CUDA works in no forked child once its parent has used it")
    assert run_python(COMMON + program, target.backend, timeout=30).strip() == "fine"


COMPILING = """
import os, signal, threading, time, warnings
import numpy as np
import fastattn
from fastattn._numba import launch
from numba.core.compiler_lock import global_compiler_lock

warnings.simplefilter("ignore")

def compile_for_long():
    with global_compiler_lock:
        time.sleep(1)

other = threading.Thread(target=compile_for_long)
other.start()
time.sleep(0.2)
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
    assert run_python(COMPILING, timeout=300).strip() == "fine"
