"""What is ranked: problems by name, their inputs, and the exact results of some of their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import reference
from ..core.backward import Backward
from ..core.dtypes import float_type
from ..core.problem import make_problem
from .functions import FUNCTIONS, document_starts
from .options import NEIGHBOURS, OPTIONS

__all__ = ["CASES", "Case", "parse_shape"]

# The error is measured on this many queries of every head: the exact result of all of them would
# take longer than the ranking. Float64 is judged in long double, which no BLAS speeds up.
EXACT_ROWS = {"float64": 16}
EXACT_ROWS_DEFAULT = 64

# Matrix products of queries x keys: the backward pass makes the scores again, and then the
# gradients of the weights, q, k and v; forward mode adds those of each array's tangent.
PRODUCTS = {"forward": 2, "backward": 5, "training step": 7, "forward mode": 6}

SHAPE = re.compile(r"(\d+),(\d+)(?:/(\d+))?,(\d+)(?:x(\d+))?,(\d+)")


class Case(NamedTuple):
    """One attention call: q (batch, heads, n_queries, head_dim), k and v with kv_heads, n_keys.

    Its `work` is the result, or the gradients of q, k and v from it, or both, as in training, or
    the result with its derivative along tangents of q, k and v.
    """

    batch: int
    heads: int
    n_queries: int
    n_keys: int
    head_dim: int
    kv_heads: int | None = None  # None: as many as heads
    causal: bool = False
    window: tuple[int, int] | None = None
    dtype: str = "float32"
    work: str = "forward"  # a key of PRODUCTS
    inside: str = ""  # the library in whose program the call is, compiled if it compiles
    function: str = ""  # a key of FUNCTIONS: scores or a mask by a function of the user's
    option: str = ""  # a key of OPTIONS

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.grouped else f"{self.heads}"
        length = f"{self.n_queries}"
        if self.n_keys != self.n_queries:
            length += f"x{self.n_keys}"
        words = [f"({self.batch}, {heads}, {length}, {self.head_dim})", self.dtype]
        if self.causal:
            words.append("causal")
        if self.window is not None:
            words.append(f"window {self.window[0]},{self.window[1]}")
        if self.work != "forward":
            words.append(self.work)
        if self.inside:
            words.append(f"inside {self.inside}")
        if self.function:
            words.append(f"function {self.function}")
        if self.option:
            words.append(self.option)
        return " ".join(words)

    @property
    def grouped(self) -> bool:
        return self.kv_heads not in (None, self.heads)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products, for the keys that are seen."""
        if self.option == "graph":
            pairs = self.n_queries * min(NEIGHBOURS, self.n_keys)
        else:
            start, stop = self.intervals()
            pairs = int(np.maximum(stop - start, 0).sum())
        return 2 * PRODUCTS[self.work] * self.head_dim * pairs * self.batch * self.heads

    @property
    def bytes(self) -> int:
        """What one pass over the keys and values reads."""
        numbers = 2 * self.batch * (self.kv_heads or self.heads) * self.n_keys * self.head_dim
        return numbers * float_type(self.dtype).itemsize

    @property
    def decodes(self) -> bool:
        """Is there one query, so that memory sets the pace?"""
        return self.n_queries == 1

    @property
    def grid(self) -> tuple[int, int]:
        return self.n_queries, self.n_keys

    @property
    def grid_bytes(self) -> int:
        """The size of one array with an entry for each query and key."""
        itemsize = float_type(self.dtype).itemsize
        return self.batch * self.heads * self.n_queries * self.n_keys * itemsize

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """``(start, stop)``: query i sees the keys ``start[i] <= j < stop[i]``."""
        position = np.arange(self.n_queries) + self.n_keys - self.n_queries
        left, right = self.window or (self.n_keys, self.n_keys)
        if self.causal:
            right = 0
        start = np.clip(position - left, 0, self.n_keys)
        stop = np.clip(position + right + 1, 0, self.n_keys)
        if self.function == "documents" or self.option == "packed":
            bounds = self.document_bounds()
            own = np.searchsorted(bounds, np.arange(self.n_queries), side="right")
            start, stop = np.maximum(start, bounds[own - 1]), np.minimum(stop, bounds[own])
        return start, stop

    def document_bounds(self) -> np.ndarray:
        """Where the documents begin, and the last one ends."""
        return np.append(document_starts(self.n_keys), self.n_keys)

    def options(self, rows: slice | None = None) -> dict[str, Any]:
        """What `fastattn.scaled_dot` is given for these queries, by default for all."""
        if not self.option:
            return {}
        return OPTIONS[self.option](self, rows or slice(0, self.n_queries))

    def functions(self, array: Callable) -> dict[str, Callable]:
        """What `fastattn.flex` is given; `array` makes NumPy's arrays a library's own."""
        if not self.function:
            return {}
        return FUNCTIONS[self.function](self.heads, self.n_keys, array)

    def mask(self) -> np.ndarray | None:
        """The same as a bool array ``(n_queries, n_keys)``; None if every key is seen."""
        if not self.causal and self.window is None:
            return None
        start, stop = self.intervals()
        j = np.arange(self.n_keys)
        return (start[:, None] <= j) & (j < stop[:, None])

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard normal ``(q, k, v)``."""
        draw = np.float64 if self.dtype == "float64" else np.float32
        rng = np.random.default_rng(seed)
        kv = (self.batch, self.kv_heads or self.heads, self.n_keys, self.head_dim)
        shapes = ((self.batch, self.heads, self.n_queries, self.head_dim), kv, kv)
        dtype = float_type(self.dtype)
        q, k, v = (rng.standard_normal(s, draw).astype(dtype, copy=False) for s in shapes)
        return q, k, v

    def grad_out(self) -> np.ndarray:
        """The standard normal gradient of the result."""
        return self.arrays(seed=1)[0]

    def tangents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard normal tangents of ``(q, k, v)``."""
        return self.arrays(seed=1)

    def exact(self, q, k, v) -> tuple[np.ndarray, np.ndarray]:
        """``(rows, exact)``: the exact results of some queries, spread over the whole length, or
        the gradients or tangents of these where they are the work. With an option, which may count
        the queries, they follow each other.
        """
        n = min(self.n_queries, EXACT_ROWS.get(self.dtype, EXACT_ROWS_DEFAULT))
        rows = np.unique(np.linspace(0, self.n_queries - 1, n).astype(int))
        if self.option:
            rows = np.arange(n) + (self.n_queries - n) // 2
        start, stop = self.intervals()
        spans = start[rows], stop[rows]
        score_mod, bias = self.functions(np.asarray).get("score_mod"), None
        if score_mod is not None:  # these add
            head = np.arange(self.heads)[:, None, None]
            bias = score_mod(0.0, 0, head, rows[:, None], np.arange(self.n_keys))
        options = self.options(slice(rows[0], rows[-1] + 1))
        if self.option == "graph":  # the keys that none of the queries sees take no part
            seen, places = np.unique(options["mask"].indices, return_inverse=True)
            k, v = k[..., seen, :], v[..., seen, :]
            mask = options["mask"]
            options["mask"] = type(mask)((mask.data, places, mask.indptr), (n, len(seen)))
        problem = make_problem(
            q[..., rows, :], k, v, spans=spans, bias=bias, gradients=True, **options
        )
        real = np.longdouble if self.dtype == "float64" else np.float64
        out, lse, weights = reference.attend(problem, real)
        if self.work == "forward":
            return rows, out
        if self.work == "forward mode":
            dq, dk, dv = self.tangents()
            arrays = [x.astype(real) for x in (q[..., rows, :], k, v)]
            tangents = [x.astype(real) for x in (dq[..., rows, :], dk, dv)]
            return rows, tangent(arrays, tangents, weights, out)
        backward = Backward(problem, out, lse, self.grad_out()[..., rows, :], None)
        return rows, reference.gradients(backward, real)["q"]


