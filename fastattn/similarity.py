"""Scores other than the scaled dot product that its kernels compute as they are."""

from __future__ import annotations

from functools import partial

import numpy as np

from .attention import scaled_dot, solve
from .backends import numpy as numpy_backend
from .chunks import Chunk, Gradients, Union, blocks, entries, fill, runs
from .core.arguments import flag, number, plain, shaped
from .core.backward import Backward
from .core.dtypes import float_dtype
from .core.option_table import DIFFERENTIABLE, OPTIONS, check
from .core.options import check_wrt
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .jvp import has_tangents, jvp, pushed_forward, without_weights
from .vjp import differentiated, differentiates, vjp, without_out

__all__ = ["cosine", "dot", "pool"]

# The length of a float32 vector below which squares that matter may be subnormal.
_SHORT = 1e-15


@attention
def dot(q, k, v, **options):
    """Exact softmax attention by the plain dot product, ``softmax(q @ k.T) @ v``.

    Parameters
    ----------
    q, k, v : array_like, (..., Hq, Sq, D), (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        As of `fastattn.scaled_dot`.
    **options
        As of `fastattn.scaled_dot`, except ``scale``, which is 1.

    Returns
    -------
    out, lse, row_max, weights
        As of `fastattn.scaled_dot`.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, and if there is a scale.

    Notes
    -----
    Luong et al. (2015), "Effective Approaches to Attention-based Neural Machine Translation",
    section 3.1.

    Examples
    --------
    >>> import fastattn
    >>> out = fastattn.dot([[1, 0]], [[1, 0], [0, 1]], [[2, 0], [0, 2]])
    >>> out.round(3)
    array([[1.462, 0.538]])
    """
    refuse("dot", options)
    return scaled_dot(q, k, v, scale=1.0, **options)


@attention
def cosine(q, k, v, *, temperature=1.0, out=None, backend=None, **options):
    """Exact softmax attention by the cosine of the angle between query and key.

    Parameters
    ----------
    q, k, v : array_like, (..., Hq, Sq, D), (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        As of `fastattn.scaled_dot`; in the host's memory.
    temperature : float, default 1.0
        The score is ``cos(q_i, k_j) / temperature``; finite and > 0. A vector of zeros has cosine 0
        with every other.
    out, backend, **options
        As of `fastattn.scaled_dot`, except ``scale`` and ``block_table``.

    Returns
    -------
    out, lse, row_max, weights
        As of `fastattn.scaled_dot`.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, and if `temperature` is out of range or there is a scale.

    Notes
    -----
    Graves et al. (2014), "Neural Turing Machines", equations 5 and 6, with ``1 / temperature`` for
    their key strength.

    Examples
    --------
    How long a vector is makes no difference:

    >>> import fastattn
    >>> out = fastattn.cosine([[5, 0]], [[3, 0], [0, 0.1]], [[2, 0], [0, 2]], temperature=0.5)
    >>> out.round(3)
    array([[1.762, 0.238]])
    """
    refuse("cosine", options)
    p = _cosine_problem(q, k, v, temperature, out=out, **options)
    return solve(p, backend, out, partial(_run_cosine, backend=backend))


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


@differentiates(dot)
def _dot(q, k, v, *, wrt, **options):
    refuse("dot", options)
    check_wrt(wrt, differentiable("dot", options))
    return vjp(scaled_dot, q, k, v, wrt=wrt, scale=1.0, **options)


@differentiates(cosine)
def _cosine(
    q, k, v, *, wrt, temperature=1.0, backend=None, return_lse=False, **options
):  # fmt: skip
    refuse("cosine", options)
    check_wrt(wrt, differentiable("cosine", options))
    without_out(options)
    p = _cosine_problem(q, k, v, temperature, gradients=True, wrt=wrt, return_lse=True, **options)
    run = partial(_run_cosine, backend=backend)
    return differentiated(p, backend, return_lse, run, partial(_cosine_gradients, backend=backend))


