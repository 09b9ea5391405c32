"""Attention over the union of disjoint sets of keys, from the results for each."""

from __future__ import annotations

import numpy as np

from .core.arguments import plain
from .core.dtypes import float_dtype, widest

__all__ = ["merge", "share"]


def merge(*parts) -> tuple[np.ndarray, np.ndarray]:
    """Exact attention over disjoint sets of keys, from the partial results.

    Parameters
    ----------
    *parts : (out, lse)
        What ``scaled_dot(..., return_lse=True)`` returned for the same queries and some of the
        keys: `out` (..., Sq, Dv), `lse` (..., Sq). Each must have been computed with an explicit
        `q_offset` where positions matter, and sinks may be in one part only.

    Returns
    -------
    out : ndarray, (..., Sq, Dv)
        In the widest dtype of the parts, as `scaled_dot` promotes: integers count as float64,
        float16 with bfloat16 as float32; 0 where no part has a visible key.
    lse : ndarray, (..., Sq)
        ``-inf`` where no part has a visible key.

    Raises
    ------
    TypeError, ValueError
        If a part is not such a pair of plain arrays of real numbers, or the shapes differ.

    Notes
    -----
    ``out = sum of out_i * exp(lse_i - lse)`` with ``lse = log(sum of exp(lse_i))``: Dao et al.
    (2022), "FlashAttention", section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> parts = [fastattn.scaled_dot(q, k[:, s], v[:, s], return_lse=True)
    ...          for s in (slice(0, 30), slice(30, 100))]
    >>> out, lse = fastattn.merge(*parts)
    >>> np.allclose(out, fastattn.scaled_dot(q, k, v))
    True
    """
    if not parts:
        raise ValueError("parts: expected at least one (out, lse), got none")
    pairs = [_pair(f"part {n}", part) for n, part in enumerate(parts)]
    shape = pairs[0][0].shape
    for n, (out, lse) in enumerate(pairs):
        if out.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(
                f"part {n}: expected shapes {shape} and {shape[:-1]}, "
                f"got {out.shape} and {lse.shape}"
            )
    dtype = widest({float_dtype("out", out) for out, _ in pairs})
    real = widest({np.dtype(np.float32), dtype, *(float_dtype("lse", lse) for _, lse in pairs)})
    if real != np.float64:
        real = np.dtype(np.float32)
    with np.errstate(all="ignore"):
        top = np.max([lse for _, lse in pairs], axis=0)
        shares = [share(lse, top).astype(real) for _, lse in pairs]
        total = np.sum(shares, axis=0)
        merged = np.zeros(shape, real)
        for (out, lse), part in zip(pairs, shares, strict=True):
            # A part without a visible key does not count, NaN or not.
            some = (lse != -np.inf)[..., None]
            merged += np.where(some, out.astype(real) * (part / total)[..., None], 0)
        return merged.astype(dtype), (top + np.log(total)).astype(real)


def share(lse, other) -> np.ndarray:
    """``exp(lse - other)``, which is 1 where both are infinite: of a sink, or of no key."""
    return np.exp(np.where(lse == other, 0, lse - other))


def _pair(name, part):
    if not isinstance(part, tuple) or len(part) != 2:
        got = f"{len(part)} of them" if isinstance(part, tuple) else type(part).__name__
        raise TypeError(f"{name}: expected a pair (out, lse), got {got}")
    out, lse = (plain(f"{name}, {what}", x) for what, x in zip(("out", "lse"), part, strict=True))
    for what, x in (("out", out), ("lse", lse)):
        float_dtype(f"{name}, {what}", x)
    if out.ndim < 1:
        raise ValueError(f"{name}: expected out of shape (..., Sq, Dv), got ()")
    return out, lse
