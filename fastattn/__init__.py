"""Exact softmax attention for NumPy at the speed limit of the machine."""

from . import plot
from .additive import additive
from .attention import scaled_dot
from .backward import scaled_dot_backward
from .block_mask import block_mask
from .documents import document_spans
from .euclidean import euclidean
from .explain import available_backends, explain, show_config
from .flex import flex
from .gaussian import gaussian
from .jvp import jvp
from .kv_cache import KVCache
from .merge import merge
from .multihead import MultiHeadAttention
from .pooling import pool
from .relative_bias import t5_relative_bias
from .similarity import cosine, dot
from .varlen import varlen
from .vjp import vjp
from .weight_maps import attention_map, key_importance, top_keys

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
    "jvp",
    "key_importance",
    "merge",
    "plot",
    "pool",
    "scaled_dot",
    "scaled_dot_backward",
    "show_config",
    "t5_relative_bias",
    "top_keys",
    "varlen",
    "vjp",
]
