"""The candidates of the ranking: fastattn's backends, NumPy as users write it, and the peers.

Every candidate gets what it runs best on: its own layout, its own compiled graph or session, the
same number of threads, all made in `prepare` and not timed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import fastattn

from ..backends import cuda
from ..core.problem import make_problem
from ..dispatch import BACKENDS, unsupported_backward, unsupported_forward_mode
from .base import Candidate, Prepared, missing_package
from .cases import Case
from .machine import cannot_limit_blas, limit_blas
from .options import OPTIONS, RATE, biases
from .peers import PEERS, Jax
from .torch_peers import TorchCuda

__all__ = ["CANDIDATES", "named"]


class Fastattn(Candidate):
    """`fastattn.scaled_dot` on one backend."""

    ours = functions = True
    options = tuple(OPTIONS)

    def __init__(self, backend):
        self.backend = backend
        self.name = f"fastattn-{backend.name}"

    def version(self) -> str:
        return fastattn.__version__

    def unavailable(self, case: Case, threads: int) -> str | None:
        if case.inside:
            return f"is not called inside {case.inside}"
        missing = self.missing()
        if missing or (case.option == "graph" and (missing := missing_package("scipy"))):
            return missing
        tiny = case._replace(batch=1, n_queries=1, n_keys=1)
        options: dict[str, Any] = {**case.functions(np.asarray), **tiny.options()}
        problem = make_problem(*tiny.arrays(), causal=case.causal, window=case.window,
                               gradients=case.work != "forward", **options)  # fmt: skip
        reason = self.backend.unsupported(problem)
        if reason is None and case.backward:
            reason = unsupported_backward(self.backend, problem)
        if reason is None and case.forward_mode:
            reason = unsupported_forward_mode(self.backend, problem)
        return reason or (cannot_limit_blas(threads) if self.backend.name == "numpy" else None)

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        if self.backend.name == "numpy":
            limit_blas(threads)

        options: dict[str, Any] = {
            "causal": case.causal, "window": case.window, "backend": self.backend.name,
            "threads": threads, **case.functions(np.asarray), **case.options(),
        }  # fmt: skip
        function: Callable = fastattn.flex if case.function else fastattn.scaled_dot
        arrays = [q, k, v]
        if "mask_mod" in options:
            options["block_mask"] = fastattn.block_mask(
                options["mask_mod"], case.n_queries, case.n_keys
            )
        if case.option != "packed":
            return self.work(function, arrays, case, options)
        options["cu_seqlens_q"] = case.document_bounds()
        arrays = [tokens_first(x) for x in arrays]
        call, read = self.work(fastattn.varlen, arrays, case, options)
        return Prepared(call, lambda found: read(found).swapaxes(0, 1)[None])

    @staticmethod
    def work(function: Callable, arrays: list, case: Case, options: dict[str, Any]) -> Prepared:
        """The call of `function` that does the work of `case`."""
        call: Callable[[], Any]
        if case.work == "forward":
            call = partial(function, *arrays, **options)
            return Prepared(call, with_maxima if case.option == "return_max" else np.asarray)
        if case.forward_mode:
            tangents = [*case.tangents(), None, None][:3]
            call = partial(fastattn.jvp, function, arrays, tangents, **options)
            return Prepared(call, lambda found: found[1])
        grad_out = case.grad_out()
        if case.option == "packed":
            grad_out = tokens_first(grad_out)
        if case.option == "relative_bias":
            options["wrt"] = ("relative_bias",)

        def train():
            _, pullback = fastattn.vjp(function, *arrays, **options)
            return pullback(grad_out)

        _, pullback = fastattn.vjp(function, *arrays, **options)
        call = train if case.work == "training step" else partial(pullback, grad_out)
        return Prepared(call, lambda gradients: gradients[0])


def tokens_first(x: np.ndarray) -> np.ndarray:
    """Of a batch of one, as `fastattn.varlen` takes it: (length, heads, dim)."""
    return np.ascontiguousarray(x[0].swapaxes(0, 1))


def with_maxima(found) -> np.ndarray:
    """A result and the largest score of each query as one array."""
    out, row_max = found
    return np.concatenate([out, row_max[..., None]], axis=-1)


class FastattnCuda(Fastattn):
    """The same on torch's tensors on a GPU, beside `TorchCuda`."""

    only_named = True
    options = ()

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
    options = ("dropout", "relative_bias", "return_max")

    def unavailable(self, case: Case, threads: int) -> str | None:
        return super().unavailable(case, threads) or cannot_limit_blas(threads)

    def grids(self, case: Case) -> int:
        return {"dropout": 2, "relative_bias": 2}.get(case.option, 1)

    def prepare(self, q, k, v, case: Case, threads: int) -> Prepared:
        limit_blas(threads)
        group = case.heads // k.shape[1]
        mask = case.mask()
        hidden = None if mask is None else ~mask
        scale = q.dtype.type(1 / math.sqrt(case.head_dim))
        bias = None
        if case.option == "relative_bias":
            bias = biases(case).reshape(-1, group, *case.grid)
        rng = np.random.default_rng()

        def call():
            # Grouped heads broadcast: (batch, kv_heads, group, length, dim).
            grouped = q.reshape(q.shape[0], -1, group, *q.shape[2:])
            s = (grouped * scale) @ k[:, :, None].swapaxes(-1, -2)
            if bias is not None:
                s += bias
            if hidden is not None:
                np.copyto(s, -np.inf, where=hidden)
            row_max = s.max(axis=-1, keepdims=True)
            s -= row_max
            np.exp(s, out=s)
            total = s.sum(axis=-1, keepdims=True)
            if case.option == "dropout":  # 16 random bits are the fastest
                s *= rng.integers(1 << 16, size=s.shape, dtype=np.uint16) >= RATE * (1 << 16)
                total *= 1 - RATE
            s /= total
            return s @ v[:, :, None], row_max

        def read(found):
            out, row_max = (x.reshape(*q.shape[:3], -1) for x in found)
            return with_maxima((out, row_max[..., 0])) if case.option == "return_max" else out

        return Prepared(call, read)


OURS = (FastattnCuda(b) if b is cuda else Fastattn(b) for b in BACKENDS)
CANDIDATES: tuple[Candidate, ...] = (*OURS, FastattnJax(), PlainNumpy(), *PEERS)


def named(name: str) -> Candidate:
    """The candidate of that name."""
    return next(c for c in CANDIDATES if c.name == name)
