"""Exact softmax attention for NumPy at the speed limit of the machine."""

from .api import scaled_dot

__version__ = "0.1.0"

__all__ = ["scaled_dot"]
