"""The plain dot product and the cosine as scores, by the kernels of the scaled dot product."""

from __future__ import annotations

from functools import partial

import numpy as np

from .attention import scaled_dot, solve
from .backends import numpy as numpy_backend
from .chunks import Chunk, Gradients, Union, blocks, entries, fill, runs
from .core.arguments import flag, plain, positive
from .core.backward import Backward
from .core.option_table import differentiable, refuse
from .core.options import check_wrt
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .jvp import has_tangents, jvp, pushed_forward, without_weights
from .vjp import differentiated, differentiates, vjp, without_out

__all__ = ["cosine", "dot"]

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
