"""How a cache stores keys and values: rounded to a float dtype, or to small numbers with scales."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .dtypes import FLOAT32, FLOAT64, FLOATS, float_type
from .int4 import GROUP, pack

__all__ = ["STORED", "Storage", "storage"]

STORED = (*FLOATS, "float8_e4m3fn", "int8", "int4")
_STEPS = {"int8": 127, "int4": 7}  # on either side of 0
_MOST = np.finfo(np.float32).max
_SMALLEST_SCALE = np.finfo(np.float32).smallest_subnormal
# The one whose steps all lie within float32: the quotient, rounded down.
_LARGEST_SCALE = {
    name: np.nextafter(_MOST / np.float32(steps), np.float32(0)) for name, steps in _STEPS.items()
}


class Storage(NamedTuple):
    """What is kept of a row of numbers."""

    name: str
    dtype: np.dtype  # of the numbers; int4 has two in a uint8

    @property
    def has_scales(self) -> bool:
        return self.name in _STEPS

    @property
    def widens(self) -> bool:
        """Does its dtype count for that of a result?"""
        return self.name in FLOATS

    def fields(self, dim: int) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of a row's numbers, and of its scales if it has some."""
        if self.name == "int4":
            return [((-(-dim // 2),), self.dtype), ((-(-dim // GROUP),), FLOAT32)]
        if self.name == "int8":
            return [((dim,), self.dtype), ((1,), FLOAT32)]
        return [((dim,), self.dtype)]

    def rounded(self, name: str, x: np.ndarray, live) -> list[np.ndarray]:
        """The fields of the rows of `x`, of those that are `live`; None: of all. Floats stay as
        they are: writing them rounds.
        """
        if not self.has_scales:
            return [x]
        steps, scales = _quantised(name, x, live, self.name)
        return [pack(steps) if self.name == "int4" else steps, scales]


def storage(dtype) -> Storage:
    """The `Storage` that the argument ``dtype`` names, or an error."""
    try:
        name = dtype if isinstance(dtype, str) or dtype is None else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in STORED:
        raise ValueError(f"dtype: expected one of {', '.join(STORED)}, got {name}")
    try:
        return Storage(name, np.dtype(np.uint8) if name == "int4" else float_type(name))
    except ModuleNotFoundError:
        raise ValueError(f"dtype: {name} needs the package ml_dtypes") from None


def _quantised(name, x, live, stored):
    """``(numbers, scales)``, int8 and float32 (..., groups), each group of a row by its largest."""
    most, dim = _STEPS[stored], x.shape[-1]
    real = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    if live is not None:
        x = np.where(live[..., None], x, np.zeros((), x.dtype))
    x = x.astype(real, copy=False)
    edges = np.arange(0, dim, GROUP if stored == "int4" else dim)
    with np.errstate(all="ignore"):
        top = np.maximum.reduceat(np.abs(x), edges, axis=-1)
        scales = (top / real.type(most)).astype(np.float32)
        scales[(scales == 0) & (top > 0)] = _SMALLEST_SCALE
        np.minimum(scales, _LARGEST_SCALE[stored], out=scales)
        if not (top <= _MOST).all():
            raise ValueError(
                f"{name}: expected numbers for {stored} that float32 holds, "
                "got a NaN, an Inf or more"
            )
        divisors = np.where(scales == 0, np.float32(1), scales)
        if len(edges) > 1:
            divisors = np.repeat(divisors, GROUP, axis=-1)[..., :dim]
        steps = x / divisors
    np.rint(steps, out=steps)
    # Only a subnormal scale, which is coarse, makes more steps than there are.
    np.minimum(steps, most, out=steps)
    np.maximum(steps, -most, out=steps)
    return steps.astype(np.int8), scales