def tangent(arrays, tangents, weights, out) -> np.ndarray:
    """The derivative of `out` along tangents of q, k and v, with the default scale."""
    (q, k, v), (dq, dk, dv) = arrays, tangents
    group = q.shape[1] // k.shape[1]
    k, v, dk, dv = (np.repeat(x, group, axis=1) for x in (k, v, dk, dv))
    ds = (dq @ k.swapaxes(-1, -2) + q @ dk.swapaxes(-1, -2)) / np.sqrt(out.dtype.type(q.shape[-1]))
    moved = weights * ds
    return weights @ dv + moved @ v - moved.sum(axis=-1, keepdims=True) * out


def parse_shape(text: str, **options) -> Case:
    """The case of ``B,H,S,D``, where S may be ``QUERIESxKEYS`` and H may be ``HEADS/KV_HEADS``."""
    found = SHAPE.fullmatch(text.replace(" ", ""))
    if found is None:
        raise ValueError("expected B,H,S,D, such as 1,8,4096,64 or 1,32/8,100x4096,128")
    batch, heads, kv_heads, n_queries, n_keys, head_dim = (int(x or 0) for x in found.groups())
    if kv_heads:
        options["kv_heads"] = kv_heads
    case = Case(batch, heads, n_queries, n_keys or n_queries, head_dim, **options)
    if min(case[:5]) < 1:
        raise ValueError(f"expected sizes of at least 1, got {min(case[:5])}")
    if case.kv_heads is not None and case.heads % case.kv_heads:
        raise ValueError(
            f"expected a number of key heads that divides {case.heads}, got {case.kv_heads}"
        )
    return case


