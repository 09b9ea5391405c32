"""The ranking as a pytest benchmark: ``pytest --benchmark-only`` at the root.

A group is a case, an entry a backend or an installed peer. pytest-benchmark runs one entry after
the other, so a drift of the machine's clock lies between them; ``python -m fastattn bench`` takes
its samples interleaved, measures the memory as well, and is where the published figures are from.
"""

from functools import lru_cache

import pytest

from fastattn.bench import machine, models, timing
from fastattn.bench.candidates import CANDIDATES
from fastattn.bench.cases import CASES
from fastattn.bench.exact import exact_rows
from fastattn.bench.ranking import rms_error

# Warnings of the peers are theirs; the tests turn warnings into errors.
pytestmark = pytest.mark.filterwarnings("ignore")

SECONDS = 2.0  # per entry, after the first call
MOST_ROUNDS = 5


@lru_cache(maxsize=1)  # the entries of a case follow each other
def inputs(case):
    q, k, v = case.arrays()
    return (q, k, v), *exact_rows(case, q, k, v)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ranking(benchmark, case, candidate):
    threads = machine.default_threads()
    reason = candidate.unavailable(case, threads)
    if reason is not None:
        pytest.skip(f"{candidate.name}: {reason}")
    arrays, rows, exact = inputs(case)
    call, read = candidate.prepare(*arrays, case, threads)
    found = read(call())
    error = None if candidate.draws_its_own(case) else rms_error(found, rows, exact)
    timing.settle()
    once = timing.seconds(call)
    rounds = min(MOST_ROUNDS, max(1, int(SECONDS / once)))
    calls = timing.calls_per_sample(call) if once < timing.SHORTEST else 1

    benchmark.group = str(case)
    benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=int(rounds > 1))
    benchmark.extra_info.update(
        case._asdict(),
        candidate=candidate.name,
        version=candidate.version(),
        threads=threads,
        instruction_set=machine.instruction_set(),
        gflops=case.flops / benchmark.stats["median"] / 1e9,
        error=error,
    )


@pytest.mark.parametrize("implementation", models.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", models.MODELS.values(), ids=models.MODELS.keys())
def test_models(benchmark, case, implementation):
    reason = models.unavailable(case, implementation)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    call = models.prepare(case, machine.default_threads(), [implementation])[implementation]
    call()
    timing.settle()
    benchmark.group = str(case)
    benchmark.pedantic(call, rounds=2, warmup_rounds=1)
    benchmark.extra_info.update(case._asdict(), implementation=implementation)
