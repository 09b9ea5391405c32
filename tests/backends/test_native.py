"""What ``tests/backends/native.sh`` checks in C, as far as that is quick."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("native.sh")


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("gcc")), reason="needs bash and gcc")
def test_exp_and_tanh():
    """Within their stated bounds, on each instruction set, at every 9973rd float32."""
    subprocess.run(["bash", str(SCRIPT), "scan", "9973"], check=True)
