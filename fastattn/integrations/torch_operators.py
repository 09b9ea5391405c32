"""The operators ``torch.ops.fastattn.scaled_dot`` and ``scaled_dot_backward``, registered when this
is imported, with what autograd and `torch.compile` need to know of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn

from ..core.options import dropout_of, dropout_start, span_sides, window_sides
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


def attend(q, k, v, *, return_lse=False, **words) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of `fastattn.scaled_dot`, whose words may be tensors.

    Without `return_lse`, lse may be empty or None.
    """
    if _any_autocast() and torch.is_autocast_enabled("cpu"):
        q, k, v = map(autocast, (q, k, v))
    compiling = _is_compiling()
    given = [q, k, v]
    for name, x in words.items():
        if isinstance(x, Tensor):
            if name == "softcap":
                check_constant(name, x)
            given.append(x)
    gradient = _needs_gradient(given)
    straight = not compiling and _straight_to_cpu(given)
    if straight and not gradient:
        return _run(q, k, v, return_lse, words)
    if not (compiling or straight):
        check_tensors(words, q=q, k=k, v=v)
    tensors, options = _operands(**words)
    if not compiling and (gradient or transforms()):
        return _attention(options, q, k, v, *tensors)  # as the dispatcher, 5 us earlier
    # The way back starts from lse.
    return FORWARD(q, k, v, *tensors, return_lse=return_lse or gradient, **options)


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


def _operands(
    bias=None, alibi=None, sinks=None, mask=None, q_offset=None, kv_lengths=None, spans=None,
    window=None, dropout=None, dropout_offset=None, relative_bias=None, scale=None, **options,
):  # fmt: skip
    """Words as the operators take them: optional tensors in their order, to the last one given,
    and options.
    """
    if window is not None:
        options["left"], options["right"] = window_sides(window)
    start, stop = (None, None) if spans is None else span_sides(spans)
    offsets = None
    if isinstance(q_offset, int):
        options["q_offset"] = q_offset
    else:
        offsets = q_offset
    scales = None
    if isinstance(scale, (Tensor, np.ndarray, list, tuple)):
        scales = scale
    else:
        options["scale"] = scale
    seed = None
    if dropout is not None:
        options["rate"], seed = _rate_and_seed(dropout)
        options["place"] = dropout_start(dropout_offset)
    tensors = []  # each None costs autograd 0.3 us
    optional = (
        bias, alibi, sinks, mask, offsets, kv_lengths, start, stop, seed, relative_bias, scales,
    )  # fmt: skip
    for place, (name, x) in enumerate(zip(OPTIONAL, optional, strict=True)):
        if x is not None:
            tensors += [None] * (place - len(tensors))
            tensors.append(as_tensor(x, WORDS.get(name, name)))
    return tensors, options


def new_seed() -> Tensor:
    """A seed of dropout, from torch's generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


def _rate_and_seed(dropout) -> tuple[float, Tensor]:
    """The seed of `dropout` as a tensor, which a compiled graph can draw anew."""
    if isinstance(dropout, (tuple, list)) and len(dropout) == 2 and isinstance(dropout[1], Tensor):
        dropout_of((dropout[0], 0), None)
        return float(dropout[0]), dropout[1]
    dropout_of(dropout, None)
    rate, seed = dropout
    seed = int(seed)
    return float(rate), torch.tensor(seed if seed < 1 << 63 else seed - (1 << 64))


def _forward(q, k, v, *tensors, return_lse=False, **options):
    out, lse = _run(q, k, v, return_lse, _words(tensors, options))
    return out, out.new_empty(0, dtype=_sums(out)) if lse is None else lse


def _run(q, k, v, return_lse, words) -> tuple[Tensor, Tensor | None]:
    for name, x in words.items():
        if isinstance(x, Tensor):
            words[name] = array(x, name)
    if words.get("dropout") is not None:
        words["dropout"] = _with_number(words["dropout"])
    found = fastattn.scaled_dot(
        array(q, "q"), array(k, "k"), array(v, "v"), return_lse=return_lse, **words
    )
    out = tensor(found[0] if return_lse else found)
    if not q.is_contiguous() and (q.stride(-1) != 1 or not alike(out, q)):
        out = laid_out(out, empty_result(q, k, v))
    return out, tensor(found[1]) if return_lse else None


def _with_number(dropout):
    """`dropout` with a seed that is a number."""
    if not isinstance(dropout, (tuple, list)) or len(dropout) != 2:
        return dropout
    rate, seed = dropout
    return rate, int(seed) % (1 << 64) if isinstance(seed, Tensor) else seed


def _forward_fake(q, k, v, *tensors, return_lse=False, **options):
    out = empty_result(q, k, v)
    return out, out.new_empty(out.shape[:-1] if return_lse else 0, dtype=_sums(out))


def _sums(out) -> torch.dtype:
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _backward(grad_out, grad_lse, q, k, v, out, lse, *tensors, wrt, **options):
    named = {"grad_out": grad_out, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    grads = fastattn.scaled_dot_backward(
        *(array(x, name) for name, x in named.items()),
        grad_lse=None if grad_lse is None else array(grad_lse, "grad_lse"),
        wrt=tuple(WORDS.get(name, name) for name in wrt),
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
    return _forward_fake(*given[len(SOURCES) :], return_lse=True)


def _second(*given, wrt, **options):
    tangents, given = given[: len(SOURCES)], given[len(SOURCES) :]
    grad_out, grad_lse, q, k, v, *tensors = given
    sources = _sources(q, k, v, tensors, wrt)
    own = tuple(WORDS.get(name, name) for name in wrt)
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
            results = _forward(*tensors, return_lse=True, **options)
        else:
            results = _below_autograd(options, *tensors)
        _keep(ctx, options, tensors, results)
        return results

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
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
        return pushed(ctx.options, named(names_of(tensors), tangents), (out, lse), tensors)


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


def _below_autograd(options, *tensors):
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(*tensors, return_lse=True, **options)


def _keep(ctx, options, tensors, results) -> None:
    ctx.save_for_backward(*tensors, *results)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors, *results)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiable(*tensors, return_lse=False, **options):
    if _needs_gradient(tensors) or transforms():
        out, lse = _attention(options, *tensors)
        return out, lse if return_lse else lse.new_empty(0)
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


def _words(tensors, options) -> dict:
    """The words of `fastattn.scaled_dot` for what an operator was given."""
    for name, x in zip(OPTIONAL, tensors, strict=False):
        if x is not None:
            options[name] = array(x, name)
    if "rate" in options:
        options["dropout"] = options.pop("rate"), int(options.pop("seed")) % (1 << 64)
        options["dropout_offset"] = options.pop("place", None)
    if "offsets" in options:
        options["q_offset"] = options.pop("offsets")
    if "scales" in options:
        options["scale"] = options.pop("scales")
    if "start" in options:
        options["spans"] = options.pop("start"), options.pop("stop")
    if "left" in options or "right" in options:
        options["window"] = options.pop("left", None), options.pop("right", None)
    return options


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
