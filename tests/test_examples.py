"""The examples run, and what they train learns its task."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import child_environment

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name, package", [("train_numpy", "numpy"), ("train_torch", "torch")])
def test_training(name, package):
    """In the short mode; each ends with an error if its task is not solved."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--short"],
        env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        timeout=300,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "ms a step" in done.stdout
