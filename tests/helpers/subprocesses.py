"""Programs that a test starts."""

from __future__ import annotations

import os
from pathlib import Path

import fastattn


def child_environment(**more) -> dict[str, str]:
    root = str(Path(fastattn.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}
