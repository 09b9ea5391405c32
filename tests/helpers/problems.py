"""Problems to attend to: shapes, arrays and options."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The sizes of one attention call: q (batch, heads, n_queries, head_dim) and so on."""

    batch: int = 2
    heads: int = 2
    n_queries: int = 5
    n_keys: int = 7
    head_dim: int = 8
    kv_heads: int | None = None  # None: as many as heads
    value_dim: int | None = None  # None: head_dim

    def arrays(self, dtype="float32", seed=0):
        """Standard normal ``(q, k, v)``."""
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        shapes = (
            (self.batch, self.heads, self.n_queries, self.head_dim),
            (self.batch, kv_heads, self.n_keys, self.head_dim),
            (self.batch, kv_heads, self.n_keys, value_dim),
        )
        rng = np.random.default_rng(seed)
        draw = np.float64 if dtype == "float64" else np.float32
        return tuple(rng.standard_normal(s, draw).astype(float_type(dtype)) for s in shapes)


# Around the edges of any tile: multiples of 2, 3 and 4 vectors of 4, 8 and 16 numbers, and blocks.
EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 47, 48, 49, 95, 97, 127, 128, 129)
LONG_EDGES = (511, 512, 513, 1000)

DTYPES = ("float32", "float64", "float16", "bfloat16")

SCORE_OPTIONS = ("scale", "softcap", "bias", "relative_bias", "alibi", "sinks")
INTERVAL_OPTIONS = ("causal", "window", "q_offset", "kv_lengths", "spans")


def float_type(name) -> np.dtype:
    """The dtype called `name`; a test that needs bfloat16 is skipped where ml_dtypes is not."""
    if name == "bfloat16":
        import pytest

        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def options(names, shape: Shape, seed=0) -> dict:
    """A random value for each named option of `fastattn.scaled_dot`, for inputs of `shape`.

    ``"-inf"`` stands for a bias that excludes keys, ``"-inf distances"`` for a relative bias that
    does, and ``"scales"`` for a scale per head. Where the contract demands a ``q_offset`` and
    none is named, it is 0.
    """
    rng = np.random.default_rng([seed, 1])
    batch, heads, n_queries, n_keys = shape[:4]
    rows = (batch, heads, n_queries)
    grid = (*rows, n_keys)
    values = {
        "scale": lambda: float(rng.uniform(0.1, 1.0)),
        "softcap": lambda: float(rng.uniform(0.5, 5.0)),
        "bias": lambda: rng.standard_normal(grid).astype(np.float32),
        "-inf": lambda: np.where(rng.random(grid) < 0.3, -np.inf, 0.5).astype(np.float32),
        "alibi": lambda: rng.uniform(-0.1, 1.0, heads),
        "sinks": lambda: rng.standard_normal(heads),
        "causal": lambda: True,
        "window": lambda: tuple(
            None if rng.random() < 0.2 else int(rng.integers(0, n_keys + 1)) for _ in range(2)
        ),
        "q_offset": lambda: rng.integers(-n_queries - 1, n_keys + 2, batch),
        "kv_lengths": lambda: rng.integers(0, n_keys + 1, batch),
        "spans": lambda: (rng.integers(-2, n_keys + 1, rows), rng.integers(0, n_keys + 3, rows)),
        "mask": lambda: rng.random(grid) < 0.7,
        "relative_bias": lambda: rng.standard_normal((heads, 2 * int(rng.integers(0, 12)) + 1)),
        "scales": lambda: rng.uniform(-0.2, 1.0, heads),
        "-inf distances": lambda: np.where(rng.random((heads, 15)) < 0.3, -np.inf, 0.5),
    }
    chosen = {}
    for name, draw in values.items():
        value = draw()  # always drawn, so that a name changes nothing about the others
        if name in names:
            chosen[name] = value
    if "-inf" in chosen:
        chosen["bias"] = chosen.pop("-inf") + chosen.get("bias", np.float32(0))
    if "-inf distances" in chosen:
        chosen["relative_bias"] = chosen.pop("-inf distances")
    if "scales" in chosen:
        chosen["scale"] = chosen.pop("scales")
    if "kv_lengths" in chosen and {"causal", "window", "alibi", "relative_bias"} & chosen.keys():
        chosen.setdefault("q_offset", 0)
    return chosen


# ------------------------------------------------------------------------------------ oracles
