"""Programs that a test starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastattn


def child_environment(**more) -> dict[str, str]:
    """That of this process, in which a program finds the same ``fastattn`` and ``helpers``."""
    own = (Path(fastattn.__file__).parents[1], Path(__file__).parents[1])
    path = os.pathsep.join((*map(str, own), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PYTHONPATH": path, **more}


def run_module(name, *arguments) -> subprocess.CompletedProcess:
    """A module of these helpers that is a program, as it ended."""
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=child_environment(),
        timeout=600,
        stdout=subprocess.PIPE,
        text=True,
    )
