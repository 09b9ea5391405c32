"""Functions with their gradients: one table of rules, and `vjp`, which applies them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .attention import scaled_dot, solve
from .backward import solve_backward
from .core.arguments import flag
from .core.option_table import check
from .core.problem import Problem, make_problem
from .dispatch import select, unsupported_backward

__all__ = ["Rule", "differentiated", "differentiates", "rule_of", "vjp", "without_out"]


class Rule(NamedTuple):
    """How a function of so many arrays is differentiated."""

    apply: Callable
    least: int
    most: int


_RULES: dict[Any, Rule] = {}


def differentiates(function, least: int = 3, most: int = 3) -> Callable[[Callable], Callable]:
    """Register the decorated rule as the one by which `vjp` differentiates `function`, which takes
    so many positional arguments.

    ``rule(*arrays, wrt, **options)`` returns ``(out, pullback)`` as `vjp` does, and finds what is
    wrong with `wrt` and the options before any work. A rule for a class is one for calls of its
    instances, and gets the instance first.
    """

    def register(rule):
        _RULES[function] = Rule(rule, least, most)
        return rule

    return register


def vjp(function, *arrays, wrt=(), **options) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """Call a function of fastattn and get its gradients as a function of those of its result.

    Parameters
    ----------
    function : callable
        `scaled_dot`, `dot`, `cosine`, `gaussian`, `euclidean`, `additive`, `pool`, `varlen`, `flex`
        (which takes ``score_grad=`` with a `score_mod`), or a
        `MultiHeadAttention`.
    *arrays : array_like
        Its positional arguments.
    wrt : tuple of str, default ()
        The options whose gradients are wanted too: ``"scale"``, ``"bias"``,
        ``"relative_bias"``, ``"alibi"``, ``"sinks"``; of `pool` ``"b"``; of `additive` ``"w_q"``,
        ``"w_k"``, ``"w"`` and ``"b"`` too; of a `MultiHeadAttention` its parameters: ``"w_q"``, ...
    **options
        Of `function`, except ``out``.

    Returns
    -------
    out
        What ``function(*arrays, **options)`` returns: a tuple with ``return_lse=True``,
        ``return_max=True`` or ``return_weights=True``, through which no gradient passes.
    pullback : callable
        ``pullback(grad_out, grad_lse=None)`` is a tuple: the gradient of each positional array in
        order, then of each option named in `wrt`. A gradient has the shape of its array (axes that
        broadcast are summed), and the wider of its array's dtype and the result's. It may be called
        again. It reads the arrays and the result, so neither may be changed before it.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.

    See Also
    --------
    scaled_dot_backward : The formulae.

    Examples
    --------
    A step downhill for half the squared distance of attention from a target:

    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, target = rng.standard_normal((4, 2, 50, 8))
    >>> out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, causal=True)
    >>> dq, dk, dv = pullback(out - target)
    >>> better = fastattn.scaled_dot(q - 0.1 * dq, k - 0.1 * dk, v - 0.1 * dv, causal=True)
    >>> bool(np.sum((better - target) ** 2) < np.sum((out - target) ** 2))
    True

    The gradients of options are named:

    >>> sinks = np.zeros(2)
    >>> out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, sinks=sinks, wrt=("sinks",))
    >>> [gradient.shape for gradient in pullback(out)]
    [(2, 50, 8), (2, 50, 8), (2, 50, 8), (2,)]
    """
    return rule_of(function, _RULES, len(arrays))(*arrays, wrt=wrt, **options)


def rule_of(function, rules: dict[Any, Rule], n_arrays: int) -> Callable:
    """The rule for `function` of so many arrays, or for the class that it is an instance of."""
    try:
        rule = None if isinstance(function, type) else rules.get(function)
    except TypeError:  # not hashable
        rule = None
    given: tuple = ()
    if rule is None and type(function) in rules:
        rule, given = rules[type(function)], (function,)
    if rule is None:
        name = getattr(function, "__name__", repr(function))
        name = f"the class {name}" if isinstance(function, type) else name
        able = ", ".join(known.__name__ for known in rules)
        raise TypeError(f"function: expected one of {able}, got {name}")
    apply, least, most = rule
    if not least <= n_arrays <= most:
        expected = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"arrays: expected {expected}, got {n_arrays}")
    return partial(apply, *given)


@differentiates(scaled_dot)
def _scaled_dot(q, k, v, *, wrt, backend=None, return_lse=False, **options):
    without_out(options)
    check("scaled_dot", options)
    problem = make_problem(q, k, v, gradients=True, wrt=wrt, return_lse=True, **options)
    return differentiated(problem, backend, return_lse)


def without_out(options: dict) -> None:
    """Take ``out`` out of `options`, which must be None there."""
    if options.pop("out", None) is not None:
        raise ValueError("out: expected None, got an array; gradients need the result as it was")


def differentiated(
    problem: Problem, backend: str | None, return_lse: bool, run=None, run_backward=None
):
    """What `vjp` returns for a problem stated with its gradients and its lse. `run` and
    `run_backward` take the place of the backend's, where it is not given the problem as it is.
    """
    return_lse = flag("return_lse", return_lse)
    # What is wrong with the gradients is an error now, not after the forward pass.
    select(problem, backend, unsupported_backward)
    out, lse, *more = solve(problem, backend, None, run)

    def pullback(grad_out, grad_lse=None):
        return solve_backward(problem, backend, grad_out, out, lse, grad_lse, run_backward)

    results = (out, *([lse] if return_lse else []), *more)
    return (out if len(results) == 1 else results), pullback
