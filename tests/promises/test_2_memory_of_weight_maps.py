"""Promise 2 for maps of the weights: memory O(S)."""

import sys

import numpy as np
import pytest
from helpers.memory import reported
from helpers.weight_maps import call
from test_2_memory import HUGE

# How much memory a map takes beyond its result.
MEMORY = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

backend = sys.argv[1]
rng = np.random.default_rng(0)
arguments = {"key_importance": (), "attention_map": (64,), "top_keys": (16,)}
found = {}
for n_queries, n_keys in ((512, 65536), (65536, 512)):
    q = rng.standard_normal((n_queries, 16), np.float32)
    k = rng.standard_normal((n_keys, 16), np.float32)
    for name, more in arguments.items():
        how = {"backend": backend, "threads": 2}
        function = getattr(fastattn, name)
        function(q[:99], k[:99], *more, **how)  # whatever is made once
        how["causal"] = True
        found[f"{name}, {n_queries} queries"] = extra(lambda: function(q, k, *more, **how))
report(**found)
"""


@pytest.fixture
def mapping(target):
    """A target that makes maps."""
    call(target, "key_importance", *np.ones((2, 3, 4), np.float32))
    return target


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.one_instruction_set
def test_no_array_of_queries_by_keys(mapping, run_python):
    """512 x 65536 scores would be 128 MiB; a few tiles are less than 24."""
    assert not reported(run_python(MEMORY, mapping.backend), 24)


def test_out_of_memory_is_a_memory_error(mapping):
    q, k = np.broadcast_to(np.float32(1), (*HUGE, 64)), np.ones((1, 1, 3, 64), np.float32)
    with pytest.raises(MemoryError):
        call(mapping, "top_keys", q, k, 2)
    with pytest.raises(MemoryError):
        call(mapping, "attention_map", q, k, (HUGE[-1], 3))
