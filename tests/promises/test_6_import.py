"""Promise 6: importing starts no thread, changes no floating-point mode and is quick."""

import ast
import graphlib
import json
import platform
import sys
from pathlib import Path

import pytest

import fastattn

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


OPTIONAL = ["ml_dtypes", "threadpoolctl", "numba", "torch", "jax", "dask", "transformers", "cupy",
            "scipy", "matplotlib", "multiprocessing", "email"]  # fmt: skip

# What an import does that others would notice.
PROGRAM = """
import json, os, sys

def calls_of(module):
    calls = 0  # those of C functions too
    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
    sys.setprofile(count)
    __import__(module)
    sys.setprofile(None)
    return calls

def threads():
    return os.listdir("/proc/self/task") if sys.platform.startswith("linux") else None

calls = [calls_of("numpy")]
before = set(sys.modules), dict(os.environ), threads()
calls.append(calls_of("fastattn"))
print(json.dumps({
    "modules": sorted(set(sys.modules) - before[0]), "calls": calls,
    "same environment": before[1] == os.environ, "same threads": before[2] == threads(),
}))
"""


@pytest.fixture(scope="module")
def imported(run_python):
    return json.loads(run_python(PROGRAM))


@linux
def test_starts_no_thread(imported):
    assert imported["same threads"]


def test_environment_is_not_changed(imported):
    assert imported["same environment"]


def test_loads_no_optional_package(imported):
    """NumPy is the one hard dependency; the rest is imported where it is used, and slow modules."""
    assert "fastattn.attention" in imported["modules"]
    assert not set(OPTIONAL) & set(imported["modules"])


def test_is_quick(imported):
    """Promised: 100 ms beyond NumPy, which itself takes as long and calls six times as much."""
    of_numpy, own = imported["calls"]
    assert 0 < own < of_numpy / 3


def test_leaves_subnormals_alone(run_python):
    """A library linked with -ffast-math would flush them to 0 in the whole process."""
    program = """
import sys
import numpy as np
def modes():
    least = np.array([np.finfo(np.float64).smallest_subnormal])
    least32 = np.array([np.finfo(np.float32).smallest_subnormal])
    third = np.array([1.0]) / 3
    tiny = np.array([np.finfo(np.float64).tiny]) / 2
    return [x.tobytes() for x in (least * 3, least32 * 3, third, -third, tiny, tiny * 2)]
before = modes()
assert all(any(x) for x in before)
import fastattn
assert modes() == before
q = np.ones((300, 64), np.float32)
fastattn.scaled_dot(q, q, q)
assert modes() == before
print("fine")
"""
    assert run_python(program).strip() == "fine"


@linux
@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="layout of fenv_t")
def test_floating_point_mode(run_python, target):
    """Rounding, traps, flushing of subnormals, x87 precision: as they were, to the bit."""
    program = """
import ctypes, platform, sys
import numpy as np
libm = ctypes.CDLL("libm.so.6")
def mode():
    environment = (ctypes.c_uint32 * 8)()
    assert libm.fegetenv(environment) == 0
    if platform.machine() == "aarch64":
        return environment[0]  # FPCR
    return environment[0] & 0xffff, environment[7] & ~0x3f  # x87 control, MXCSR without its flags
before = mode()
import fastattn
assert mode() == before
q = np.ones((300, 64), np.float32)
for bias in (0, -np.inf, 1e300):
    fastattn.scaled_dot(q, q, q, bias=bias, softcap=3, threads=2, backend=sys.argv[1])
    assert mode() == before
print("fine")
"""
    assert run_python(program, target.backend).strip() == "fine"


# From the lowest: `core` imports itself alone; the public functions import what they need.
LAYERS = ("core", "reference", "backends", "dispatch")


def _layer(module: str) -> int:
    first = module.partition(".")[0]
    return LAYERS.index(first) if first in LAYERS else len(LAYERS)


def _imports() -> dict[str, set[str]]:
    """What each module of fastattn imports of the others when it is imported."""
    package = Path(fastattn.__file__).parent
    paths = {
        ".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")
    }
    found = {}
    for name, path in paths.items():
        found[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*name.split(".")[: -node.level], *([node.module] if node.module else [])]
                for alias in node.names:
                    options = (
                        (*base, alias.name),
                        (*base, alias.name, "__init__"),
                        (*base, "__init__"),
                        base,
                    )
                    found[name].add(next(m for x in options if (m := ".".join(x)) in paths))
    return found


def test_imports_run_downwards():
    """And no backend imports another, but for what NumPy's does in place of compiled kernels."""
    for name, others in _imports().items():
        for other in others:
            assert _layer(other) <= _layer(name), f"{name} imports {other}"
            if name.startswith("backends.") and other.startswith("backends."):
                assert other.split(".")[1] in (name.split(".")[1], "numpy"), (
                    f"{name} imports {other}"
                )


def test_imports_have_no_circle():
    graphlib.TopologicalSorter(_imports()).prepare()
