"""Promise 5: a Python without a GIL stays without one."""

import sysconfig

import pytest


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_gil_stays_off(run_python):
    """The import of a module that does not say it can do without switches the GIL on."""
    program = "import sys, fastattn; print(sys._is_gil_enabled(), *fastattn.available_backends())"
    assert run_python(program, PYTHON_GIL="").split()[:2] == ["False", "cython"]
