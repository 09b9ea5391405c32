"""Attention by the additive score of Bahdanau et al. (2015)."""

from __future__ import annotations

import numpy as np

from .attention import solve
from .backward import of_its_array
from .core.arguments import flag, plain, vector
from .core.dtypes import float_dtype, widest
from .core.linear import project, rows
from .core.option_table import differentiable, refuse
from .core.options import check_wrt
from .core.problem import Problem, ScoreFunction, gradient_of, make_problem
from .core.signatures import attention
from .jvp import has_tangents, pushed_forward, without_weights
from .vjp import differentiated, differentiates, without_out

__all__ = ["additive"]


@attention
def additive(q, k, v, *, w_q, w_k, w, b=None, out=None, backend=None, **options):
    """Exact softmax attention by the additive score, ``w @ tanh(q_i @ w_q + k_j @ w_k + b)``.

    Parameters
    ----------
    q : array_like, (..., Hq, Sq, D)
        Queries.
    k : array_like, (..., Hkv, Sk, Dk)
        Keys, of any width.
    v : array_like, (..., Hkv, Sk, Dv)
        `q`, `k` and `v` are otherwise as of `fastattn.scaled_dot`; in the host's memory.
    w_q : array_like, (D, H)
        Projects the queries. The parameters are the same for every head, of any float dtype; `q`,
        `k` and `v` alone decide that of the result.
    w_k : array_like, (Dk, H)
        Projects the keys.
    w : array_like, (H,)
        Weighs the hidden units.
    b : array_like, (H,), optional
        Added to them before the tanh; 0 by default.
    out, backend, **options
        As of `fastattn.scaled_dot`, except ``scale``.

    Returns
    -------
    out, lse, row_max, weights
        As of `fastattn.scaled_dot`.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, if a parameter has another shape, and if there is a scale.

    Notes
    -----
    Queries and keys are projected first, each once; no array of queries x keys x H is ever made.
    The score is that of Bahdanau et al. (2015), "Neural Machine Translation by Jointly Learning to
    Align and Translate", appendix A.1.2.

    Examples
    --------
    One state of a decoder attends to five of an encoder of another width:

    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> state, states = rng.standard_normal((1, 6)), rng.standard_normal((5, 8))
    >>> w_q, w_k, w = rng.standard_normal((6, 16)), rng.standard_normal((8, 16)), np.ones(16)
    >>> fastattn.additive(state, states, states, w_q=w_q, w_k=w_k, w=w).shape
    (1, 8)
    """
    inputs, parameters = _additive_arrays(q, k, v, w_q, w_k, w, b)
    p = _projected(inputs, parameters, options, out=out)
    return solve(p, backend, out)


def _additive_arrays(q, k, v, w_q, w_k, w, b):
    """``(inputs, parameters)``, arrays by their names, checked."""
    inputs = {name: plain(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    parameters = {name: plain(name, x) for name, x in (("w_q", w_q), ("w_k", w_k), ("w", w))}
    if b is not None:
        parameters["b"] = plain("b", b)
    for name, x in (*inputs.items(), *parameters.items()):
        float_dtype(name, x)
    hidden = parameters["w_q"].shape[-1] if parameters["w_q"].ndim == 2 else "H"
    for name in "qk":
        x, shape = inputs[name], parameters[f"w_{name}"].shape
        if x.ndim < 2:
            raise ValueError(f"{name}: expected at least 2 axes, (..., length, dim), got {x.ndim}")
        if shape != (x.shape[-1], hidden):
            raise ValueError(f"w_{name}: expected shape ({x.shape[-1]}, {hidden}), got {shape}")
    for name in parameters.keys() - {"w_q", "w_k"}:
        vector(name, parameters[name], hidden)
    return inputs, parameters


def _projected(inputs, parameters, options, **more) -> Problem:
    """The problem that is left once queries and keys are projected."""
    refuse("additive", options)
    dtype = widest({float_dtype(name, x) for name, x in inputs.items()})
    hidden = parameters["w"].shape[0]
    q, k = (
        np.empty_like(inputs[name], dtype, shape=(*inputs[name].shape[:-1], hidden), subok=False)
        for name in "qk"
    )
    score_function = ScoreFunction("additive", parameters["w"])
    p = make_problem(q, k, inputs["v"], scale=1.0, score_function=score_function, **more, **options)
    project(inputs["q"], parameters["w_q"], parameters.get("b"), dtype, out=q)
    project(inputs["k"], parameters["w_k"], None, dtype, out=k)
    return p


@differentiates(additive)
def _additive(
    q, k, v, *, wrt, w_q, w_k, w, b=None, backend=None, return_lse=False, **options
):  # fmt: skip
    without_out(options)
    inputs, parameters = _additive_arrays(q, k, v, w_q, w_k, w, b)
    check_wrt(wrt, {**parameters, "b": b, **differentiable("additive", options)})
    own = tuple(name for name in wrt if name in ("w_q", "w_k", "b"))
    inner = tuple(name for name in wrt if name not in own)
    p = _projected(inputs, parameters, options, gradients=True, wrt=inner, return_lse=True)
    results, back = differentiated(p, backend, return_lse)

    def pullback(grad_out, grad_lse=None):
        dq, dk, dv, *rest = back(grad_out, grad_lse)
        found = dict(zip(inner, rest, strict=True))
        for name, x, grad in (("w_q", inputs["q"], dq), ("w_k", inputs["k"], dk)):
            if name in own:
                found[name] = _of_weights(x, grad, p.accumulator)
        if "b" in own:
            found["b"] = rows(dq).sum(axis=0)
        for name in own:
            gradient = gradient_of(name, parameters[name], p.dtype)
            found[name] = of_its_array(found[name], gradient)
        dq = project(dq, parameters["w_q"].T, None, p.dtype)
        dk = project(dk, parameters["w_k"].T, None, p.dtype)
        return (dq, dk, dv, *(found[name] for name in wrt))

    return results, pullback


def _of_weights(x, grad, dtype):
    """The gradient of the weights in ``x @ weights``. A hidden vector takes no part,
    whatever is in it.
    """
    x, grad = rows(x), rows(grad)
    return project(np.where((grad != 0).any(axis=-1)[:, None], x, 0).T, grad, None, dtype)


@has_tangents(additive)
def _additive_tangents(
    arrays, tangents, *, w_q, w_k, w, b=None, backend=None, return_lse=False, **options
):
    without_out(options)
    without_weights(options)
    inputs, parameters = _additive_arrays(*arrays, w_q, w_k, w, b)
    p = _projected(inputs, parameters, options, return_lse=True)
    dq, dk, dv = tangents
    dq, dk = (
        None if t is None else project(t, parameters[name], None, p.accumulator)
        for t, name in ((dq, "w_q"), (dk, "w_k"))
    )
    return pushed_forward(p, (dq, dk, dv), backend, flag("return_lse", return_lse))
