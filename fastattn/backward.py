"""The public backward pass: gradients of `fastattn.scaled_dot`."""

from __future__ import annotations

import numpy as np

from .core.backward import Backward, make_backward_problem
from .core.problem import Gradient, Problem, make_problem
from .dispatch import select, unsupported_backward
from .plans import keep_plan, plan_key, plans, run_plan

__all__ = ["scaled_dot_backward"]

PER_HEAD = ("scale", "relative_bias", "alibi", "sinks")


def scaled_dot_backward(
    grad_out, q, k, v, out, lse, *, grad_lse=None, wrt=(),
    scale=None, softcap=None, bias=None, relative_bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    block_table=None,
    dropout=None, dropout_offset=None,
    backend=None, threads=None, precision=None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """The gradients of `scaled_dot` from its results and theirs, in O(S) memory.

    `vjp` is the convenient half; this one keeps nothing between the passes but what it is given.

    Parameters
    ----------
    grad_out : array_like, (..., Hq, Sq, Dv)
        Gradient of a scalar with respect to `out`; rounded to the dtype of `out`.
    q, k, v : array_like
        As they were given to `scaled_dot`.
    out : array_like, (..., Hq, Sq, Dv)
        The first result of ``scaled_dot(..., return_lse=True)``.
    lse : array_like, (..., Hq, Sq)
        The second. With both from the `fastattn.merge` of several sets of keys, and a call of this
        function for each set, come the gradients through the whole.
    grad_lse : array_like, (..., Hq, Sq), optional
        Gradient with respect to `lse`; 0 by default.
    wrt : tuple of {"scale", "bias", "relative_bias", "alibi", "sinks"}, default ()
        The options whose gradients are wanted too. That of a bias of queries x keys is such an
        array itself; one that broadcasts stays as small as it is.
    scale, softcap, bias, relative_bias, alibi, sinks : optional
        As they were given to `scaled_dot`.
    causal, window, q_offset, kv_lengths, spans, mask, block_table : optional
        Likewise.
    dropout, dropout_offset : optional
        Likewise: the same weights are dropped again.
    backend, threads, precision : optional
        As in `scaled_dot`; a backend that has no backward pass is passed over, or an error if it
        is named.

    Returns
    -------
    tuple of ndarray
        ``(dq, dk, dv, *wrt)``. Each has the shape of its array: axes and heads that broadcast or
        are shared are summed. Its dtype is the wider of its array's and of `out`'s, so float64 for
        integers. With a `block_table`, whose pages sequences share, `dk` and `dv` are None.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.

    Notes
    -----
    The weights are recomputed as ``w = exp(score - lse)``, so they are as exact as `lse` is. Where
    that is so large that its rounding shows, and agrees with the one of this call's own keys, its
    row is normalised again, which takes another product of queries and keys. With
    ``delta = (grad_out * out).sum(-1) - grad_lse`` the gradient of the scores is
    ``ds = w * (grad_out @ v.T - delta)``; then ``dv = w.T @ grad_out``, ``dbias = ds``,
    ``dalibi = -sum(ds * abs(i + q_offset - j))``, ``dsinks = -sum(exp(sinks - lse) * delta)``,
    `drelative_bias` sums `ds` along its diagonals, and with
    ``dp = scale * ds * (1 - (capped / softcap)**2)`` ``dq = dp @ k``, ``dk = dp.T @ q`` and
    ``dscale = sum(dp * (q @ k.T)) / scale``: Dao et al. (2022), "FlashAttention", appendix B.2.

    In float32, the gradients of `scale`, `relative_bias`, `alibi` and `sinks` of small problems (up
    to 8192 numbers of a head: its operands and scores, of the whole batch) are found in float64.

    With dropout the weights of ``dv = w.T @ grad_out`` are those that were kept, divided by
    ``1 - rate``, and ``grad_out @ v.T`` is 0 where one was dropped and divided likewise elsewhere.

    A key that no query sees gets a gradient of exactly 0, a query that sees no key too, and what
    they hold reaches no other gradient, NaN or not.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> out, lse = fastattn.scaled_dot(q, k, v, causal=True, return_lse=True)
    >>> dq, dk, dv = fastattn.scaled_dot_backward(out, q, k, v, out, lse, causal=True)

    `dv` is the gradient of ``(out**2).sum() / 2``; a small step along it says so:

    >>> step = 1e-6 * dv
    >>> more = fastattn.scaled_dot(q, k, v + step, causal=True)
    >>> bool(np.isclose((more**2).sum() / 2 - (out**2).sum() / 2, (dv * step).sum(), rtol=1e-4))
    True
    """
    arrays = (grad_out, q, k, v, out, lse, *(() if grad_lse is None else (grad_lse,)))
    key = plan_key(arrays, (
        wrt, scale, softcap, bias, relative_bias, alibi, sinks, causal, window, q_offset,
        kv_lengths, spans, mask, block_table, dropout, dropout_offset, backend, threads, precision,
    ))  # fmt: skip
    plan = plans.get(key)
    if plan:
        return run_plan(plan, arrays, threads)
    problem = make_problem(
        q, k, v, scale, softcap, bias, alibi, sinks,
        causal, window, q_offset, kv_lengths, spans, mask,
        threads=threads, precision=precision, gradients=True, wrt=wrt, block_table=block_table,
        relative_bias=relative_bias,
        dropout=dropout, dropout_offset=dropout_offset,
    )  # fmt: skip
    grads = solve_backward(problem, backend, grad_out, out, lse, grad_lse)
    if key is not None:
        keep_plan(key, _prepare, problem, backend, arrays)
    return grads


def _prepare(problem: Problem, backend: str | None, arrays: tuple):
    """A plan for further passes of this kind, by the backend that serves it, or None."""
    chosen = select(problem, backend, unsupported_backward)
    if not hasattr(chosen, "prepare_backward"):
        return None
    grad_out, _, _, _, *results = arrays
    return chosen.prepare_backward(make_backward_problem(problem, grad_out, *results), arrays)


def solve_backward(
    problem: Problem, backend: str | None, grad_out, out, lse, grad_lse=None, run_backward=None
):
    """The gradients that `problem` asks for, from its results and their gradients."""
    given = make_backward_problem(problem, grad_out, out, lse, grad_lse)
    found = run_backward(given) if run_backward else _by_backend(given, backend)
    without = ("k", "v") if problem.block_table is not None else ()  # sequences share their pages
    return tuple(
        None if gradient.name in without else of_its_array(found[gradient.name], gradient)
        for gradient in problem.gradients
    )


def _by_backend(given: Backward, backend: str | None) -> dict[str, np.ndarray]:
    """By the names of their arguments. Those of parameters of few scores are found in float64."""
    chosen = select(given.problem, backend, unsupported_backward)
    found = chosen.run_backward(given)
    if given.of_few_scores():
        wide, heads = given.in_float64(chosen.run)
        for name, x in chosen.run_backward(wide).items():
            if name == "w" and heads.all():
                found[name] = x
            elif name in PER_HEAD:
                found[name] = np.where(heads.reshape(-1, *[1] * (x.ndim - 1)), x, found[name])
    return found


def of_its_array(x: np.ndarray, gradient: Gradient) -> np.ndarray:
    """`x` summed over the axes along which its array broadcast, in its dtype."""
    lead = x.ndim - len(gradient.shape)
    shape = (1,) * lead + gradient.shape
    axes = tuple(a for a, (n, own) in enumerate(zip(x.shape, shape, strict=True)) if n != own)
    with np.errstate(all="ignore"):
        if axes:
            x = x.sum(axis=axes, keepdims=True)
        return x.reshape(gradient.shape).astype(gradient.dtype, copy=False)
