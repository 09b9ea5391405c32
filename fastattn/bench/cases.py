"""What is ranked: problems by name, and their inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..core.dtypes import float_type
from .functions import FUNCTIONS, document_starts
from .options import NEIGHBOURS, OPTIONS, sequence_bounds

__all__ = ["CASES", "Case", "parse_shape"]

# Matrix products of queries x keys: the backward pass makes the scores again, and then the
# gradients of the weights, q, k and v; forward mode adds two for the tangents of each array.
PRODUCTS = {
    "forward": 2,
    "backward": 5,
    "training step": 7,
    "forward mode of q": 4,
    "forward mode": 6,
}

SHAPE = re.compile(r"(\d+),(\d+)(?:/(\d+))?,(\d+)(?:x(\d+))?,(\d+)")


class Case(NamedTuple):
    """One attention call: q (batch, heads, n_queries, head_dim), k and v with kv_heads, n_keys.

    Its `work` is the result, or the gradients of q, k and v from it, or both, as in training, or
    the result with its derivative along tangents of q, or of q, k and v.
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
    def forward_mode(self) -> bool:
        return self.work.startswith("forward mode")

    @property
    def backward(self) -> bool:
        """Are there gradients in its work?"""
        return self.work in ("backward", "training step")

    @property
    def documents(self) -> bool:
        """Are there several end to end, each of which sees itself?"""
        return self.function == "documents" or self.option == "packed"

    @property
    def plain(self) -> Case | None:
        """The call without the function, the option or the tangents, which tells what these cost;
        None if there are none, or if they leave keys out.
        """
        if self.documents or self.option == "graph":
            return None
        work = "forward" if self.forward_mode else self.work
        plain = self._replace(function="", option="", work=work)
        return None if plain == self else plain

    @property
    def extra(self) -> str:
        """What a `plain` call does without, in words."""
        return (self.function + self.option).replace("_", " ") or "tangents"

    @property
    def pairs(self) -> int:
        """How many keys the queries of one head see, in all."""
        if self.option == "graph":
            return self.n_queries * min(NEIGHBOURS, self.n_keys)
        start, stop = self.intervals()
        return int(np.maximum(stop - start, 0).sum())

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products, for the keys that are seen."""
        return 2 * PRODUCTS[self.work] * self.head_dim * self.pairs * self.batch * self.heads

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
        if self.documents:
            bounds = self.document_bounds()
            own = np.searchsorted(bounds, np.arange(self.n_queries), side="right")
            start, stop = np.maximum(start, bounds[own - 1]), np.minimum(stop, bounds[own])
        return start, stop

    def document_bounds(self) -> np.ndarray:
        """Where the documents begin, and the last one ends."""
        if self.option == "packed":
            return sequence_bounds(self.n_keys)
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

    def tangents(self) -> tuple[np.ndarray, ...]:
        """Standard normal tangents of ``(q, k, v)``, or of ``(q,)``, where these are its work."""
        given = {"forward mode": 3, "forward mode of q": 1}.get(self.work, 0)
        return self.arrays(seed=1)[:given]


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
    "flex-documents-backward": Case(1, 8, 4096, 4096, 64, work="backward", function="documents"),
    "dropout": Case(1, 8, 2048, 2048, 64, option="dropout"),
    "dropout-backward": Case(1, 8, 2048, 2048, 64, work="backward", option="dropout"),
    "relative-bias": Case(1, 8, 2048, 2048, 64, option="relative_bias"),
    "relative-bias-backward": Case(1, 8, 2048, 2048, 64, work="backward", option="relative_bias"),
    "return-max": Case(1, 8, 2048, 2048, 64, option="return_max"),
    # 64 sequences
    "packed": Case(1, 8, 17210, 17210, 64, option="packed"),
    "packed-causal": Case(1, 8, 17210, 17210, 64, causal=True, option="packed"),
    "graph": Case(1, 8, 100_000, 100_000, 64, option="graph"),
    "graph-backward": Case(1, 8, 20_000, 20_000, 64, work="backward", option="graph"),
    "jvp": Case(1, 8, 2048, 2048, 64, work="forward mode"),
    "jvp-of-q": Case(1, 8, 2048, 2048, 64, work="forward mode of q"),
    "integrations-jax": Case(1, 8, 4096, 4096, 64, inside="jax"),
    "integrations-jax-training": Case(1, 8, 4096, 4096, 64, work="training step", inside="jax"),
    "integrations-jax-tiny": Case(1, 4, 16, 16, 64, inside="jax"),
}
