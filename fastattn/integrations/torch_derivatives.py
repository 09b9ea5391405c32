"""Gradients and tangents of an operator's tensors as functions that autograd differentiates.

With ``J`` the Jacobian of (out, lse) by the operands, gradients are ``J.T @ grads`` and tangents
``J @ tangents``: each is the other's transpose. How they change with the operands is the product of
a Hessian with tangents, and a Hessian is symmetric, so that one operator does for both modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_schema import BACKWARD, OPTIONAL, SECOND, SOURCES, TANGENTS

__all__ = ["Gradients", "named", "names_of", "one_by_one", "options_among", "pushed"]

_N = len(SOURCES)


def names_of(tensors) -> tuple[str, ...]:
    """The names of q, k, v and as many optional tensors as there are."""
    return ("q", "k", "v", *OPTIONAL)[: len(tensors)]


def named(names, tensors) -> dict[str, Tensor]:
    """Those tensors by name that there are."""
    return {name: x for name, x in zip(names, tensors, strict=True) if x is not None}


def options_among(names, needed) -> list[str]:
    """Those of the names, of options, whose gradients are needed."""
    pairs = zip(names, needed, strict=True)
    return [name for name, wanted in pairs if wanted and name in SOURCES[3:]]


def one_by_one(function, info, in_dims, options, tensors):
    """The rule of `torch.vmap`: a call for each place, as slopes and sinks have no leading axes."""
    if not info.batch_size:
        raise NotImplementedError("in_dims: expected an axis of at least 1, got 0")
    dims = in_dims[-len(tensors) :]
    calls = []
    for n in range(info.batch_size):
        own = (x if dim is None else x.select(dim, n) for x, dim in zip(tensors, dims, strict=True))
        calls.append(function(options, *own))
    results = tuple(map(torch.stack, zip(*calls, strict=True)))
    return results, (0,) * len(results)


def pushed(options, tangents: dict[str, Tensor], results, tensors):
    """``J @ tangents``: (tangent of out, tangent of lse)."""
    return _Tangents.apply(options, *map(tangents.get, SOURCES), *results, *tensors)


def _pulled(options, grads, results, tensors, wrt) -> dict[str, Tensor]:
    """``J.T @ grads`` by name; one of the gradients of out and lse may be None."""
    (out, lse), (grad_out, grad_lse) = results, grads
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    given = grad_out, grad_lse, *tensors[:3], out, lse, *tensors[3:]
    found = Gradients.apply({**options, "wrt": wrt}, *given)
    return dict(zip(("q", "k", "v", *wrt), found, strict=True))


def _changed(options, tangents, grads, tensors, wrt) -> dict[str, Tensor]:
    """By name, the tangents of ``J.T @ grads`` where the gradients stay."""
    along = map(tangents.get, SOURCES)
    found = _Second.apply({**options, "wrt": wrt}, *along, *grads, *tensors)
    return dict(zip(("q", "k", "v", *wrt), found, strict=True))


class _Derivative(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)


class Gradients(_Derivative):
    """``J.T @ grads`` of (grad_out, grad_lse, q, k, v, out, lse, *tensors), where out and lse are
    results of the others: of q, k, v and ``options["wrt"]``.
    """

    @staticmethod
    def forward(options, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(x for x in BACKWARD(*tensors, **options) if x is not None)

    @staticmethod
    def vmap(info, in_dims, options, *tensors):
        return one_by_one(Gradients.apply, info, in_dims, options, tensors)

    @staticmethod
    def _parts(ctx):
        options = dict(ctx.options)
        grad_out, grad_lse, q, k, v, out, lse, *more = ctx.saved_tensors
        return options, options.pop("wrt"), (grad_out, grad_lse), (out, lse), (q, k, v, *more)

    @staticmethod
    def backward(ctx, *along):
        options, wrt, grads, results, tensors = Gradients._parts(ctx)
        tangents = named(("q", "k", "v", *wrt), along)
        _, *needed = ctx.needs_input_grad
        of_grads, own, names = [None, None], {}, names_of(tensors)
        if any(needed[:2]) and tangents:
            both = zip(pushed(options, tangents, results, tensors), needed, strict=False)
            of_grads = [x if wanted else None for x, wanted in both]
        needed = needed[2:5] + needed[7:]
        if any(needed) and tangents:
            wanted = options_among(names, needed)
            own = _changed(options, tangents, grads, tensors, wanted)
        q, k, v, *more = map(own.get, names)
        return None, *of_grads, q, k, v, None, None, *more

    @staticmethod
    def jvp(ctx, _, d_grad_out, d_grad_lse, dq, dk, dv, d_out, d_lse, *more):
        options, wrt, grads, results, tensors = Gradients._parts(ctx)
        d_grads, found = (d_grad_out, d_grad_lse), []
        tangents = named(names_of(tensors), (dq, dk, dv, *more))
        if any(x is not None for x in d_grads):
            found.append(_pulled(options, d_grads, results, tensors, wrt))
        if tangents:
            found.append(_changed(options, tangents, grads, tensors, wrt))
        return tuple(sum(x[name] for x in found) for name in ("q", "k", "v", *wrt))


class _Tangents(_Derivative):
    """``J @ tangents`` of (*tangents of `SOURCES`, out, lse, q, k, v, *tensors), where out and lse
    are results of the others.
    """

    @staticmethod
    def forward(options, *given):
        with torch._C._AutoDispatchBelowAutograd():
            return TANGENTS(*given[:_N], *given[_N + 2 :], **options)

    @staticmethod
    def vmap(info, in_dims, options, *given):
        return one_by_one(_Tangents.apply, info, in_dims, options, given)

    @staticmethod
    def backward(ctx, *grads):
        given, (_, *needed) = ctx.saved_tensors, ctx.needs_input_grad
        tangents, results, tensors = given[:_N], given[_N : _N + 2], given[_N + 2 :]
        of_tangents, own, names = {}, {}, names_of(tensors)
        some = any(x is not None for x in grads)
        if some and any(needed[:_N]):
            wanted = options_among(SOURCES, needed[:_N])
            of_tangents = _pulled(ctx.options, grads, results, tensors, wanted)
        if some and any(needed[_N + 2 :]):
            wanted = options_among(names, needed[_N + 2 :])
            along = named(SOURCES, tangents)
            own = _changed(ctx.options, along, grads, tensors, wanted)
        needs = zip(SOURCES, needed, strict=False)
        of_tangents = [of_tangents.get(name) if wanted else None for name, wanted in needs]
        return None, *of_tangents, None, None, *map(own.get, names)

    @staticmethod
    def jvp(ctx, _, *moved):
        if any(x is not None for x in moved[_N + 2 :]):
            raise NotImplementedError(
                "scaled_dot: there is no forward mode of forward mode; torch.func.hessian gives "
                "second derivatives"
            )
        given = ctx.saved_tensors
        along = named(SOURCES, moved[:_N])
        return pushed(ctx.options, along, given[_N : _N + 2], given[_N + 2 :])


class _Second(_Derivative):
    """The product of the Hessian of ``sum(grads * results)`` with tangents, of (*tangents,
    grad_out, grad_lse, q, k, v, *tensors).
    """

    @staticmethod
    def forward(options, *given):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(x for x in SECOND(*given, **options) if x is not None)

    @staticmethod
    def vmap(info, in_dims, options, *given):
        return one_by_one(_Second.apply, info, in_dims, options, given)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("scaled_dot: there is no third derivative")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("scaled_dot: there is no third derivative")