def _cosine_problem(q, k, v, temperature, **options) -> Problem:
    scale = 1 / positive("temperature", temperature)
    q, k, v = (plain(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    return make_problem(q, k, v, scale=scale, **options)


def _run_cosine(p: Problem, result, backend):
    """`p` with the directions of its queries and keys; fills and returns what a backend does."""

    def attended(chunk: Chunk):
        q, _ = _unit(chunk.of(p.q, "hq."), p.dtype)
        found = Union(chunk)
        for run in runs(p, chunk):
            k, _ = _unit(run.of(p.k, "gj."), p.dtype)
            v = run.of(p.v, "gj.").astype(p.dtype, copy=False)
            results = scaled_dot(q, k, v, return_lse=True, return_max=p.return_max,
                                 return_weights=p.return_weights, backend=backend,
                                 **run.options(p))  # fmt: skip
            found.add(p, run.keys, *results)
        return found.out, found.lse, found.row_max, found.weights

    chunks = (chunk for entry in entries(p) for chunk in blocks(p, entry))
    return fill(p, result, ((chunk, attended(chunk)) for chunk in chunks))


def _cosine_gradients(b: Backward, backend) -> dict[str, np.ndarray]:
    p = b.problem
    sums = Gradients(p)
    for chunk in (chunk for entry in entries(p) for chunk in blocks(p, entry)):
        q, q_length = _unit(chunk.of(p.q, "hq."), p.dtype)
        for run in runs(p, chunk):
            k, k_length = _unit(run.of(p.k, "gj."), p.dtype)
            v = run.of(p.v, "gj.").astype(p.dtype, copy=False)
            found = run.gradients(chunk.backward(b), q, k, v, run.options(p), backend)
            found["q"] = _turned(found["q"], q, q_length)
            found["k"] = _turned(found["k"], k, k_length)
            sums.add(run, found)
    return sums.found


def _turned(grad, unit, length):
    """The gradient of a vector from that of its direction: what turns it, by its length. Also the
    tangent of a direction from that of its vector.
    """
    with np.errstate(all="ignore"):
        wide, unit = grad.astype(length.dtype, copy=False), unit.astype(length.dtype, copy=False)
        along = (wide * unit).sum(axis=-1, keepdims=True)
        return ((wide - along * unit) / length).astype(grad.dtype, copy=False)


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


def refuse(score: str, options: dict) -> None:
    """Take out of `options` what has no meaning for a score, which must be None there; an error of
    one that there is not.
    """
    for name in [name for name in options if name in OPTIONS and score in OPTIONS[name].without]:
        value = options.pop(name)
        if value is not None:
            raise TypeError(
                f"{name}: expected None, got {type(value).__name__}; {score} has no {name}"
            )
    check(score, options)


def differentiable(score: str, options: dict) -> dict:
    """The options by which there are gradients of a score, as they are given."""
    has = (name for name in DIFFERENTIABLE if score not in OPTIONS[name].without)
    return {name: options.get(name) for name in has}


def positive(name: str, value) -> float:
    """A finite number > 0, or an error that names the argument."""
    x = number(name, value)
    if not 0 < x < np.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {x}")
    return x


def _unit(x, dtype):
    """``(x / length, length)`` along the last axis, the first of `dtype`; 0 stays 0, with a length
    of infinity.
    """
    real = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        wide = x.astype(real, copy=False)
        length = _length(wide)
        odd = ~((length > _SHORT) & (length < np.inf))[..., 0]
        unit = wide / length
        if odd.any():  # the squares left the range of the dtype, or there is a NaN
            top = np.abs(wide[odd]).max(axis=-1, keepdims=True)
            scaled = wide[odd] / np.where(top == 0, np.inf, top)
            lengths = _length(scaled)
            unit[odd] = scaled / np.where(lengths == 0, np.inf, lengths)
            length[odd] = np.where(top == 0, np.inf, top * lengths)
        return unit.astype(dtype, copy=False), length


def _length(x):
    return np.sqrt((x * x).sum(axis=-1, keepdims=True))


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


@has_tangents(dot)
def _dot_tangents(arrays, tangents, **options):
    refuse("dot", options)
    return jvp(scaled_dot, arrays, tangents, scale=1.0, **options)


@has_tangents(cosine)
def _cosine_tangents(
    arrays, tangents, *, temperature=1.0, backend=None, return_lse=False, **options
):  # fmt: skip
    refuse("cosine", options)
    without_out(options)
    without_weights(options)
    p = _cosine_problem(*arrays, temperature, return_lse=True, **options)
    return pushed_forward(
        p, tangents, backend, flag("return_lse", return_lse), partial(_run_cosine, backend=backend),
        partial(numpy_backend.run_forward_mode, vectors=_directions),
    )  # fmt: skip


def _directions(x, dx):
    """The directions of vectors, and their tangents where the vectors have some."""
    unit, length = _unit(x, x.dtype)
    return unit, None if dx is None else _turned(dx, unit, length)


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
