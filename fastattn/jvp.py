"""Forward mode: functions with their derivative along tangents of their arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .attention import scaled_dot, solve
from .backends.numpy.second_order import run_second_order
from .backward import of_its_array
from .core.arguments import flag, plain, shaped
from .core.option_table import check
from .core.options import bias_array, per_head, relative_bias_array
from .core.problem import Problem, make_problem
from .dispatch import named, select, unsupported_forward_mode
from .vjp import Rule, rule_of, without_out

__all__ = [
    "has_tangents",
    "jvp",
    "pushed_forward",
    "solve_forward_mode",
    "solve_second_order",
    "tangents_of",
    "without_weights",
]

_RULES: dict[Any, Rule] = {}


def has_tangents(function, least: int = 3, most: int = 3) -> Callable[[Callable], Callable]:
    """Register the decorated rule as the one by which `jvp` pushes tangents through `function`, of
    which so many arrays have some.

    ``rule(arrays, tangents, **options)`` returns ``(out, tangent)`` as `jvp` does; the tangents are
    checked: arrays of their array's shape, or None. A rule for a class is one for calls of its
    instances, and gets the instance first.
    """

    def register(rule):
        _RULES[function] = Rule(rule, least, most)
        return rule

    return register


def jvp(function, arrays, tangents, **options) -> tuple[Any, Any]:
    """Call a function of fastattn and get its derivative along tangents of its arrays.

    Parameters
    ----------
    function : callable
        `scaled_dot`, `dot`, `cosine`, `gaussian`, `euclidean`, `additive`, `pool`, `varlen`, `flex`
        (which takes ``score_grad=`` with a `score_mod`), or a `MultiHeadAttention`.
    arrays : sequence of array_like
        Its arrays: q, k and v, those of `pool`, or query, key and value of a layer, as many as it
        is given. They lie in the host's memory.
    tangents : sequence of array_like or None
        One for each array, of its shape and any real dtype; None stands for zeros and costs
        nothing. Options have no tangents.
    **options
        Of `function`, except ``out``, ``return_max`` and ``return_weights``.

    Returns
    -------
    out
        What ``function(*arrays, **options)`` returns; a tuple with ``return_lse=True``.
    tangent
        ``d out``, with ``d lse`` in a tuple where `out` is one; each of its result's shape and
        dtype.

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name.

    See Also
    --------
    vjp : Reverse mode, for the gradient of a scalar.

    Notes
    -----
    With weights ``w`` and ``ds`` the tangent of the scores, ``dlse = sum(w * ds)`` and
    ``dout = (w * ds) @ v + w @ dv - dlse * out``: one pass over tiles in O(S) memory. The compiled
    kernels compute `out` and its tangent together, by multiply-adds, where an ordinary call may use
    bfloat16 hardware. NumPy and its BLAS compute the tangents of other scores than dot products,
    and under a sparse mask.

    Examples
    --------
    The derivative along `dq` is what a small step finds:

    >>> import numpy as np
    >>> import fastattn
    >>> q, k, v, dq = np.random.default_rng(0).standard_normal((4, 2, 50, 8))
    >>> out, tangent = fastattn.jvp(fastattn.scaled_dot, (q, k, v), (dq, None, None), causal=True)
    >>> stepped = fastattn.scaled_dot(q + 1e-6 * dq, k, v, causal=True)
    >>> bool(np.allclose((stepped - out) / 1e-6, tangent, atol=1e-5))
    True
    """
    arrays, tangents = _sequence("arrays", arrays), _sequence("tangents", tangents)
    rule = rule_of(function, _RULES, len(arrays))
    if len(tangents) != len(arrays):
        raise ValueError(f"tangents: expected {len(arrays)}, one for each array, "
                         f"got {len(tangents)}")  # fmt: skip
    arrays = tuple(plain(f"arrays[{n}]", x) for n, x in enumerate(arrays))
    pairs = enumerate(zip(arrays, tangents, strict=True))
    return rule(arrays, tuple(_tangent(f"tangents[{n}]", t, x) for n, (x, t) in pairs), **options)


def _sequence(name, value) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple or a list, got {type(value).__name__}")
    return tuple(value)


def _tangent(name, value, x):
    if value is None:
        return None
    return shaped(name, value, x.shape)


@has_tangents(scaled_dot)
def _scaled_dot(arrays, tangents, **options):
    p, backend, return_lse = tangents_of(arrays, options)
    return pushed_forward(p, tangents, backend, return_lse)


def tangents_of(arrays, options: dict, **more) -> tuple[Problem, str | None, bool]:
    """``(problem, backend, return_lse)`` of a call whose results are to have tangents; `options`
    are those of `fastattn.scaled_dot`, `more` what the call is besides.
    """
    check("scaled_dot", options)
    without_out(options)
    without_weights(options)
    backend = options.pop("backend", None)
    return_lse = flag("return_lse", options.pop("return_lse", False))
    q, k, v = arrays
    return make_problem(q, k, v, return_lse=True, **options, **more), backend, return_lse


def without_weights(options: dict) -> None:
    """Take ``return_weights`` and ``return_max`` out of `options`, which must be False there."""
    for name, what in (("return_weights", "weights"), ("return_max", "largest scores")):
        if flag(name, options.pop(name, False)):
            raise ValueError(f"{name}: expected False, as {what} have no tangents, got True")


def pushed_forward(
    p: Problem, tangents, backend, return_lse: bool, run=None, run_forward_mode=None
):
    """``(out, tangent)`` of a problem, stated with its lse, whose q, k and v have these tangents.
    `run` and `run_forward_mode` take the place of the backends', where these are not given the
    problem as it is.
    """
    along = dict(zip("qkv", tangents, strict=True))
    if run is run_forward_mode is None:
        chosen = select(p, backend)
        if hasattr(chosen, "run_dual") and unsupported_forward_mode(chosen, p) is None:
            return _dual(p, along, chosen.run_dual, return_lse)
    # What is wrong with the tangents is an error now, not after the forward pass.
    push = run_forward_mode or _pushes(p, backend)
    out, lse = solve(p, backend, None, run)
    d_out, d_lse = solve_forward_mode(p, along, push)
    return ((out, lse), (d_out, d_lse)) if return_lse else (out, d_out)


def _dual(p: Problem, tangents, run_dual, return_lse: bool):
    """The same in one pass."""
    out = p.new_result()
    lse, d_out, d_lse = run_dual(p, _operands(p, tangents), out)
    if p.one_head:
        out, lse, d_out, d_lse = out[0], lse[0], d_out[0], d_lse[0]
    return ((out, lse), (d_out, d_lse)) if return_lse else (out, d_out)


def _pushes(p: Problem, backend: str | None = None) -> Callable:
    """What computes the tangents of `p`: the backend that was named for the result if it can."""
    if backend is not None and unsupported_forward_mode(named(backend), p) is None:
        return named(backend).run_forward_mode
    return select(p, None, unsupported_forward_mode, any_one=True).run_forward_mode


def solve_forward_mode(p: Problem, tangents: dict[str, Any], run_forward_mode=None):
    """``(tangent of out, tangent of lse)`` along the tangents, None for zeros, of q, k, v, scale,
    bias, relative_bias, alibi and sinks, each of its argument's shape.
    """
    push = run_forward_mode or _pushes(p)
    d_out, d_lse = push(p, _operands(p, tangents))
    return (d_out[0], d_lse[0]) if p.one_head else (d_out, d_lse)


def solve_second_order(p: Problem, tangents: dict[str, Any], grad_out, grad_lse=None):
    """The tangents, along those of the arguments as in `solve_forward_mode`, of the gradients that
    `p` asks for; `grad_out` and `grad_lse`, of which either may be None for zeros, stay.
    """
    shapes = p.rows(p.value_dim), p.rows()
    grads = [
        np.zeros(shape, p.accumulator) if x is None else x.reshape(shape)
        for x, shape in zip((grad_out, grad_lse), shapes, strict=True)
    ]
    found = run_second_order(p, _operands(p, tangents), *grads)
    return tuple(of_its_array(found[gradient.name], gradient) for gradient in p.gradients)


def _operands(p: Problem, tangents: dict[str, Any]) -> dict[str, Any]:
    """The tangents that are not zero, as the problem holds their operands."""
    return {name: _operand(p, name, t) for name, t in tangents.items() if t is not None}


def _operand(p: Problem, name: str, tangent):
    if name == "bias":
        return bias_array(tangent, p.rows(p.n_keys), p.q)
    if name == "relative_bias":
        return relative_bias_array(tangent, p.heads, p.accumulator)
    if name == "scale":
        tangent = np.broadcast_to(tangent, (p.heads,))
    if name in ("scale", "alibi", "sinks"):
        return per_head(name, tangent, p.heads, p.accumulator)
    return tangent.reshape(getattr(p, name).shape)
