"""Promise 5: safe from many threads, and without a GIL.

With ``pytest --parallel-threads=8`` (pytest-run-parallel) each test runs in eight threads at once.
"""

import sysconfig

import numpy as np
import pytest
from helpers.oracles import same_bits

import fastattn

Q, K, V = np.random.default_rng(0).standard_normal((3, 4, 70, 16), np.float32)
BIAS = np.random.default_rng(1).standard_normal((70, 70), np.float32)
CACHE = fastattn.KVCache(1, 4, 16)
CACHE.append(K[None], V[None])

CALLS = {
    "scaled_dot": lambda **how: fastattn.scaled_dot(Q, K, V, causal=True, bias=BIAS, **how),
    "several threads": lambda **how: fastattn.scaled_dot(Q, K, V, threads=3, **how),
    "float64": lambda **how: fastattn.scaled_dot(Q.astype("d"), K, V, **how),
    "cosine": lambda **how: fastattn.cosine(Q, K, V, **how),
    "KVCache": lambda **how: CACHE.attend(Q[None], **how),
}


@pytest.mark.parametrize("backend", [b for b in ("cython", "numba", "numpy")
                                     if b in fastattn.available_backends()])  # fmt: skip
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls_beside_each_other(call, backend):
    wanted = call(backend="reference")
    first = call(backend=backend)
    np.testing.assert_allclose(first, wanted, atol=1e-5)
    for _ in range(3):
        assert same_bits(call(backend=backend), first)


def test_gradients_beside_each_other():
    wanted = fastattn.vjp(fastattn.scaled_dot, Q, K, V, backend="reference")[1](V)
    found = fastattn.vjp(fastattn.scaled_dot, Q, K, V)[1](V)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_gil_stays_off(run_python):
    """The import of a module that does not say it can do without switches the GIL on."""
    program = "import sys, fastattn; print(sys._is_gil_enabled(), *fastattn.available_backends())"
    assert run_python(program, PYTHON_GIL="").split()[:2] == ["False", "cython"]
