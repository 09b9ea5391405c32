"""The operators ``torch.ops.fastattn.scaled_dot`` and ``scaled_dot_backward``, registered when this
is imported, with what autograd and `torch.compile` need to know of them.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn

from ..core.option_table import OPTIONS, joined, split
from ..core.problem import Problem, make_problem
from ..jvp import solve_forward_mode, solve_second_order
from .torch_derivatives import Gradients, named, names_of, one_by_one, options_among, pushed
from .torch_schema import BACKWARD, FORWARD, LIBRARY, OPTIONAL, SOURCES, WORDS
from .torch_tensors import (
    alike,
    array,
    as_tensor,
    autocast,
    check_constant,
    check_tensors,
    empty_result,
    laid_out,
    tensor,
    transforms,
)

__all__ = ["attend", "new_seed"]

_CONSTANTS = {name for name, option in OPTIONS.items() if not option.takes_arrays}


def attend(q, k, v, **options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, lse, row_max)`` of `fastattn.scaled_dot`, whose options may be tensors.

    What is not asked for may be empty or None.
    """
    if _any_autocast() and torch.is_autocast_enabled("cpu"):
        q, k, v = map(autocast, (q, k, v))
    compiling = _is_compiling()
    given = [q, k, v]
    for name, x in options.items():
        if isinstance(x, Tensor):
            if name in _CONSTANTS:
                check_constant(name, x)
            given.append(x)
    gradient = _needs_gradient(given)
    straight = not compiling and _straight_to_cpu(given)
    if straight and not gradient:
        return _run(q, k, v, options)
    if not (compiling or straight):
        check_tensors(options, q=q, k=k, v=v)
    tensors, values = _operands(options)
    if not compiling and (gradient or transforms()):
        values.pop("return_lse", None)
        found = _attention(values, q, k, v, *tensors)  # as the dispatcher, 5 us earlier
        return found if len(found) == 3 else (*found, None)
    if gradient:
        values["return_lse"] = True  # the way back starts from it
    return FORWARD(q, k, v, *tensors, **values)


_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_profiles = torch._C._autograd._profiler_enabled
_listeners = torch._C._dispatch_tls_local_include_set
_NOBODY = {_listeners().raw_repr(), torch.inference_mode()(_listeners)().raw_repr()}
_ORDINARY = {Tensor, torch.nn.Parameter}


def _needs_gradient(tensors) -> bool:
    if forward_ad._current_level >= 0:
        return True  # a tangent may be asked for
    if torch.is_grad_enabled():
        for x in tensors:  # `any` takes three times as long for a few
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _straight_to_cpu(tensors) -> bool:
    """Would the dispatcher, beneath autograd, do nothing but call the CPU's kernel? It takes 6 us
    to get there; in a model, whose weights drive its code out of the caches, three times as long.
    """
    for x in tensors:
        if x is not None and not (type(x) in _ORDINARY and x.is_cpu):
            return False
    return _listeners().raw_repr() in _NOBODY and not _profiles()


def _operands(options: dict[str, Any]) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Options as the operators take them: optional tensors in their order, to the last one given,
    and values.
    """
    arrays, values = split(options)
    seed = arrays.get("seed")
    if seed is not None and not isinstance(seed, Tensor):
        seed = int(seed)
        arrays["seed"] = torch.tensor(seed if seed < 1 << 63 else seed - (1 << 64))
    tensors: list[Tensor | None] = []  # each None costs autograd 0.3 us
    for place, name in enumerate(OPTIONAL):
        if name in arrays:
            tensors += [None] * (place - len(tensors))
            tensors.append(as_tensor(arrays[name], WORDS[name]))
    return tensors, values


def new_seed() -> Tensor:
    """A seed of dropout, from torch's generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


def _forward(q, k, v, *tensors, **options):
    out, *sums = _run(q, k, v, _words(tensors, options))
    return out, *(out.new_empty(0, dtype=_sums(out)) if x is None else x for x in sums)


