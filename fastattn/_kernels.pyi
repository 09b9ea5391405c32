from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .core.backward import Backward
from .core.problem import Problem

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
        self, outputs: list[tuple[np.ndarray, int, bool, bool]], uses_threads: bool
    ) -> None: ...
    def run(self, arrays: tuple[np.ndarray, ...], threads: int) -> Any: ...

def attend(
    p: Problem,
    compute_dtype: str,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray | None = ...,
    max_score: np.ndarray | None = ...,
    weights: np.ndarray | None = ...,
    sums: np.ndarray | None = ...,
    indices: np.ndarray | None = ...,
    relative_bias: np.ndarray | None = ...,
    plan: Plan | None = ...,
) -> None: ...
def differentiate(
    b: Backward,
    compute_dtype: str,
    threads: int,
    rows: np.ndarray,
    grad_q: np.ndarray,
    grad_k: np.ndarray | None,
    grad_v: np.ndarray | None,
    key_heads: np.ndarray,
    grad_bias: np.ndarray | None = ...,
    row_sums: np.ndarray | None = ...,
    relative_bias: np.ndarray | None = ...,
    grad_relative_bias: np.ndarray | None = ...,
    grad_dim_weights: np.ndarray | None = ...,
    plan: Plan | None = ...,
) -> None: ...
def push_forward(
    p: Problem,
    compute_dtype: str,
    threads: int,
    d_q: np.ndarray | None,
    d_k: np.ndarray | None,
    d_v: np.ndarray | None,
    out: np.ndarray | None,
    lse: np.ndarray | None,
    d_out: np.ndarray,
    d_lse: np.ndarray,
    relative_bias: np.ndarray | None,
) -> None: ...
def attend_sparse(
    p: Problem,
    threads: int,
    out: np.ndarray,
    lse: np.ndarray | None = ...,
    max_score: np.ndarray | None = ...,
    weights: np.ndarray | None = ...,
    sums: np.ndarray | None = ...,
    relative_bias: np.ndarray | None = ...,
) -> None: ...
def differentiate_sparse(
    b: Backward,
    threads: int,
    rows: np.ndarray,
    grad_q: np.ndarray,
    grad_k: np.ndarray,
    grad_v: np.ndarray,
    grad_bias: np.ndarray | None = ...,
    row_sums: np.ndarray | None = ...,
    relative_bias: np.ndarray | None = ...,
    grad_relative_bias: np.ndarray | None = ...,
) -> None: ...
def transposed(
    starts: np.ndarray, keys: np.ndarray, n_keys: int
) -> tuple[np.ndarray, np.ndarray]: ...
