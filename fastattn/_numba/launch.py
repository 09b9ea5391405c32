"""The kernel as Python calls it: compiled once, kept on disk, and free of the GIL."""

from __future__ import annotations

import hashlib
from pathlib import Path

from numba import njit

from .tile import attend

__all__ = ["launch", "launcher"]


def _digest() -> int:
    """Of the sources here: of these, Numba's disk cache looks at this file alone."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in sources)
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _entry():
    digest = _digest()

    def launch(address, begin, end, scale, score_mod, mask_mod):
        digest  # noqa: B018  a closure's variables are part of the key of the disk cache
        attend(address, begin, end, scale, score_mod, mask_mod)

    return launch


def launcher(cache: bool):
    """A launcher that compiles itself for the types of its arguments, functions included."""
    return njit(nogil=True, error_model="numpy", cache=cache)(_entry())


def _cached():
    try:
        return launcher(cache=True)
    except RuntimeError:  # nowhere to write: neither beside this file nor in the user's cache
        return launcher(cache=False)


launch = _cached()
