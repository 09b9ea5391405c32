"""Tangents and gradients of one operator as primitives of `jax`: linear, each the transpose of
another, and differentiable.

With ``J`` the Jacobian of (out, lse) by the arrays, tangents are ``J @ tangents`` and gradients
``J.T @ grads``. How gradients change with the arrays is the product of a Hessian with tangents; a
Hessian is symmetric, so that product is its own transpose. How tangents change is never computed,
its transpose is that product again.

The operands of a primitive have the axes ``batch`` of `jax.vmap` in front, of length 1 where they
are not mapped; what a primitive is linear in, and its results, have them in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import fastattn

from ..core.option_table import OPTIONS, PARTS
from ..dispatch import select, unsupported_backward
from ..jvp import solve_forward_mode, solve_second_order

if TYPE_CHECKING:
    from .jax_operators import Call

__all__ = ["DIFFERENTIABLE", "tangents_of"]

_REFUSED = (
    "scaled_dot: there is no forward mode of forward mode; jax.hessian gives second derivatives"
)
# By the names of the operands: those of options are parts of them.
DIFFERENTIABLE = tuple(name for name, part in PARTS.items() if OPTIONS[part.option].differentiable)


def tangents_of(call: Call, tangents: dict[str, Any], arrays, out, lse) -> list[jax.Array]:
    """``[tangent of out, tangent of lse]`` along those of the arrays, by name."""
    return _tangents.bind(
        *tangents.values(), *arrays, out, lse, call=call, moving=tuple(tangents), batch=()
    )


def _primitive(name: str, callback, result_shapes, n_linear) -> Primitive:
    """One whose results, of ``result_shapes(operands, **params)`` without the batch, are filled by
    ``callback(params, context, results, *buffers)``, or without one refused; it is linear in the
    first ``n_linear(**params)`` operands.
    """
    primitive = Primitive(f"fastattn_{name}")
    primitive.multiple_results = True

    def results(operands, batch, params):
        own = [jax.ShapeDtypeStruct(x.shape[len(batch) :], x.dtype) for x in operands]
        return [(batch + x.shape, x.dtype) for x in result_shapes(own, **params)]

    @primitive.def_abstract_eval
    def _abstract(*operands, batch, **params):
        return [jax.core.ShapedArray(*x) for x in results(operands, batch, params)]

    def run(*operands, batch, **params):
        if callback is None:
            raise NotImplementedError(_REFUSED)
        shapes = [jax.ShapeDtypeStruct(*x) for x in results(operands, batch, params)]
        return buffer_callback(partial(callback, {"batch": batch, **params}), shapes)(*operands)

    def batched(operands, dims, *, batch, **params):
        pairs = list(zip(operands, dims, strict=True))
        n = next(x.shape[dim] for x, dim in pairs if dim is not None)
        batch = (n, *batch)
        operands = [
            jax.numpy.expand_dims(x, 0) if dim is None else jax.numpy.moveaxis(x, dim, 0)
            for x, dim in pairs
        ]
        linear = n_linear(**params)
        operands[:linear] = (_in_full(x, batch) for x in operands[:linear])
        found = primitive.bind(*operands, batch=batch, **params)
        return found, [0] * len(found)

    static = ("batch", "call", "moving", "turning", "wrt")
    primitive.def_impl(jax.jit(run, static_argnames=static))  # which compiles once
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    _set(batching.primitive_batchers, primitive, batched)
    return primitive


def _set(rules, primitive, rule) -> None:
    """Add to a table of JAX's; the stand-in for JAX, where documentation is built without it, takes
    calls alone.
    """
    rules.__setitem__(primitive, rule)


def _in_full(x, batch):
    return jax.numpy.broadcast_to(x, batch + x.shape[len(batch) :])


def _parts(names) -> tuple[str, ...]:
    return tuple(name for name in names if name in DIFFERENTIABLE)


def _options_of(parts) -> tuple[str, ...]:
    return tuple(PARTS[name].option for name in parts)


def _given(names, values) -> dict[str, Any]:
    """By name those that are no symbolic zeros, of what can be differentiated."""
    pairs = zip(names, values, strict=True)
    able = ("q", "k", "v", *DIFFERENTIABLE)
    return {name: x for name, x in pairs if name in able and type(x) is not ad.Zero}


# ------------------------------------------------------------------------------ what they compute


def _places(call: Call, batch, results, buffers) -> Iterator[tuple[list, list]]:
    """``(results, operands)`` as arrays that are XLA's own memory: all of the batch at once, or its
    places one by one where an operand of `fastattn.scaled_dot` has no leading axes.
    """
    found = [np.asarray(x) for x in results]
    arrays = [np.asarray(x) for x in buffers]
    arrays = [np.broadcast_to(x, batch + x.shape[len(batch) :]) for x in arrays]
    for place in np.ndindex(batch) if call.vmap_method == "sequential" else ((),):
        yield [x[place] for x in found], [x[place] for x in arrays]


def _run_tangents(params, context, results, *buffers) -> None:
    call, moving = params["call"], params["moving"]
    for found, operands in _places(call, params["batch"], results, buffers):
        tangents, arrays = _swapped(call, moving, operands), operands[len(moving) : -2]
        d_out, d_lse = solve_forward_mode(call.problem_of(arrays), tangents)
        found[0][...], found[1][...] = call.swapped(d_out), d_lse


def _run_gradients(params, context, results, *buffers) -> None:
    call, wrt = params["call"], params["wrt"]
    for found, operands in _places(call, params["batch"], results, buffers):
        grad_out, grad_lse, *arrays, out, lse = operands
        grads = fastattn.scaled_dot_backward(
            call.swapped(grad_out), **call.words(arrays), out=call.swapped(out), lse=lse,
            grad_lse=grad_lse, wrt=_options_of(wrt), backend=call.backend,
        )  # fmt: skip
        _fill(call, wrt, found, grads)


def _run_second(params, context, results, *buffers) -> None:
    call, moving, wrt = params["call"], params["moving"], params["wrt"]
    for found, operands in _places(call, params["batch"], results, buffers):
        tangents = _swapped(call, moving, operands)
        grad_out, grad_lse, *arrays = operands[len(moving) :]
        p = call.problem_of(arrays, gradients=True, wrt=_options_of(wrt))
        _fill(call, wrt, found, solve_second_order(p, tangents, call.swapped(grad_out), grad_lse))


def _swapped(call: Call, names, arrays) -> dict[str, np.ndarray]:
    """The tangents of q, k and v in the layout of `fastattn.scaled_dot`, those of others by the
    names of their options.
    """
    pairs = zip(names, arrays, strict=False)
    return dict(
        (name, call.swapped(x)) if name in "qkv" else (PARTS[name].option, x) for name, x in pairs
    )


def _fill(call: Call, wrt, results: Sequence[np.ndarray], grads) -> None:
    for result, grad, name in zip(results, grads, ("q", "k", "v", *wrt), strict=True):
        result[...] = call.swapped(grad) if name in "qkv" else grad


# ------------------------------------------------------------------------------------ primitives

_tangents = _primitive(
    "tangents", _run_tangents, lambda operands, **_: operands[-2:],
    lambda *, moving, **_: len(moving),
)  # fmt: skip


def _sources(call: Call, wrt, arrays):
    named = dict(zip(call.names, arrays, strict=True))
    return [named[name] for name in ("q", "k", "v", *wrt)]


_gradients = _primitive(
    "gradients", _run_gradients,
    lambda operands, *, call, wrt: _sources(call, wrt, operands[2:-2]), lambda **_: 2,
)  # fmt: skip
_second = _primitive(
    "second", _run_second,
    lambda operands, *, call, moving, wrt: _sources(call, wrt, operands[len(moving) + 2 :]),
    lambda *, moving, **_: len(moving),
)  # fmt: skip
# The tangent of `_tangents`, along tangents of the arrays: linear in these.
_bent = _primitive(
    "bent", None, lambda operands, **_: operands[-2:], lambda *, turning, **_: len(turning)
)


def _tangents_transpose(cts, *operands, call, moving, batch):
    linear, (*arrays, out, lse) = operands[: len(moving)], operands[len(moving) :]
    grads = _instantiated(cts, out, lse, batch)
    wrt = _parts(moving)
    blank = [jax.ShapeDtypeStruct(x.shape[len(batch) :], x.dtype) for x in arrays]
    problem = call.make_problem(blank, gradients=True, wrt=_options_of(wrt))
    select(problem, call.backend, unsupported_backward)
    found = _gradients.bind(*grads, *arrays, out, lse, call=call, wrt=wrt, batch=batch)
    return *_of_linear(moving, linear, wrt, found), *[None] * (len(arrays) + 2)


def _gradients_transpose(cts, *operands, call, wrt, batch):
    linear, (*arrays, out, lse) = operands[:2], operands[2:]
    along = _given(("q", "k", "v", *wrt), cts)
    found = _tangents.bind(
        *along.values(), *arrays, out, lse, call=call, moving=tuple(along), batch=batch
    )
    pairs = zip(found, linear, strict=True)
    found = [x if ad.is_undefined_primal(own) else None for x, own in pairs]
    return *found, *[None] * (len(arrays) + 2)


def _second_transpose(cts, *operands, call, moving, wrt, batch):
    linear, rest = operands[: len(moving)], operands[len(moving) :]
    if any(map(ad.is_undefined_primal, rest)):
        raise NotImplementedError(_REFUSED)
    along, own = _given(("q", "k", "v", *wrt), cts), _parts(moving)
    found = _second.bind(
        *along.values(), *rest, call=call, moving=tuple(along), wrt=own, batch=batch
    )
    return *_of_linear(moving, linear, own, found), *[None] * len(rest)


def _bent_transpose(cts, *operands, call, turning, moving, batch):
    n = len(turning)
    linear, rest = operands[:n], operands[n:]
    tangents, (*arrays, out, lse) = rest[: len(moving)], rest[len(moving) :]
    grads, wrt = _instantiated(cts, out, lse, batch), _parts(turning)
    found = _second.bind(*tangents, *grads, *arrays, call=call, moving=moving, wrt=wrt, batch=batch)
    return *_of_linear(turning, linear, wrt, found), *[None] * len(rest)


def _instantiated(cts, out, lse, batch):
    return [
        jax.numpy.zeros(batch + x.shape[len(batch) :], x.dtype) if type(ct) is ad.Zero else ct
        for ct, x in zip(cts, (out, lse), strict=True)
    ]


def _of_linear(names, linear, wrt, found) -> list:
    """The gradients of the linear operands, None for those that are known."""
    by_name = dict(zip(("q", "k", "v", *wrt), found, strict=True))
    pairs = zip(names, linear, strict=True)
    return [by_name[name] if ad.is_undefined_primal(x) else None for name, x in pairs]


def _tangents_jvp(primals, tangents, *, call, moving, batch):
    n = len(moving)
    params = {"call": call, "batch": batch}
    found = _tangents.bind(*primals, moving=moving, **params)
    turning = _given(call.names, tangents[n:-2])
    changes = []
    if linear := _given(moving, tangents[:n]):
        changes.append(
            _tangents.bind(*linear.values(), *primals[n:], moving=tuple(linear), **params)
        )
    if turning:
        full = (_in_full(x, batch) for x in turning.values())
        changes.append(_bent.bind(*full, *primals, turning=tuple(turning), moving=moving, **params))
    return found, _sum(changes)


def _gradients_jvp(primals, tangents, *, call, wrt, batch):
    params = {"call": call, "wrt": wrt, "batch": batch}
    found, changes = _gradients.bind(*primals, **params), []
    if any(type(x) is not ad.Zero for x in tangents[:2]):
        grads = map(ad.instantiate_zeros, tangents[:2])
        changes.append(_gradients.bind(*grads, *primals[2:], **params))
    if along := _given(call.names, tangents[2:-2]):
        full = (_in_full(x, batch) for x in along.values())
        changes.append(_second.bind(*full, *primals[:-2], moving=tuple(along), **params))
    return found, _sum(changes)


def _no_third(primals, tangents, **params):
    raise NotImplementedError("scaled_dot: there is no third derivative")


def _sum(changes):
    return [sum(each[1:], start=each[0]) for each in zip(*changes, strict=True)]


for _primitive_of, _jvp, _transpose in (
    (_tangents, _tangents_jvp, _tangents_transpose),
    (_gradients, _gradients_jvp, _gradients_transpose),
    (_second, _no_third, _second_transpose),
    (_bent, _no_third, _bent_transpose),
):
    _set(ad.primitive_jvps, _primitive_of, _jvp)
    _set(ad.primitive_transposes, _primitive_of, _transpose)
