"""What the ranking runs is attention, and what a candidate leaves out it says why."""

import pytest

from fastattn.bench import ranking, report
from fastattn.bench.candidates import CANDIDATES, named
from fastattn.bench.cases import CASES as NAMED
from fastattn.bench.cases import Case
from fastattn.bench.memory import extra_memory
from fastattn.bench.onnxruntime_peers import ONNXRUNTIME
from fastattn.bench.options import OPTIONS

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
        _, errors = ranking.prepare(CASES[n], [candidate], 1)
        assert errors[candidate.name] < 1e-6  # a few roundings of float32 results of about 1


def small(case):
    return case._replace(n_queries=min(case.n_queries, 300), n_keys=min(case.n_keys, 300))


OF_OPTIONS = {
    name: small(case)
    for name, case in NAMED.items()
    if case.option or case.forward_mode or (case.function and case.backward)
}
# They compile for half a minute; `bench` compares them as well before it times them.
COMPILED = {"fastattn-numba", "torch-flex"}


def test_every_option_has_a_case():
    assert {case.option for case in OF_OPTIONS.values()} == {*OPTIONS, ""}


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("case", OF_OPTIONS.values(), ids=OF_OPTIONS)
def test_options(case):
    """Every candidate of a case computes what the reference does, or draws other weights."""
    pytest.importorskip("scipy", reason="it has the sparse masks")
    present = [
        c
        for c in CANDIDATES
        if c.name not in COMPILED and c.belongs(case) and c.unavailable(case, 1) is None
    ]
    if not present:
        pytest.skip("all candidates that are installed compile, which takes too long here")
    _, errors = ranking.prepare(case, present, 1)
    for candidate in present:
        if candidate.draws_its_own(case):
            assert errors[candidate.name] is None
        else:  # some roundings of float32 numbers of about 1
            assert errors[candidate.name] < 2e-6, candidate.name


def test_the_call_without_an_option_is_timed_too(capsys):
    found = ranking.rank("", small(NAMED["return-max"]), [named("fastattn-numpy")], 1, 2, False)
    assert len(found["plain"]["samples"]) == 2
    report.print_ranking(found, 2)
    assert "fastattn-numpy without return max: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["4096", "packed", "graph", "flex-documents", "decode"])
def test_no_call_without(name):
    """There is no option, or without it there would be more work."""
    assert NAMED[name].plain is None


def test_memory_of_an_option():
    """The case goes to another process and back by the names of its fields."""
    case = Case(1, 1, 300, 300, 8, causal=True, window=(7, 7), option="dropout")
    assert extra_memory("fastattn-numpy", case, 1) is not None