def _run(q, k, v, options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    for name, x in options.items():
        if isinstance(x, Tensor):
            options[name] = array(x, name)
    if options.get("dropout") is not None:
        options["dropout"] = _with_number(options["dropout"])
    found = fastattn.scaled_dot(array(q, "q"), array(k, "k"), array(v, "v"), **options)
    found, *sums = found if isinstance(found, tuple) else (found,)
    out = tensor(found)
    if not q.is_contiguous() and (q.stride(-1) != 1 or not alike(out, q)):
        out = laid_out(out, empty_result(q, k, v))
    if not sums:
        return out, None, None
    lse = tensor(sums[0]) if options.get("return_lse") else None
    return out, lse, tensor(sums[-1]) if options.get("return_max") else None


def _with_number(dropout):
    """`dropout` with a seed that is a number."""
    if not isinstance(dropout, (tuple, list)) or len(dropout) != 2:
        return dropout
    rate, seed = dropout
    return rate, _seed(seed) if isinstance(seed, Tensor) else seed


def _seed(x) -> int:
    try:
        return operator.index(x) % (1 << 64)
    except TypeError:
        what = f"{x.dtype} of shape {tuple(x.shape)}"
        raise TypeError(f"dropout: expected a seed that is one integer, got {what}") from None


def _forward_fake(q, k, v, *tensors, return_lse=False, return_max=False, **options):
    out = empty_result(q, k, v)
    shapes = (out.shape[:-1] if wanted else 0 for wanted in (return_lse, return_max))
    return out, *(out.new_empty(shape, dtype=_sums(out)) for shape in shapes)


def _sums(out) -> torch.dtype:
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _backward(grad_out, grad_lse, q, k, v, out, lse, *tensors, wrt, **options):
    named = {"grad_out": grad_out, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    grads = fastattn.scaled_dot_backward(
        *(array(x, name) for name, x in named.items()),
        grad_lse=None if grad_lse is None else array(grad_lse, "grad_lse"),
        wrt=tuple(map(WORDS.get, wrt)),
        **_words(tensors, options),
    )
    return _like_sources(grads, _sources(q, k, v, tensors, wrt))


def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, *tensors, wrt, **options):
    found = map(torch.empty_like, _sources(q, k, v, tensors, wrt).values())
    return _in_order(wrt, found)


def _tangents(*given, **options):
    tangents, (q, k, v, *tensors) = given[: len(SOURCES)], given[len(SOURCES) :]
    p = _problem(q, k, v, _words(tensors, options))
    d_out, d_lse = solve_forward_mode(p, _along(tangents))
    return laid_out(tensor(d_out), empty_result(q, k, v)), tensor(d_lse)


def _tangents_fake(*given, **options):
    return _forward_fake(*given[len(SOURCES) :], return_lse=True)[:2]


def _second(*given, wrt, **options):
    tangents, given = given[: len(SOURCES)], given[len(SOURCES) :]
    grad_out, grad_lse, q, k, v, *tensors = given
    sources = _sources(q, k, v, tensors, wrt)
    own = tuple(map(WORDS.get, wrt))
    p = _problem(q, k, v, _words(tensors, options), gradients=True, wrt=own)
    grads = (None if x is None else array(x, "grad") for x in (grad_out, grad_lse))
    return _like_sources(solve_second_order(p, _along(tangents), *grads), sources)


def _second_fake(*given, wrt, **options):
    grad_out, grad_lse, q, k, v, *tensors = given[len(SOURCES) :]
    return _backward_fake(grad_out, grad_lse, q, k, v, None, None, *tensors, wrt=wrt)


def _problem(q, k, v, words: dict[str, Any], **more: Any) -> Problem:
    words.pop("backend", None)  # tangents are NumPy's
    q, k, v = (array(x, name) for name, x in (("q", q), ("k", k), ("v", v)))
    return make_problem(q, k, v, return_lse=True, **words, **more)


def _along(tangents) -> dict[str, np.ndarray]:
    """The tangents of `SOURCES` as arrays, by the names that `fastattn.scaled_dot` has."""
    pairs = named(SOURCES, tangents).items()
    return {WORDS.get(name, name): array(x, name) for name, x in pairs}


class _ScaledDot(torch.autograd.Function):
    # What torch.library.register_autograd would make, but that takes 100 us to fill in defaults.
    @staticmethod
    def forward(ctx, options, *tensors):
        if _straight_to_cpu(tensors):
            results = _forward(*tensors, return_lse=True, **options)[: _returned(options)]
        else:
            results = _below_autograd(options, *tensors)
        _keep(ctx, options, tensors, results)
        return results

    @staticmethod
    def backward(ctx, grad_out, grad_lse, *_):
        q, k, v, *tensors, out, lse = ctx.saved_tensors
        names = names_of((q, k, v, *tensors))
        wrt = options_among(names, ctx.needs_input_grad[1:])
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        given = (grad_out, grad_lse, q, k, v, out, lse, *tensors)
        options = {"wrt": wrt, **ctx.options}
        if transforms() or forward_ad._current_level >= 0:
            grads = Gradients.apply(options, *given)
        else:
            straight = not torch.is_grad_enabled() and _straight_to_cpu(given)
            grads = (_backward if straight else BACKWARD)(*given, **options)
            grads = [x for x in grads if x is not None]
        found = dict(zip(("q", "k", "v", *wrt), grads, strict=True))
        return None, *map(found.get, names)

    @staticmethod
    def jvp(ctx, _, *tangents):
        *tensors, out, lse = ctx.saved_tensors
        found = pushed(ctx.options, named(names_of(tensors), tangents), (out, lse), tensors)
        return *found, *(None for _ in range(ctx.n_results - 2))


class _Transformed(_ScaledDot):
    """The same in the form that the transforms of torch.func need, which takes 30 us more."""

    @staticmethod
    def forward(options, *tensors):
        return _below_autograd(options, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        options, *tensors = inputs
        _keep(ctx, options, tensors, output)

    @staticmethod
    def vmap(info, in_dims, options, *tensors):
        return one_by_one(_attention, info, in_dims, options, tensors)


def _attention(options, *tensors):
    return (_Transformed if transforms() else _ScaledDot).apply(options, *tensors)


def _returned(options) -> int:
    """How many results there are beside the maximum, or with it."""
    return 3 if options.get("return_max") else 2


def _below_autograd(options, *tensors):
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(*tensors, return_lse=True, **options)[: _returned(options)]


def _keep(ctx, options, tensors, results) -> None:
    ctx.save_for_backward(*tensors, *results[:2])
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors, *results[:2])
    ctx.mark_non_differentiable(*results[2:])
    ctx.options = {name: x for name, x in options.items() if name != "return_max"}
    ctx.n_results = len(results)
    ctx.set_materialize_grads(False)


def _differentiable(*tensors, return_lse=False, **options):
    if _needs_gradient(tensors) or transforms():
        out, lse, *row_max = _attention(options, *tensors)
        nothing = lse.new_empty(0)
        return out, lse if return_lse else nothing, *(row_max or (nothing,))
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(*tensors, return_lse=return_lse, **options)


def _differentiable_backward(*tensors, **options):
    if _needs_gradient(tensors):
        return _in_order(options["wrt"], Gradients.apply(options, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return BACKWARD(*tensors, **options)


LIBRARY.impl("scaled_dot", _forward, "CPU")
LIBRARY.impl("scaled_dot", _differentiable, "Autograd")
LIBRARY.impl("scaled_dot_backward", _backward, "CPU")
LIBRARY.impl("scaled_dot_backward", _differentiable_backward, "Autograd")
LIBRARY.impl("scaled_dot_tangents", _tangents, "CPU")
LIBRARY.impl("scaled_dot_second", _second, "CPU")
torch.library.register_fake("fastattn::scaled_dot", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastattn::scaled_dot_backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("fastattn::scaled_dot_tangents", _tangents_fake, lib=LIBRARY)
torch.library.register_fake("fastattn::scaled_dot_second", _second_fake, lib=LIBRARY)


def _words(tensors, options) -> dict[str, Any]:
    """The words of `fastattn.scaled_dot` for what an operator was given."""
    given = zip(OPTIONAL, tensors, strict=False)
    arrays: dict[str, Any] = {name: array(x, WORDS[name]) for name, x in given if x is not None}
    if "seed" in arrays:
        arrays["seed"] = _seed(arrays["seed"])
    return joined({**arrays, **options})


def _sources(q, k, v, tensors, wrt) -> dict[str, Tensor]:
    """What the gradients are of, by name."""
    named = dict(zip(OPTIONAL, tensors, strict=False))
    return {"q": q, "k": k, "v": v, **{name: named[name] for name in wrt}}


def _like_sources(grads, sources: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the sources as the operator returns them; autograd wants each like its
    source, in dtype too.
    """
    found = []
    for grad, source in zip(map(tensor, grads), sources.values(), strict=True):
        same = alike(grad, source)
        found.append(grad if same else laid_out(grad, torch.empty_like(source)))
    return _in_order(list(sources)[3:], found)


def _in_order(wrt, grads) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and `wrt` in their places among those of `SOURCES`."""
    found = dict(zip(("q", "k", "v", *wrt), grads, strict=True))
    return tuple(map(found.get, SOURCES))
