"""Numbers of four bits, -7..7: two in a byte, the even dim in its lower half, plus 8 each."""

from __future__ import annotations

import numpy as np

__all__ = ["GROUP", "pack", "unpack"]

GROUP = 32  # dims that share a scale


def pack(steps: np.ndarray) -> np.ndarray:
    """Whole numbers of the last axis, two in a uint8."""
    halves = (steps + 8).astype(np.uint8)
    if halves.shape[-1] % 2:
        halves = np.concatenate((halves, np.full_like(halves[..., :1], 8)), axis=-1)
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack(packed: np.ndarray, dim: int) -> np.ndarray:
    """The inverse of `pack`, int8."""
    halves = np.stack((packed & 15, packed >> 4), axis=-1)
    halves = halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return halves[..., :dim].astype(np.int8) - np.int8(8)
