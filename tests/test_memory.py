"""Promise 2: memory O(S). Out of memory is a MemoryError, and nothing leaks (promise 8)."""

import sys

import numpy as np
import pytest
from cases import Shape

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Prints by how many MiB a call raises the peak of the process beyond what it had before.
PROGRAM = """
import sys
import numpy as np
import fastattn

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

backend, n_queries, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
n_keys = 65536
rng = np.random.default_rng(0)
q = rng.standard_normal((n_queries, 32), np.float32)
k, v = (rng.standard_normal((n_keys, 32), np.float32) for _ in range(2))
options = {
    "plain": {},
    "causal": {"causal": True},
    "spans": {"spans": (np.arange(n_queries), n_keys - np.arange(n_queries))},
    "mask": {"mask": rng.random(n_keys) < 0.9},
    "bias": {"bias": rng.standard_normal((1, n_keys))},
    "transposed": {},
}[case]
if case == "transposed":
    k = np.asfortranarray(k)
out = np.zeros_like(q)
small = [x[:9] for x in (q, k, v)]
fastattn.scaled_dot(*small, backend=backend, threads=2)  # whatever is made once
before = status("VmRSS")
top = status("VmHWM")
fastattn.scaled_dot(q, k, v, out=out, backend=backend, threads=2, **options)
after = status("VmHWM")
# A peak of the past would hide this one: none may lie far above what is held now.
assert top - before < 40, (top, before)
print(max(0, after - max(before, top)) + (top - before if after > top else 0))
"""


@linux
@pytest.mark.parametrize("case", ["plain", "causal", "spans", "mask", "bias", "transposed"])
def test_no_array_of_queries_by_keys(target, run_python, case):
    """512 x 65536 scores would be 128 MiB (32 as bools); a few tiles are less than 24."""
    q, k, v = Shape(1, 1, 4, 5, 8).arrays()
    reason = None
    if case in ("mask", "bias"):
        option = {"mask": np.ones(5, bool), "bias": np.zeros(5)}[case]
        reason = target.unsupported(q, k, v, **{case: option})
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    assert float(run_python(PROGRAM, target.backend, "512", case)) < 24


HUGE = (1 << 20, 1 << 10, 1 << 12)  # with 64 float32 more: 2**50 bytes, on any system too many


def test_out_of_memory_is_a_memory_error(target):
    q = np.broadcast_to(np.float32(1), (*HUGE, 64))
    k = np.ones((1, 1, 3, 64), np.float32)
    with pytest.raises(MemoryError):
        target.attend(q, k, k)


def test_out_of_memory_for_the_weights(target):
    q = np.broadcast_to(np.float32(1), (1 << 25, 1))
    k = np.broadcast_to(np.float32(1), (1 << 25, 1))
    with pytest.raises(MemoryError):
        target.attend(q, k, k, return_weights=True)


LEAKS = """
import sys
import numpy as np
import fastattn

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((4, 200, 64), np.float32) for _ in range(3))
wrong = np.empty(3, np.float32)

def calls(n):
    for _ in range(n):
        fastattn.scaled_dot(q, k, v, causal=True, return_lse=True, backend=sys.argv[1], threads=2)
        try:
            fastattn.scaled_dot(q, k, v, out=wrong, backend=sys.argv[1])
        except ValueError:
            pass

calls(20)
before = held()
calls(200)
print(held() - before)
"""


@linux
def test_calls_leak_nothing(target, run_python):
    """200 results of 0.2 MiB would be 40 MiB."""
    assert float(run_python(LEAKS, target.backend)) < 8
