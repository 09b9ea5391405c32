"""The candidates of the ranking: fastattn's backends, NumPy as users write it, and the peers.

Every candidate gets what it runs best on: its own layout, its own compiled graph or session, the
same number of threads, all made in `prepare` and not timed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn

from ..backends import cuda
from ..core.problem import make_problem
from ..dispatch import BACKENDS, unsupported_backward
from .base import Candidate, Prepared
from .cases import Case
from .machine import default_threads, threadpoolctl
from .peers import PEERS, Jax, TorchCuda

__all__ = ["CANDIDATES", "named"]


class Fastattn(Candidate):
    """`fastattn.scaled_dot` on one backend."""

    ours = functions = True

    def __init__(self, backend):
        self.backend = backend
        self.name = f"fastattn-{backend.name}"

    def version(self) -> str:
        return fastattn.__version__

    def unavailable(self, case: Case, threads: int) -> str | None:
        if case.inside:
            return f"is not called inside {case.inside}"
        tiny = case._replace(batch=1, n_queries=1, n_keys=1)
        problem = make_problem(*tiny.arrays(), causal=case.causal, window=case.window,
                               gradients=True,
                       **case.functions(np.asarray))  # fmt: skip
        reason = self.backend.unsupported(problem)
        if reason is None and case.work != "forward":
            reason = unsupported_backward(self.backend, problem)
        return reason or (cannot_limit_blas(threads) if self.backend.name == "numpy" else None)

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        if self.backend.name == "numpy":
            limit_blas(threads)

        options = {"causal": case.causal, "window": case.window,
                   "backend": self.backend.name, "threads": threads}  # fmt: skip
        if case.function:
            functions: dict[str, Any] = dict(case.functions(np.asarray))
            if "mask_mod" in functions:
                functions["block_mask"] = fastattn.block_mask(
                    functions["mask_mod"], case.n_queries, case.n_keys
                )
            return Prepared(lambda: fastattn.flex(q, k, v, **functions, **options), np.asarray)
        if case.work == "forward":
            return Prepared(lambda: fastattn.scaled_dot(q, k, v, **options), np.asarray)
        grad_out = case.grad_out()

        def train():
            _, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, **options)
            return pullback(grad_out)

        _, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, **options)
        call = train if case.work == "training step" else lambda: pullback(grad_out)
        return Prepared(call, lambda gradients: gradients[0])


class FastattnCuda(Fastattn):
    """The same on torch's tensors on a GPU, beside `TorchCuda`."""

    only_named = True

    def unavailable(self, case: Case, threads: int) -> str | None:
        return super().unavailable(case, threads) or TorchCuda().missing()

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        torch = TorchCuda()
        q, k, v = (torch.tensor(x) for x in (q, k, v))
        call, _ = super().prepare(q, k, v, case, threads)
        return torch.finished(Prepared(call, torch.read))


class FastattnJax(Jax):
    """`fastattn.integrations.jax` in the same programs as JAX's own attention."""

    name = "fastattn-jax"
    ours = True
    dtypes = ("float32", "bfloat16", "float16")
    inside = ("jax",)

    def version(self) -> str:
        return fastattn.__version__

    def grids(self, case: Case) -> int:
        return 0

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        os.environ["FASTATTN_NUM_THREADS"] = str(threads)
        return super().prepare(q, k, v, case, threads)

    def attention(self) -> Callable:
        from ..integrations.jax import dot_product_attention

        return dot_product_attention


class PlainNumpy(Candidate):
    """The formula, written with care: one array of scores, changed in place."""

    name = "numpy-formula"
    packages = ("numpy",)

    def unavailable(self, case: Case, threads: int) -> str | None:
        return super().unavailable(case, threads) or cannot_limit_blas(threads)

    def grids(self, case: Case) -> int:
        return 1

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        limit_blas(threads)
        group = case.heads // k.shape[1]
        mask = case.mask()
        hidden = None if mask is None else ~mask
        scale = q.dtype.type(1 / math.sqrt(case.head_dim))

        def call():
            # Grouped heads broadcast: (batch, kv_heads, group, length, dim).
            grouped = q.reshape(q.shape[0], -1, group, *q.shape[2:])
            s = (grouped * scale) @ k[:, :, None].swapaxes(-1, -2)
            if hidden is not None:
                np.copyto(s, -np.inf, where=hidden)
            s -= s.max(axis=-1, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=-1, keepdims=True)
            return s @ v[:, :, None]

        return Prepared(call, lambda out: out.reshape(q.shape))


def limit_blas(threads: int) -> None:
    """Let NumPy's BLAS use that many threads from now on."""
    control = threadpoolctl()
    if control is not None:
        control.threadpool_limits(threads, user_api="blas")


def cannot_limit_blas(threads: int) -> str | None:
    """Why NumPy cannot be given that many threads, or None."""
    if threads == default_threads() or threadpoolctl() is not None:
        return None
    return "the threads of NumPy's BLAS cannot be set without threadpoolctl"


OURS = (FastattnCuda(b) if b is cuda else Fastattn(b) for b in BACKENDS)
CANDIDATES: tuple[Candidate, ...] = (*OURS, FastattnJax(), PlainNumpy(), *PEERS)


def named(name: str) -> Candidate:
    """The candidate of that name."""
    return next(c for c in CANDIDATES if c.name == name)
