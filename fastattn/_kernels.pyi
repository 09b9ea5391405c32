from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .core.dropout import Dropout
from .core.visibility import KeyRange

FEATURES: tuple[str, ...]

def getenv(name: str) -> str | None: ...
def instruction_sets() -> tuple[str, ...]: ...
def kernel_tables() -> dict[str, dict[str, tuple[int, ...]]]: ...
def instruction_set() -> str: ...
def tile_sizes() -> dict[str, int]: ...
def tile_size(
    compute_dtype: str, queries: int, head_dim: int, value_dim: int, dot: bool
) -> tuple[int, int, int]: ...
def matmul_dtype(
    compute_dtype: str, queries: int, head_dim: int, value_dim: int, dot: bool
) -> str: ...
def openmp_threads() -> int: ...
def cpus_in_places() -> int: ...
def peak_flops(dtype: DTypeLike, threads: int, rounds: int = ...) -> float: ...
def read_bandwidth(threads: int, thread_bytes: int = ...) -> float: ...
def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_scales: np.ndarray | None,
    v_scales: np.ndarray | None,
    out: np.ndarray,
    batch: tuple[int, ...],
    heads: int,
    kv_heads: int,
    scale: Any,
    softcap: float,
    bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    mask: np.ndarray | None,
    lse: np.ndarray | None,
    weights: np.ndarray | None,
    order: np.ndarray | None,
    compute_dtype: str,
    threads: int,
    score_function: tuple[str, np.ndarray | None] | None,
    sums: np.ndarray | None,
    indices: np.ndarray | None,
    block_table: np.ndarray | None,
    dropout: Dropout | None,
    scales: np.ndarray | None,
    relative_bias: np.ndarray | None,
    max_score: np.ndarray | None,
    sequences: np.ndarray | None,
) -> None: ...
def attend_sparse(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_scales: np.ndarray | None,
    v_scales: np.ndarray | None,
    out: np.ndarray,
    batch: tuple[int, ...],
    heads: int,
    kv_heads: int,
    scale: Any,
    softcap: float,
    bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    starts: np.ndarray,
    keys: np.ndarray,
    lse: np.ndarray | None,
    weights: np.ndarray | None,
    score_function: tuple[str, np.ndarray | None] | None,
    threads: int,
) -> None: ...
def differentiate_sparse(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    grad_out: np.ndarray,
    grad_lse: np.ndarray | None,
    rows: np.ndarray,
    coarse: float,
    grad_q: np.ndarray,
    grad_k: np.ndarray,
    grad_v: np.ndarray,
    batch: tuple[int, ...],
    heads: int,
    kv_heads: int,
    scale: Any,
    softcap: float,
    bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    starts: np.ndarray,
    keys: np.ndarray,
    score_function: tuple[str, np.ndarray | None] | None,
    threads: int,
    grad_bias: np.ndarray | None,
    row_sums: np.ndarray | None,
) -> None: ...
def transposed(
    starts: np.ndarray, keys: np.ndarray, n_keys: int
) -> tuple[np.ndarray, np.ndarray]: ...
def differentiate(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    grad_out: np.ndarray,
    grad_lse: np.ndarray | None,
    rows: np.ndarray,
    coarse: np.ndarray,
    grad_q: np.ndarray,
    grad_k: np.ndarray | None,
    grad_v: np.ndarray | None,
    batch: tuple[int, ...],
    heads: int,
    kv_heads: int,
    scale: Any,
    softcap: float,
    bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    mask: np.ndarray | None,
    compute_dtype: str,
    threads: int,
    grad_bias: np.ndarray | None,
    row_sums: np.ndarray | None,
    key_heads: np.ndarray,
    dropout: Dropout | None,
    scales: np.ndarray | None,
    relative_bias: np.ndarray | None,
    wants_scale: bool,
    grad_relative_bias: np.ndarray | None,
    sequences: np.ndarray | None,
    block_table: np.ndarray | None,
) -> None: ...
