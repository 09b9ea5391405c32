"""The compiled kernels of ``csrc``: the fastest way on a CPU."""

from __future__ import annotations

name = "cython"


def unsupported(problem):
    return "not built"
