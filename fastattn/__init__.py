"""Exact softmax attention for NumPy at the speed limit of the machine."""

from .api import scaled_dot
from .backward import scaled_dot_backward
from .config import show_config
from .explain import available_backends, explain
from .merge import merge
from .spans import document_spans
from .vjp import vjp

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "document_spans",
    "explain",
    "merge",
    "scaled_dot",
    "scaled_dot_backward",
    "show_config",
    "vjp",
]
