"""The compiled extension, or why there is none."""

from __future__ import annotations

import os
import struct
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["broken", "kernels", "missing"]

NAME = "fastattn._kernels"


def _load() -> tuple[Any, str | None, bool]:
    """``(extension, None, False)``, or None, the reason, and whether it is there all the same."""
    try:
        # In this package's own folder: an editable install finds one for any copy of the package.
        folder = Path(__file__).parents[1]
        spec = PathFinder.find_spec(NAME, [str(folder)])
        if spec is None:
            others = [x.name for x in folder.glob("_kernels.*") if x.suffix != ".pyi"]
            if not others:
                return None, "the extension was not built", False
            raise ImportError(f"built for another Python: {', '.join(sorted(others))}")
        if spec.origin and _is_truncated(spec.origin):
            raise ImportError(f"{spec.origin} is truncated")
        return import_module(NAME), None, False
    except Exception as error:  # the loader's, NumPy's or Cython's: they are of several types
        return None, f"the extension cannot be loaded ({' '.join(str(error).split())})", True


def _is_truncated(path: str) -> bool:
    """Does an ELF file end before its last table? Loading it would end the process (SIGBUS)."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
        return False
    if len(header) < 64:
        return True
    (table,) = struct.unpack_from("<Q", header, 40)
    size, entries = struct.unpack_from("<HH", header, 58)
    return os.path.getsize(path) < table + size * entries


if TYPE_CHECKING:
    import fastattn._kernels as kernels

    missing: str | None  # why there is none
    broken: bool  # there is one, which cannot be loaded
else:
    kernels, missing, broken = _load()
