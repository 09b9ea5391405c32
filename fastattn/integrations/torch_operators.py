"""The operators ``torch.ops.fastattn.scaled_dot`` and ``scaled_dot_backward``, registered when this
is imported, with what autograd and `torch.compile` need to know of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import fastattn

from ..options import span_sides, window_sides

__all__ = ["attend"]

_TENSORS = """
    Tensor? bias=None, Tensor? alibi=None, Tensor? sinks=None, Tensor? mask=None,
    Tensor? offsets=None, Tensor? kv_lengths=None, Tensor? start=None, Tensor? stop=None, *,
"""
_OPTIONS = """
    float? scale=None, float? softcap=None, bool causal=False, SymInt? left=None,
    SymInt? right=None, SymInt? q_offset=None, str? backend=None, SymInt? threads=None,
    str? precision=None
"""

# A library of its own rather than torch.library.custom_op: a call takes 10 us less.
_LIBRARY = torch.library.Library("fastattn", "DEF")
_LIBRARY.define(
    f"scaled_dot(Tensor q, Tensor k, Tensor v, {_TENSORS} bool return_lse=False, {_OPTIONS})"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "scaled_dot_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, {_TENSORS} str[] wrt, {_OPTIONS}) -> Tensor[]"
)
_FORWARD = torch.ops.fastattn.scaled_dot.default
_BACKWARD = torch.ops.fastattn.scaled_dot_backward.default
_OPTIONAL = ("bias", "alibi", "sinks", "mask", "offsets", "kv_lengths", "start", "stop")


def attend(q, k, v, *, return_lse=False, **words) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of `fastattn.scaled_dot`, whose words may be tensors.

    Without `return_lse`, lse may be empty or None.
    """
    compiling = _is_compiling()
    given = [q, k, v]
    for x in words.values():
        if isinstance(x, Tensor):
            given.append(x)
    gradient = _needs_gradient(given)
    if not (compiling or gradient) and _straight_to_cpu(given):
        return _run(q, k, v, return_lse, words)
    tensors, options = _operands(**words)
    if gradient and not compiling:
        return _ScaledDot.apply(options, q, k, v, *tensors)  # as the dispatcher, 5 us earlier
    # The way back starts from lse.
    return _FORWARD(q, k, v, *tensors, return_lse=return_lse or gradient, **options)


_is_compiling = torch.compiler.is_compiling
_profiles = torch._C._autograd._profiler_enabled
_listeners = torch._C._dispatch_tls_local_include_set
_NOBODY = {_listeners().raw_repr(), torch.inference_mode()(_listeners)().raw_repr()}
_ORDINARY = {Tensor, torch.nn.Parameter}


def _needs_gradient(tensors) -> bool:
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
    window=None, **options,
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
    tensors = []  # each None costs autograd 0.3 us
    optional = (bias, alibi, sinks, mask, offsets, kv_lengths, start, stop)
    for place, x in enumerate(optional):
        if x is not None:
            tensors += [None] * (place - len(tensors))
            tensors.append(_as_tensor(x))
    return tensors, options


def _as_tensor(x) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(np.asarray(x))


def _forward(q, k, v, *tensors, return_lse=False, **options):
    out, lse = _run(q, k, v, return_lse, _words(tensors, options))
    return out, out.new_empty(0, dtype=_sums(out)) if lse is None else lse


def _run(q, k, v, return_lse, words) -> tuple[Tensor, Tensor | None]:
    for name, x in words.items():
        if isinstance(x, Tensor):
            words[name] = _array(x)
    found = fastattn.scaled_dot(_array(q), _array(k), _array(v), return_lse=return_lse, **words)
    out = _tensor(found[0] if return_lse else found)
    if not q.is_contiguous() and (q.stride(-1) != 1 or not _alike(out, q)):
        out = _laid_out(out, _empty_result(q, k, v))
    return out, _tensor(found[1]) if return_lse else None


def _forward_fake(q, k, v, *tensors, return_lse=False, **options):
    out = _empty_result(q, k, v)
    return out, out.new_empty(out.shape[:-1] if return_lse else 0, dtype=_sums(out))


def _sums(out) -> torch.dtype:
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _backward(grad_out, grad_lse, q, k, v, out, lse, *tensors, wrt, **options):
    arrays = (_array(x) for x in (grad_out, q, k, v, out, lse))
    grads = fastattn.scaled_dot_backward(
        *arrays,
        grad_lse=None if grad_lse is None else _array(grad_lse),
        wrt=tuple(wrt),
        **_words(tensors, options),
    )
    sources = _sources(q, k, v, tensors, wrt)
    found = []
    for grad, source in zip(map(_tensor, grads), sources, strict=True):
        same = _alike(grad, source)
        found.append(grad if same else _laid_out(grad, torch.empty_like(source)))
    return found


