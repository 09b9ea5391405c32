"""Linear maps of vectors, and what their gradients need."""

from __future__ import annotations

import numpy as np

__all__ = ["project", "rows"]


# Vectors of more numbers than these are converted part by part.
PART_ELEMENTS = 1 << 18


def project(x, w, b, dtype, out=None) -> np.ndarray:
    """``x @ w + b`` in `dtype`, of half precision in float32 and then rounded; into any `out`."""
    real = np.result_type(dtype, np.float32) if dtype.itemsize > 2 else np.dtype(np.float32)
    with np.errstate(all="ignore"):
        w = w.astype(real, copy=False)
        if x.size > PART_ELEMENTS and max(x.shape[:-1]) > 1 and not x.dtype == real == dtype:
            out = np.empty((*x.shape[:-1], w.shape[-1]), dtype) if out is None else out
            axis = int(np.argmax(x.shape[:-1]))
            middle = x.shape[axis] // 2
            for part in (slice(middle), slice(middle, None)):
                at = (slice(None),) * axis + (part,)
                project(x[at], w, b, dtype, out[at])
            return out
        y = np.matmul(x.astype(real, copy=False), w, out=None if dtype != real else out)
        if b is not None:
            y += b.astype(real, copy=False)
        if out is None or y is out:
            return y.astype(dtype, copy=False)
        out[...] = y
        return out


def rows(x) -> np.ndarray:
    """All the vectors of `x`, one a row."""
    return x.reshape(-1, x.shape[-1])
