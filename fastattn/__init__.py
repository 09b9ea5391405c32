"""Exact softmax attention for NumPy at the speed limit of the machine."""

from .api import scaled_dot
from .cache import KVCache
from .config import show_config
from .explain import available_backends, explain
from .merge import merge
from .spans import document_spans

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "available_backends",
    "document_spans",
    "explain",
    "merge",
    "scaled_dot",
    "show_config",
]
