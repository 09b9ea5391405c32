"""What the ranking runs of onnxruntime is attention, and what it leaves out it says why."""

import pytest

from fastattn.bench.cases import Case
from fastattn.bench.onnxruntime_peers import ONNXRUNTIME
from fastattn.bench.ranking import prepare

CASES = (
    Case(2, 4, 20, 20, 16),
    Case(2, 4, 20, 20, 16, causal=True),
    Case(2, 4, 1, 30, 16, kv_heads=2),
    Case(1, 4, 5, 30, 16, kv_heads=2, causal=True),
    Case(2, 4, 5, 30, 16, causal=True),
    Case(1, 4, 20, 20, 16, causal=True, window=(7, 7)),
)
LEFT_OUT = {
    "onnxruntime": (2, 3, 4, 5), "onnxruntime-attention": (3, 4, 5), "onnxruntime-gqa": (0, 4),
}  # fmt: skip


@pytest.mark.parametrize("candidate", ONNXRUNTIME, ids=lambda candidate: candidate.name)
def test_onnxruntime(candidate):
    pytest.importorskip("onnxruntime", reason="it is the peer")
    pytest.importorskip("onnx", reason="it makes the graph")
    left_out = [n for n, case in enumerate(CASES) if candidate.unavailable(case, 1)]
    assert tuple(left_out) == LEFT_OUT[candidate.name]
    for n in set(range(len(CASES))).difference(left_out):
        _, errors = prepare(CASES[n], [candidate], 1)
        assert errors[candidate.name] < 1e-6  # a few roundings of float32 results of about 1
