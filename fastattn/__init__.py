"""Exact softmax attention for NumPy at the speed limit of the machine."""

from .api import scaled_dot
from .backward import scaled_dot_backward
from .blockmask import block_mask
from .cache import KVCache
from .config import show_config
from .explain import available_backends, explain
from .flex import flex
from .gaussian import gaussian
from .maps import attention_map, key_importance, top_keys
from .measures import additive, euclidean
from .merge import merge
from .multihead import MultiHeadAttention
from .scores import cosine, dot, pool
from .spans import document_spans
from .vjp import vjp

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "additive",
    "attention_map",
    "available_backends",
    "block_mask",
    "cosine",
    "document_spans",
    "dot",
    "euclidean",
    "explain",
    "flex",
    "gaussian",
    "key_importance",
    "merge",
    "pool",
    "scaled_dot",
    "scaled_dot_backward",
    "show_config",
    "top_keys",
    "vjp",
]