def _backward_fake(grad_out, grad_lse, q, k, v, out, lse, *tensors, wrt, **options):
    return [torch.empty_like(x) for x in _sources(q, k, v, tensors, wrt)]


class _ScaledDot(torch.autograd.Function):
    # What torch.library.register_autograd would make, but that takes 100 us to fill in defaults.
    @staticmethod
    def forward(ctx, options, *tensors):
        if _straight_to_cpu(tensors):
            results = _forward(*tensors, return_lse=True, **options)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = _FORWARD(*tensors, return_lse=True, **options)
        ctx.save_for_backward(*tensors, *results)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, *tensors, out, lse = ctx.saved_tensors
        names = ("q", "k", "v", *_OPTIONAL[: len(tensors)])
        needed = zip(names, ctx.needs_input_grad[1:], strict=True)
        wrt = [name for name, wanted in needed if wanted and name in ("bias", "alibi", "sinks")]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        given = (grad_out, grad_lse, q, k, v, out, lse, *tensors)
        straight = not torch.is_grad_enabled() and _straight_to_cpu(given)
        grads = (_backward if straight else _BACKWARD)(*given, wrt=wrt, **ctx.options)
        found = dict(zip(("q", "k", "v", *wrt), grads, strict=True))
        return None, *map(found.get, names)


def _differentiable(*tensors, return_lse=False, **options):
    if _needs_gradient(tensors):
        if not return_lse:
            raise ValueError("return_lse: False given, True wanted where gradients are")
        return _ScaledDot.apply(options, *tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*tensors, return_lse=return_lse, **options)


class _ScaledDotBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_BACKWARD(*tensors, **options))

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("scaled_dot: a second derivative wanted, there is only the first")


def _differentiable_backward(*tensors, **options):
    if _needs_gradient(tensors):
        return list(_ScaledDotBackward.apply(options, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD(*tensors, **options)


_LIBRARY.impl("scaled_dot", _forward, "CPU")
_LIBRARY.impl("scaled_dot", _differentiable, "Autograd")
_LIBRARY.impl("scaled_dot_backward", _backward, "CPU")
_LIBRARY.impl("scaled_dot_backward", _differentiable_backward, "Autograd")
torch.library.register_fake("fastattn::scaled_dot", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("fastattn::scaled_dot_backward", _backward_fake, lib=_LIBRARY)


def _words(tensors, options) -> dict:
    """The words of `fastattn.scaled_dot` for what an operator was given."""
    for name, x in zip(_OPTIONAL, tensors, strict=False):
        if x is not None:
            options[name] = _array(x)
    if "offsets" in options:
        options["q_offset"] = options.pop("offsets")
    if "start" in options:
        options["spans"] = options.pop("start"), options.pop("stop")
    if "left" in options or "right" in options:
        options["window"] = options.pop("left", None), options.pop("right", None)
    return options


# -------------------------------------------------------------------------- tensors and arrays


def _array(x: Tensor) -> np.ndarray:
    """The same memory as an array."""
    if x.dtype != torch.bfloat16:
        return x.numpy(force=True)  # gradients are none of its business
    import ml_dtypes

    return x.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _tensor(x: np.ndarray) -> Tensor:
    """The same memory as a tensor; torch does not read NumPy's bfloat16."""
    if x.dtype.kind == "V":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _empty_result(q, k, v) -> Tensor:
    """In the memory order of q where each row of q is contiguous, else contiguous: as torch's."""
    shape, dtype = (*q.shape[:-1], v.shape[-1]), _result_type(q, k, v)
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        heads = [x.shape[-3] for x in (q, k, v) if x.dim() > 2 and x.shape[-3] != 1]
        shape = (*batch, heads[0] if heads else 1, q.shape[-2], v.shape[-1])
    if shape == q.shape and q.stride(-1) == 1:
        return torch.empty_like(q, dtype=dtype)
    return q.new_empty(shape, dtype=dtype)


def _result_type(*tensors) -> torch.dtype:
    """The widest, as in `fastattn.scaled_dot`."""
    dtypes = [x.dtype if x.dtype.is_floating_point else torch.float64 for x in tensors]
    return torch.promote_types(torch.promote_types(*dtypes[:2]), dtypes[2])


def _sources(q, k, v, tensors, wrt) -> list[Tensor]:
    """What the gradients are of; autograd wants each like its source, in dtype too."""
    named = dict(zip(_OPTIONAL, tensors, strict=False))
    return [q, k, v, *(named[name] for name in wrt)]


def _laid_out(x: Tensor, wanted: Tensor) -> Tensor:
    return x if _alike(x, wanted) else wanted.copy_(x)


def _alike(x: Tensor, y: Tensor) -> bool:
    """Of the same dtype, shape and memory order? The stride of an axis of 1 means nothing."""
    steps = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.dtype == y.dtype and x.shape == y.shape and all(n < 2 or a == b for n, a, b in steps)
