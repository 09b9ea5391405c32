"""Settings from the environment, read at every call so that they can be changed at any time."""

from __future__ import annotations

__all__ = ["getenv"]

try:
    # C's own: os.getenv takes 0.6 us, a tenth of a small call.
    from ._kernels import getenv
except ImportError:
    from os import getenv  # type: ignore[assignment]
