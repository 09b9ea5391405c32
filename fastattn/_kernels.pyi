from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .core.dropout import Dropout
from .core.visibility import KeyRange

FEATURES: tuple[str, ...]

def getenv(name: str) -> str | None: ...
def instruction_sets() -> tuple[str, ...]: ...
def slow_instruction_sets() -> tuple[str, ...]: ...
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
def plan_key(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> bytes | None: ...

class Plan:
    uses_threads: bool
    def __init__(
        self, outputs: list[tuple[np.ndarray, int, bool, bool]], uses_threads: bool, kept: Any
    ) -> None: ...
    def run(self, arrays: tuple[np.ndarray, ...], threads: int) -> Any: ...

def attend(*arguments: Any, **options: Any) -> None: ...  # as csrc lists them
def push_forward(*arguments: Any) -> None: ...  # likewise
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
    scales: np.ndarray | None,
    softcap: float,
    bias: np.ndarray | None,
    relative_bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    starts: np.ndarray,
    keys: np.ndarray,
    block_table: np.ndarray | None,
    dropout: Dropout | None,
    lse: np.ndarray | None,
    max_score: np.ndarray | None,
    weights: np.ndarray | None,
    sums: np.ndarray | None,
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
    scales: np.ndarray | None,
    softcap: float,
    bias: np.ndarray | None,
    relative_bias: np.ndarray | None,
    alibi: np.ndarray | None,
    sinks: np.ndarray | None,
    key_range: KeyRange,
    starts: np.ndarray,
    keys: np.ndarray,
    dropout: Dropout | None,
    score_function: tuple[str, np.ndarray | None] | None,
    threads: int,
    grad_bias: np.ndarray | None,
    grad_relative_bias: np.ndarray | None,
    row_sums: np.ndarray | None,
    wants_scale: bool,
) -> None: ...
def transposed(
    starts: np.ndarray, keys: np.ndarray, n_keys: int
) -> tuple[np.ndarray, np.ndarray]: ...
def differentiate(*arguments: Any, **options: Any) -> None: ...  # as csrc lists them
