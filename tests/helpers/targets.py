"""The targets of the tests: each backend on each instruction set that this machine can run."""

from __future__ import annotations

from typing import NamedTuple

import pytest

import fastattn
from fastattn.core.problem import make_problem
from fastattn.dispatch import BACKENDS, named, unsupported_backward

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
        return named(self.backend).unsupported(make_problem(q, k, v, **options))

    def unsupported_backward(self, q, k, v, **options) -> str | None:
        """Why the backend cannot compute the gradients of this call, in its own words."""
        return unsupported_backward(
            named(self.backend), make_problem(q, k, v, gradients=True, **options)
        )

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
