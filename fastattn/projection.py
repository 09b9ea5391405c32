"""Linear maps of vectors, and what their gradients need."""

from __future__ import annotations

import numpy as np

__all__ = ["project", "rows"]


def project(x, w, b, dtype, out=None) -> np.ndarray:
    """``x @ w + b`` in `dtype`, of half precision in float32 and then rounded; into any `out`."""
    real = np.result_type(dtype, np.float32) if dtype.itemsize > 2 else np.dtype(np.float32)
    with np.errstate(all="ignore"):
        y = np.matmul(
            x.astype(real, copy=False),
            w.astype(real, copy=False),
            out=None if dtype != real else out,
        )
        if b is not None:
            y += b.astype(real, copy=False)
        if out is None or y is out:
            return y.astype(dtype, copy=False)
        out[...] = y
        return out


def rows(x) -> np.ndarray:
    """All the vectors of `x`, one a row."""
    return x.reshape(-1, x.shape[-1])