def _lengths() -> dict[str, Case]:
    cases = {}
    for power in range(int(math.log2(128)), int(math.log2(16384)) + 1):
        n = 2**power
        cases[f"{n}"] = Case(1, 8, n, n, 64)
        cases[f"{n}-causal"] = Case(1, 8, n, n, 64, causal=True)
    return cases


CASES: dict[str, Case] = {
    **_lengths(),
    "d128": Case(1, 8, 4096, 4096, 128),
    "grouped": Case(1, 32, 2048, 2048, 128, kv_heads=8, causal=True),
    "two-heads": Case(1, 2, 16384, 16384, 64),
    "batch": Case(8, 12, 128, 128, 64),
    "short": Case(1, 16, 512, 512, 64, causal=True),
    "tiny": Case(1, 4, 16, 16, 64),
    "float64": Case(1, 8, 4096, 4096, 64, dtype="float64"),
    "cross": Case(1, 6, 1000, 3000, 96),
    "odd": Case(2, 6, 777, 777, 80),
    "window": Case(1, 8, 4096, 4096, 64, window=(256, 256)),
    **{
        f"{dtype}{suffix}": Case(1, 8, 4096, 4096, dim, causal=suffix == "-causal", dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for suffix, dim in (("", 64), ("-causal", 64), ("-d128", 128))
    },
    **{
        f"decode{suffix}": Case(1, 32, 1, 8192, 128, kv_heads=kv_heads, dtype=dtype)
        for suffix, kv_heads, dtype in (
            ("", 32, "float32"),
            ("-grouped", 8, "float32"),
            ("-bfloat16", 8, "bfloat16"),
            ("-float16", 8, "float16"),
        )
    },
    "decode-odd": Case(1, 14, 1, 5000, 80, kv_heads=2),
    "backward": Case(1, 8, 2048, 2048, 64, work="backward"),
    "backward-causal": Case(1, 8, 2048, 2048, 64, causal=True, work="backward"),
    "backward-one-head": Case(1, 1, 4096, 4096, 64, work="backward"),
    "backward-d128": Case(1, 8, 2048, 2048, 128, work="backward"),
    "backward-bfloat16": Case(1, 8, 2048, 2048, 64, dtype="bfloat16", work="backward"),
    "training": Case(1, 8, 2048, 2048, 64, causal=True, work="training step"),
    **{f"flex-{name}": Case(1, 8, 4096, 4096, 64, function=name) for name in FUNCTIONS},
    "dropout": Case(1, 8, 2048, 2048, 64, option="dropout"),
    "dropout-backward": Case(1, 8, 2048, 2048, 64, work="backward", option="dropout"),
    "relative-bias": Case(1, 8, 2048, 2048, 64, option="relative_bias"),
    "relative-bias-backward": Case(1, 8, 2048, 2048, 64, work="backward", option="relative_bias"),
    "return-max": Case(1, 8, 2048, 2048, 64, option="return_max"),
    "packed": Case(1, 8, 4096, 4096, 64, option="packed"),
    "packed-causal": Case(1, 8, 4096, 4096, 64, causal=True, option="packed"),
    "graph": Case(1, 8, 100_000, 100_000, 64, option="graph"),
    "graph-backward": Case(1, 8, 20_000, 20_000, 64, work="backward", option="graph"),
    "jvp": Case(1, 8, 2048, 2048, 64, work="forward mode"),
    "integrations-jax": Case(1, 8, 4096, 4096, 64, inside="jax"),
    "integrations-jax-training": Case(1, 8, 4096, 4096, 64, work="training step", inside="jax"),
    "integrations-jax-tiny": Case(1, 4, 16, 16, 64, inside="jax"),
}
