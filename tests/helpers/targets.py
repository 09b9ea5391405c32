"""The targets of the tests: each backend on each instruction set that this machine can run."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
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
    def first_of_its_backend(self) -> bool:
        return not self.disabled

    def repeats_another(self, dtypes) -> bool:
        """Are the kernels for these dtypes those of a faster instruction set, so that every bit of
        every result is, too?
        """
        if self.isa is None:
            return False
        tables = kernel_tables()
        own = tables[self.isa]
        faster = self.disabled.split()
        return any(all(own[x] == tables[isa][x] for x in dtypes) for isa in faster)

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


@cache
def kernel_tables() -> dict[str, dict[str, tuple[int, ...]]]:
    """The compiled kernels by instruction set, newest first, and dtype; empty if not built."""
    try:
        from fastattn import _kernels
    except ImportError:
        return {}
    return _kernels.kernel_tables()


def instruction_sets() -> tuple[str, ...]:
    """Those of the compiled kernels, newest first; empty where they are not built."""
    return tuple(kernel_tables())


def features() -> str:
    """All that may be disabled. A test enables them, as slow ones are passed over otherwise."""
    try:
        from fastattn import _kernels
    except ImportError:
        return ""
    return " ".join(_kernels.FEATURES)


def multiplied_dtype(problem) -> str:
    """By whose kernels the compiled backend computes `problem`."""
    if problem.precision == "bfloat16" and problem.dtype == np.float32:
        return "bfloat16"
    return problem.dtype.name


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
