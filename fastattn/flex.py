"""Attention with the user's own functions in the kernel."""

from __future__ import annotations

from .attention import solve
from .core.arguments import flag
from .core.option_table import check
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .jvp import has_tangents, pushed_forward, without_weights
from .vjp import differentiated, differentiates, without_out

__all__ = ["flex"]


@attention
def flex(
    q, k, v, score_mod=None, mask_mod=None, *,
    block_mask=None, score_grad=None, backend=None, **options,
):  # fmt: skip
    """Exact softmax attention with user functions for the scores and the mask.

    Parameters
    ----------
    q, k, v : array_like
        As of `fastattn.scaled_dot`.
    score_mod : function (score, batch, head, i, j) -> score, optional
        Changes the score of row `i` of `q` (without `q_offset`) and row `j` of `k`, after scale,
        softcap, bias and alibi. `batch` is the flattened leading index, 0 if there is none. A
        score of ``-inf`` hides the key.
    mask_mod : function (batch, head, i, j) -> bool, optional
        Hides the key where it is False.
    block_mask : BlockMask, optional
        Of `mask_mod`, which need not be given too: hidden blocks are skipped, and the function is
        not called where all of a block is visible. See `fastattn.block_mask`.
    score_grad : function (score, batch, head, i, j) -> real, optional
        The derivative of `score_mod` by its score, of the arguments that `score_mod` gets, for
        ``fastattn.vjp(fastattn.flex, ...)`` and ``fastattn.jvp``; ignored here.
    backend, **options
        As of `fastattn.scaled_dot`; a key must be seen by the options and by `mask_mod`.

    Returns
    -------
    out, lse, row_max, weights
        As of `fastattn.scaled_dot`.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, and where Numba cannot compile a function: the message tells
        Numba's reason.

    Notes
    -----
    The functions are made part of the kernel, over the lanes of vectors, so keep them to
    arithmetic. `math.tanh` and `math.exp` would be called one score at a time:
    `fastattn.vectormath` has others. Plain functions are compiled by Numba's ``njit``; the kernel
    is compiled once per function, in some seconds, and the last 32 are kept, so define a function
    once rather than at each call. Arrays that it closes over count as constants: later changes may
    go hidden. It may be called for pairs of rows that are hidden by other means, never for rows
    that do not exist.

    The idea is that of Dong et al. (2024), "Flex Attention: A Programming Model for Generating
    Optimized Attention Kernels".

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((4, 100, 32), np.float32) for _ in range(3))
    >>> table = rng.standard_normal((4, 199), np.float32)
    >>> def relative_position(score, batch, head, i, j):
    ...     return score + table[head, i - j + 99]
    >>> fastattn.flex(q, k, v, relative_position, causal=True).shape
    (4, 100, 32)
    """
    problem = _problem(q, k, v, score_mod, mask_mod, block_mask, score_grad, options)
    return solve(problem, backend, options.get("out"))


def _problem(q, k, v, score_mod, mask_mod, block_mask, score_grad, options, **more) -> Problem:
    check("flex", options)
    return make_problem(
        q, k, v, score_mod=score_mod, mask_mod=mask_mod, block_mask=block_mask,
        score_grad=score_grad, **options, **more,
    )  # fmt: skip


@differentiates(flex, 3, 5)
def _flex(
    q, k, v, score_mod=None, mask_mod=None, *,
    wrt, block_mask=None, score_grad=None, backend=None, return_lse=False, **options,
):  # fmt: skip
    without_out(options)
    _check_score_grad(score_mod, score_grad)
    problem = _problem(
        q, k, v, score_mod, mask_mod, block_mask, score_grad, options,
        gradients=True, wrt=wrt, return_lse=True,
    )  # fmt: skip
    return differentiated(problem, backend, return_lse)


@has_tangents(flex)
def _flex_tangents(
    arrays, tangents, *, score_mod=None, mask_mod=None, block_mask=None, score_grad=None,
    backend=None, return_lse=False, **options,
):  # fmt: skip
    without_out(options)
    without_weights(options)
    _check_score_grad(score_mod, score_grad)
    problem = _problem(
        *arrays, score_mod, mask_mod, block_mask, score_grad, options, return_lse=True
    )
    return pushed_forward(problem, tangents, backend, flag("return_lse", return_lse))


def _check_score_grad(score_mod, score_grad) -> None:
    if score_mod is not None and score_grad is None:
        raise ValueError(
            "score_grad: expected the derivative of score_mod by its score, a function of the same "
            "arguments, got None"
        )
