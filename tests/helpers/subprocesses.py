"""Programs that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

import fastattn


def child_environment(**more) -> dict[str, str]:
    """That of this process, in which a program finds the same ``fastattn`` and ``helpers``."""
    own = (Path(fastattn.__file__).parents[1], Path(__file__).parents[1])
    path = os.pathsep.join((*map(str, own), *filter(None, [os.environ.get("PYTHONPATH")])))
    return {**os.environ, "PYTHONPATH": path, **more}
