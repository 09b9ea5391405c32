"""A sequence pooled to one vector, or several, by learned weights."""

from __future__ import annotations

import numpy as np

from .attention import scaled_dot
from .core.arguments import plain, shaped
from .core.dtypes import float_dtype
from .core.options import check_wrt
from .core.signatures import attention
from .jvp import has_tangents, jvp
from .vjp import differentiates, vjp

__all__ = ["pool"]


@attention
def pool(
    x, w, *, b=0.0, kv_lengths=None, mask=None,
    return_lse=False, return_weights=False, backend=None, threads=None,
):  # fmt: skip
    """Attention pooling: the mean of `x` along the sequence, weighted by ``softmax(x @ w + b)``.

    Parameters
    ----------
    x : array_like, (..., S, D)
        Sequences of vectors.
    w : array_like, (D,) or (D, H)
        The score's weights, of one pooling or of `H` at once.
    b : float or array_like, (H,), default 0.0
        Added to every score; finite. It cancels out of the result and shows in `lse` alone.
    kv_lengths : array_like of int, optional
        Leave out the positions ``t >= kv_lengths``; broadcastable to the leading axes, in ``0..S``.
    mask : array_like of bool, optional
        Leave out the positions where it is False; broadcastable to ``(..., S)``.
    return_lse : bool, default False
        Also return the logarithm of the softmax's denominator.
    return_weights : bool, default False
        Also return the weights.
    backend, threads
        As of `fastattn.scaled_dot`.

    Returns
    -------
    out : ndarray, (..., D) or (..., H, D)
        0 where no position is left. The widest dtype of `x` and `w`, as in `fastattn.scaled_dot`.
    lse : ndarray, (...) or (..., H), if `return_lse`
        ``-inf`` where no position is left.
    weights : ndarray, (..., S) or (..., H, S), if `return_weights`
        0 where a position is left out.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.

    Notes
    -----
    It is `fastattn.dot` with the weights as queries and `x` as keys and values: Yang et al. (2016),
    "Hierarchical Attention Networks for Document Classification", equations 6 and 7, without their
    hidden layer.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> x = np.array([[1.0, 0.0], [3.0, 0.0], [5.0, 1.0]])
    >>> out, weights = fastattn.pool(x, [0.0, 50.0], return_weights=True)
    >>> out.round(3), weights.round(3)
    (array([5., 1.]), array([0., 0., 1.]))
    """
    x, w, options = _pooling(x, w, b, kv_lengths, mask)
    results = scaled_dot(
        np.atleast_2d(w.T), x, x, return_lse=return_lse, return_weights=return_weights,
        backend=backend, threads=threads, **options,
    )  # fmt: skip
    return _pooled(results, w.ndim == 1)


@differentiates(pool, 2, 2)
def _pool(x, w, *, wrt, b=0.0, kv_lengths=None, mask=None, **options):
    check_wrt(wrt, {"b": b})
    _check_pool(options)
    x, w, given = _pooling(x, w, b, kv_lengths, mask)
    single = w.ndim == 1
    results, back = vjp(
        scaled_dot, np.atleast_2d(w.T), x, x, wrt=("bias",) * len(wrt), **given, **options
    )

    pooled, axes = _pooled(results, single), (-3, -2) if single else -3
    out = pooled[0] if isinstance(pooled, tuple) else pooled

    def pullback(grad_out, grad_lse=None):
        grad_out = np.expand_dims(shaped("grad_out", grad_out, out.shape), axes)
        if grad_lse is not None:
            grad_lse = shaped("grad_lse", grad_lse, out.shape[:-1])
            grad_lse = np.expand_dims(grad_lse, (-2, -1) if single else -2)
        dw, dk, dv, *db = back(grad_out, grad_lse)
        dw, dx = dw.T.reshape(w.shape), (dk + dv)[..., 0, :, :]
        return dx, dw, *(x.reshape(np.shape(b)) for x in db)

    return pooled, pullback


@has_tangents(pool, 2, 2)
def _pool_tangents(
    arrays, tangents, *, b=0.0, kv_lengths=None, mask=None, return_lse=False, **options
):  # fmt: skip
    _check_pool(options)
    x, w = arrays
    dx, dw = tangents
    x, w, own = _pooling(x, w, b, kv_lengths, mask)
    dx = None if dx is None else dx[..., None, :, :]
    dw = None if dw is None else np.atleast_2d(dw.T)
    results = jvp(
        scaled_dot, (np.atleast_2d(w.T), x, x), (dw, dx, dx), return_lse=return_lse, **own,
        **options,
    )  # fmt: skip
    return tuple(_pooled(moved, w.ndim == 1) for moved in results)


def _pooling(x, w, b, kv_lengths, mask):
    """``(x, w, options)`` of the attention with one head that a pooling is."""
    x, w = plain("x", x), plain("w", w)
    float_dtype("x", x), float_dtype("w", w)
    if not 2 <= x.ndim < 64:  # NumPy's most, and heads come in
        raise ValueError(f"x: expected 2 to 63 axes, (..., length, dim), got {x.ndim}")
    if w.ndim not in (1, 2):
        raise ValueError(f"w: expected 1 or 2 axes, (dim,) or (dim, poolings), got {w.ndim}")
    if w.shape[0] != x.shape[-1]:
        raise ValueError(f"w: expected dim {x.shape[-1]} as in x, got {w.shape[0]}")
    b = plain("b", b)
    if b.shape not in ((), w.shape[1:]):
        raise ValueError(f"b: expected shape () or {w.shape[1:]}, got {b.shape}")
    if b.dtype.kind not in "fiu" or not np.isfinite(b).all():
        raise ValueError(f"b: expected finite numbers, got {b}")
    options = {"scale": 1.0, "bias": b[..., None], "kv_lengths": kv_lengths}
    if mask is not None:
        mask = plain("mask", mask)
        if mask.ndim == 0 or mask.ndim >= x.ndim:
            raise ValueError(f"mask: expected a shape that broadcasts to {x.shape[:-1]}, "
                             f"got {mask.shape}")  # fmt: skip
        options["mask"] = mask[..., None, None, :]
    return x[..., None, :, :], w, options


def _check_pool(options) -> None:
    for name in options.keys() - {"backend", "return_lse", "return_weights", "threads"}:
        raise TypeError(
            f"{name}: pool() has no such option; it has b, kv_lengths, mask, return_lse, "
            "return_weights, backend, threads"
        )


def _pooled(results, single: bool):
    """Without the axis of heads and, of a single pooling, that of queries: both have length 1."""
    given = results if isinstance(results, tuple) else (results,)
    first = given[0].ndim - 3
    axes = (first, first + 1) if single else (first,)
    pooled = tuple(x.squeeze(axes) for x in given)
    return pooled if isinstance(results, tuple) else pooled[0]
