"""Exact softmax attention for NumPy at the speed limit of the machine."""

from .api import scaled_dot
from .backward import scaled_dot_backward
from .blockmask import block_mask
from .cache import KVCache
from .config import show_config
from .explain import available_backends, explain
from .flex import flex
from .merge import merge
from .spans import document_spans
from .vjp import vjp

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "available_backends",
    "block_mask",
    "document_spans",
    "explain",
    "flex",
    "merge",
    "scaled_dot",
    "scaled_dot_backward",
    "show_config",
    "vjp",
]
