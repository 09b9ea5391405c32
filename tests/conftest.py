"""The `target` of a test: one backend on one instruction set that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from helpers import simulator
from helpers.subprocesses import child_environment
from helpers.targets import Target, targets
from hypothesis import HealthCheck, settings

import fastattn

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


@cache
def compile_numba_kernels():
    """On disk they are found by the programs that tests start, which have a time limit."""
    for dtype in ("float32", "float64"):
        q = np.ones((1, 1, 1), dtype)
        for bias in (None, np.ones(1, dtype)):
            fastattn.scaled_dot(q, q, q, bias=bias, backend="numba")


@pytest.fixture(params=targets(), ids=str)
def target(request, monkeypatch) -> Target:
    if request.param.backend == "numba" and "numba" in fastattn.available_backends():
        compile_numba_kernels()
    monkeypatch.setenv("FASTATTN_DISABLE_CPU_FEATURES", request.param.disabled)
    return request.param


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in ("FASTATTN_BACKEND", "FASTATTN_NUM_THREADS", "FASTATTN_DISABLE_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_python():
    """``run_python(source, *arguments, timeout=60)`` -> what the program printed; it must exit 0.

    The program finds the same ``fastattn`` and the environment of the test.
    """

    def run(source, *arguments, timeout=60, **environment):
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
    config.addinivalue_line("filterwarnings", "error")  # the contract: no call warns
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        # There a number of the device is a NumPy scalar, which warns.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        simulator.prepare()


def pytest_report_header():
    return f"fastattn targets: {', '.join(map(str, targets()))}"
