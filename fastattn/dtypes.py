"""Dtypes by name, bfloat16 among them."""

from __future__ import annotations

from importlib import import_module

import numpy as np

__all__ = ["float_type"]


def float_type(name: str) -> np.dtype:
    """The dtype called `name`; bfloat16 needs ``ml_dtypes``."""
    if name == "bfloat16":
        return np.dtype(import_module("ml_dtypes").bfloat16)
    return np.dtype(name)
