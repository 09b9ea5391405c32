"""The `target` of a test: one backend on one instruction set that this machine can run."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core: threads that wait without sleeping take it from the others.
    # Before the libraries that read these are loaded.
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}

import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from helpers import simulator
from helpers.problems import DTYPES
from helpers.subprocesses import child_environment
from helpers.targets import Target, features, multiplied_dtype, targets
from hypothesis import HealthCheck, settings

import fastattn
from fastattn.backends import cython

# The same examples in every run; `pytest --hypothesis-profile=long` draws many new ones.
settings.register_profile(
    "quick",
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile(
    "long", settings.get_profile("quick"), max_examples=3000, derandomize=False, print_blob=True
)
settings.load_profile("quick")


# What Numba makes a kernel of its own for, beside the functions of `flex`.
NUMBA_KERNELS = [
    (dtype, function, options)
    for dtype in ("float32", "float64")
    for function, options in (
        (fastattn.scaled_dot, {}),
        (fastattn.scaled_dot, {"bias": np.ones(1)}),
        (fastattn.scaled_dot, {"dropout": (0.5, 1)}),
        (fastattn.euclidean, {}),
        (fastattn.euclidean, {"bias": np.ones(1)}),
    )
]


@cache
def compile_numba_kernels():
    """On disk they are found by the programs that tests start, which have a time limit, and by the
    other workers of pytest-xdist. The first kernel of a dtype takes four times as long as another,
    and what a worker finds on disk does not help it with the next: so every other worker begins at
    the other end, and two compile those of one dtype each.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for dtype, function, options in NUMBA_KERNELS[:: -1 if worker % 2 else 1]:
        q = np.ones((1, 1, 1), dtype)
        function(q, q, q, **options, backend="numba")


# A test runs for each target, less those that could find nothing new. Instruction sets may share
# the kernels of a dtype: then the slower one does not repeat a test of that dtype. A test's dtypes
# are its parameters, or those of its mark, and otherwise float32 and float64.
MARKS = {
    "dtypes(*names)": "the dtypes, besides those of its parameters, that a test computes with",
    "one_instruction_set": "what it tests is the same code on every instruction set",
}


def dtypes_of(item) -> set[str]:
    """The dtypes whose kernels a test calls, or more."""
    found = {name for mark in item.iter_markers("dtypes") for name in mark.args}
    for value in item.callspec.params.values():
        values = value if isinstance(value, tuple) else (value,)
        found |= {x for x in values if isinstance(x, str) and x in DTYPES}
    return found if found == {"float64"} else found | {"float32", "float64"}


def case_of(item):
    """The test and its parameters but for the target."""
    indices = dict(item.callspec.indices) if hasattr(item, "callspec") else {}
    indices.pop("target", None)
    return item.nodeid.partition("[")[0], frozenset(indices.items())


def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
        repeats = target is not None and (
            target.repeats_another(dtypes_of(item))
            or (not target.first_of_its_backend and item.get_closest_marker("one_instruction_set"))
        )
        (dropped if repeats else kept).append(item)
    config.hook.pytest_deselected(items=dropped)
    # All targets of a case one after the other, so that what oracles found is remembered.
    order = {}
    for item in kept:
        order.setdefault(case_of(item), len(order))
    items[:] = sorted(kept, key=lambda item: order[case_of(item)])


@pytest.fixture(params=targets(), ids=str)
def target(request, monkeypatch) -> Iterator[Target]:
    if request.param.backend == "numba":
        if "numba" not in fastattn.available_backends():
            pytest.skip("Numba is not installed, or cannot run here")
        compile_numba_kernels()
    monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", request.param.disabled)
    monkeypatch.setenv("FASTATTN_ENABLE_CPU_FEATURES", features())
    used = set()
    if request.param.isa is not None:
        for name in ("run", "run_backward", "run_map", "run_top"):
            compute = getattr(cython, name)

            def noted(problem, *arguments, compute=compute):
                used.add(multiplied_dtype(getattr(problem, "problem", problem)))
                return compute(problem, *arguments)

            monkeypatch.setattr(cython, name, noted)
    yield request.param
    undeclared = used - dtypes_of(request.node)
    assert not undeclared, f"to be declared by pytest.mark.dtypes: {', '.join(undeclared)}"


@pytest.fixture(autouse=True)
def _own_environment():
    """Without `monkeypatch`, with which pytest-run-parallel takes a test for unfit for threads."""
    names = (
        "FASTATTN_BACKEND", "FASTATTN_NUM_THREADS",
        "FASTATTN_DISABLE_CPU_FEATURES", "FASTATTN_ENABLE_CPU_FEATURES",
    )  # fmt: skip
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    yield
    os.environ.update(before)


@pytest.fixture(scope="session")
def run_python():
    """``run_python(source, *arguments, timeout=300)`` -> what the program printed; it must exit 0.

    The program finds the same ``fastattn`` and the environment of the test.
    """

    def run(source, *arguments, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env=child_environment(**environment),
            timeout=timeout,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    return run


def pytest_configure(config):
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    config.addinivalue_line("filterwarnings", "error")  # the contract: no call warns
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        # There a number of the device is a NumPy scalar, which warns.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        simulator.prepare()


def pytest_report_header():
    return f"fastattn targets: {', '.join(map(str, targets()))}"
