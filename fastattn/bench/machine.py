"""The machine, its software and what fastattn finds on it, as plain data."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import fastattn

from ..core import extension
from ..core.problem import make_problem
from ..core.threads import affinity, thread_count
from ..dispatch import BACKENDS, NAMED_ONLY, cannot_run

__all__ = ["default_threads", "describe", "info", "instruction_set", "kernels", "threadpoolctl"]

ENVIRONMENT = (
    "FASTATTN_BACKEND",
    "FASTATTN_NUM_THREADS",
    "FASTATTN_DISABLE_CPU_FEATURES",
    "FASTATTN_ENABLE_CPU_FEATURES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


def kernels() -> ModuleType | None:
    """The compiled extension, or None without one."""
    return extension.kernels


def threadpoolctl() -> ModuleType | None:
    """What sees and limits the threads of NumPy's BLAS, or None where it is not installed."""
    return import_module("threadpoolctl") if find_spec("threadpoolctl") else None


def limit_blas(threads: int) -> None:
    """Let NumPy's BLAS use that many threads from now on."""
    control = threadpoolctl()
    if control is not None:
        control.threadpool_limits(threads, user_api="blas")


def cannot_limit_blas(threads: int) -> str | None:
    """Why NumPy cannot be given that many threads, or None."""
    if threads == default_threads() or threadpoolctl() is not None:
        return None
    return "the threads of NumPy's BLAS cannot be set without threadpoolctl"


def default_threads() -> int:
    """How many threads a call uses unless told."""
    compiled = kernels()
    return thread_count(None, compiled.openmp_threads() if compiled else affinity())


def instruction_set() -> str | None:
    """The instruction set that the compiled kernels use now, or None without them."""
    compiled = kernels()
    return compiled.instruction_set() if compiled else None


def describe() -> dict[str, Any]:
    """The machine: its CPU, cores, caches, memory and system."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores allowed": affinity(),
        "caches": _caches(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
    }


def info() -> dict[str, Any]:
    """Everything that ``python -m fastattn info`` tells."""
    compiled = kernels()
    problem = make_problem(*(np.zeros((1, 1, 8, 8), np.float32) for _ in range(3)))
    return {
        "fastattn": fastattn.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "blas": _blas(),
        "machine": describe(),
        "instruction sets": list(compiled.instruction_sets()) if compiled else [],
        "slow instruction sets": list(compiled.slow_instruction_sets()) if compiled else [],
        "instruction set in use": _or_why_not(instruction_set),
        "threads": {
            "default": _or_why_not(default_threads),
            # 0 where the extension was built without it
            "OpenMP": compiled.openmp_threads() if compiled else None,
        },
        "backends": {b.name: cannot_run(b, problem) or "ready" for b in BACKENDS},
        "only when named": {b.name: cannot_run(b, problem) or "ready" for b in NAMED_ONLY},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _or_why_not(ask: Callable[[], Any]) -> Any:
    """What it returns, or what is wrong with the setting of the environment that it reads."""
    try:
        return ask()
    except ValueError as error:
        return str(error)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _caches() -> list[str]:
    """Data and unified caches as one core sees them, such as ``L2 2048K``."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (_line(index / name) for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and level and size:
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return found


def _line(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _memory() -> int | None:
    """Bytes of main memory."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _blas() -> str:
    built_with = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    text = f"{built_with.get('name', 'unknown')} {built_with.get('version', '')}".strip()
    control = threadpoolctl()
    if control is not None:
        for pool in control.threadpool_info():
            if pool["user_api"] == "blas":
                kernel = pool.get("architecture")
                text += f", {pool['num_threads']} threads" + (f", {kernel} kernels" * bool(kernel))
                break
    return text
