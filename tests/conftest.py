"""The `target` of a test: one backend on one instruction set that this machine can run."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simulator
from hypothesis import HealthCheck, settings

import fastattn
from fastattn.core.problem import pose
from fastattn.dispatch import BACKENDS, named, unsupported_backward

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

# Backends that promise the same bits for any threads and slices (promise 4).
BITWISE = ("cython", "numba")


class Target(NamedTuple):
    backend: str
    isa: str | None = None  # None: the backend has no instruction sets to choose from
    disabled: str = ""  # for FASTATTN_DISABLE_CPU_FEATURES

    def __str__(self):
        return self.backend if self.isa is None else f"{self.backend}-{self.isa}"

    @property
    def bitwise(self) -> bool:
        return self.backend in BITWISE

    def unsupported(self, q, k, v, **options) -> str | None:
        """Why the backend cannot serve this call, in its own words."""
        return named(self.backend).unsupported(pose(q, k, v, **options))

    def unsupported_backward(self, q, k, v, **options) -> str | None:
        """Why the backend cannot compute the gradients of this call, in its own words."""
        return unsupported_backward(named(self.backend), pose(q, k, v, gradients=True, **options))

    def attend(self, q, k, v, **options):
        """`fastattn.scaled_dot` on this backend; skips the test where that cannot serve."""
        try:
            reason = self.unsupported(q, k, v, **options)
        except (TypeError, ValueError):
            reason = None  # the call below raises it
        if reason is not None:
            pytest.skip(f"{self.backend} cannot serve this call: {reason}")
        return fastattn.scaled_dot(q, k, v, backend=self.backend, **options)

    def vjp(self, q, k, v, **options):
        """`fastattn.vjp` of `scaled_dot` on this backend; skips where that has no gradients."""
        reason = self.unsupported_backward(q, k, v, **options)
        if reason is not None:
            pytest.skip(f"{self.backend} cannot serve this call: {reason}")
        return fastattn.vjp(fastattn.scaled_dot, q, k, v, backend=self.backend, **options)


def instruction_sets() -> tuple[str, ...]:
    """Those of the compiled kernels, fastest first; empty where they are not built."""
    try:
        from fastattn import _kernels
    except ImportError:
        return ()
    return tuple(_kernels.instruction_sets())


def targets():
    for backend in BACKENDS:
        if backend.name == "cuda" and backend.missing():
            continue  # test_cuda.py says so, and runs it in the simulator
        if backend.name != "cython":
            yield Target(backend.name)
            continue
        sets = instruction_sets()
        for n, isa in enumerate(sets):
            yield Target(backend.name, isa, " ".join(sets[:n]))


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


def child_environment(**more) -> dict[str, str]:
    root = str(Path(fastattn.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")  # the contract: no call warns
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        # There a number of the device is a NumPy scalar, which warns.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        simulator.prepare()


def pytest_report_header():
    return f"fastattn targets: {', '.join(map(str, targets()))}"
