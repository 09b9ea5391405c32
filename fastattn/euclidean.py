"""Attention by the distance of queries and keys."""

from __future__ import annotations

from .attention import solve
from .core.arguments import positive
from .core.option_table import check
from .core.problem import DISTANCE, Problem, make_problem
from .core.signatures import attention
from .jvp import has_tangents, pushed_forward, tangents_of
from .vjp import differentiated, differentiates, without_out

__all__ = ["euclidean"]


@attention
def euclidean(q, k, v, *, scale=1.0, out=None, backend=None, **options):
    """Exact softmax attention by distance: the score is ``-scale * |q_i - k_j|``, not squared.

    Parameters
    ----------
    q, k, v : array_like, (..., Hq, Sq, D), (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        As of `fastattn.scaled_dot`.
    scale : float, default 1.0
        Finite and > 0.
    out, backend, **options
        As of `fastattn.scaled_dot`; the ``cuda`` backend cannot.

    Returns
    -------
    out, lse, row_max, weights
        As of `fastattn.scaled_dot`.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, and if `scale` is out of range.

    See Also
    --------
    gaussian : By the squared distance; in many dimensions about as fast as `scaled_dot`.

    Notes
    -----
    The differences are squared and summed as they stand, so the result is as exact far from the
    origin as near it. A distance of 0 has no gradient; `fastattn.vjp` takes 0, as ``torch.cdist``
    does.

    Examples
    --------
    >>> import fastattn
    >>> data = [[1, 2], [4, 6]]
    >>> out, weights = fastattn.euclidean(data, data, data, scale=0.2, return_weights=True)
    >>> weights.round(3)  # exp(-0.2 * 5) beside 1
    array([[0.731, 0.269],
           [0.269, 0.731]])
    """
    check("euclidean", options)
    p = _distances(q, k, v, scale, out=out, **options)
    return solve(p, backend, out)


def _distances(q, k, v, scale, **options) -> Problem:
    return make_problem(
        q, k, v, scale=-positive("scale", scale), score_function=DISTANCE, **options
    )


@differentiates(euclidean)
def _euclidean(q, k, v, *, wrt, scale=1.0, backend=None, return_lse=False, **options):
    without_out(options)
    check("euclidean", options)
    p = _distances(q, k, v, scale, gradients=True, wrt=wrt, return_lse=True, **options)
    results, back = differentiated(p, backend, return_lse)

    def pullback(grad_out, grad_lse=None):
        found = zip(p.gradients, back(grad_out, grad_lse), strict=True)
        return tuple(-x if gradient.name == "scale" else x for gradient, x in found)

    return results, pullback


@has_tangents(euclidean)
def _euclidean_tangents(arrays, tangents, *, scale=1.0, **options):
    scale = -positive("scale", scale)
    p, backend, return_lse = tangents_of(arrays, options, scale=scale, score_function=DISTANCE)
    return pushed_forward(p, tangents, backend, return_lse)
