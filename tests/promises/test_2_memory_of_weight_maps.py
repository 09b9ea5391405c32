"""Promises 2 and 3 for maps: memory O(S), and tiles that no query sees are not read."""

import sys

import numpy as np
import pytest
import test_3_skipping as test_skipping
from helpers.memory import STATUS
from helpers.weight_maps import call
from test_2_memory import HUGE

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

# Prints by how many MiB a call raises the peak of the process beyond its arrays and results.
MEMORY = (
    STATUS
    + """
backend, n_queries, n_keys, name = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rng = np.random.default_rng(0)
q = rng.standard_normal((n_queries, 16), np.float32)
k = rng.standard_normal((n_keys, 16), np.float32)
arguments = {"key_importance": (), "attention_map": (64,), "top_keys": (16,)}[name]
function = getattr(fastattn, name)
function(q[:99], k[:99], *arguments, backend=backend, threads=2)  # whatever is made once
before, top = status("VmRSS"), status("VmHWM")
found = function(q, k, *arguments, backend=backend, threads=2, causal=True)
after = status("VmHWM")
found = found if isinstance(found, tuple) else (found,)
print(max(after - max(before, top), 0) - sum(x.nbytes for x in found) / 2**20)
"""
)


@pytest.fixture
def mapping(target):
    """A target that makes maps."""
    call(target, "key_importance", *np.ones((2, 3, 4), np.float32))
    return target


@linux
@pytest.mark.parametrize("name", ["key_importance", "attention_map", "top_keys"])
@pytest.mark.parametrize("n_queries, n_keys", [(512, 65536), (65536, 512)])
def test_no_array_of_queries_by_keys(mapping, run_python, name, n_queries, n_keys):
    """512 x 65536 scores would be 128 MiB; a few tiles are less than 24."""
    extra = run_python(MEMORY, mapping.backend, str(n_queries), str(n_keys), name)
    assert float(extra) < 24


def test_out_of_memory_is_a_memory_error(mapping):
    q, k = np.broadcast_to(np.float32(1), (*HUGE, 64)), np.ones((1, 1, 3, 64), np.float32)
    with pytest.raises(MemoryError):
        call(mapping, "top_keys", q, k, 2)
    with pytest.raises(MemoryError):
        call(mapping, "attention_map", q, k, (HUGE[-1], 3))


SKIPPING = test_skipping.PROGRAM.replace(
    "    shown = ",
    """    importance = fastattn.key_importance(q, k, backend=backend, **options)
    indices, _ = fastattn.top_keys(q, k, 9, backend=backend, **options)
    assert not importance[:first].any() and not importance[last:].any()
    assert ((indices < 0) | (first <= indices) & (indices < last)).all()
    shown = """,
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
@pytest.mark.parametrize("case", ["kv_lengths", "window", "nothing", "mask"])
def test_unseen_tiles_are_not_read(mapping, run_python, case):
    assert "key_importance" in SKIPPING
    assert run_python(SKIPPING, mapping.backend, case).strip() == "fine"
