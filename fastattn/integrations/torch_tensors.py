"""Tensors: which the operators take, as arrays and back, and where results lie."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core.arguments import plain
from ..core.dtypes import FLOAT64, is_real
from ..core.foreign import check_meaning, refusal

__all__ = [
    "alike", "array", "as_tensor", "autocast", "check_constant", "check_tensors", "empty_result",
    "laid_out", "tensor", "transforms",
]  # fmt: skip


def transforms() -> bool:
    """Is one of torch.func's at work that wants more than an operator: grad, vmap, jvp?"""
    if not torch._C._are_functorch_transforms_active():
        return False
    kind = torch._C._functorch.peek_interpreter_stack().key()
    return kind != torch._C._functorch.TransformType.Functionalize


def autocast(x):
    """As torch casts the operands of its own attention."""
    if not (isinstance(x, Tensor) and x.is_floating_point()) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype("cpu"))


def check_constant(name, x) -> None:
    """An error if `x`, of which there is no gradient, takes part in differentiation."""
    if x.requires_grad and torch.is_grad_enabled():
        got = "a tensor that requires a gradient"
    elif forward_ad._current_level >= 0 or transforms():
        got = "a tensor inside of a transform of torch.func"
    else:
        return
    raise TypeError(f"{name}: expected a number, which has no gradient, got {got}")


def check_tensors(words, /, **operands) -> None:
    """An error of operands that are no tensors, and of tensors that the operators cannot read."""
    for name, x in {**operands, **words}.items():
        if isinstance(x, Tensor):
            check_meaning(name, x)
            if x.is_nested or x.layout != torch.strided or x.device.type not in ("cpu", "meta"):
                raise refusal(name, x, TypeError())
        elif name in operands:
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    (first, x), *others = operands.items()
    for name, y in others:
        if y.device != x.device:
            raise TypeError(f"{name}: expected device {x.device} as of {first}, got {y.device}")


def as_tensor(x, name: str) -> Tensor:
    """A copy of an array, for an operator, or an error that begins with `name`."""
    if isinstance(x, Tensor):
        return x
    x = plain(name, x)
    if not (is_real(x.dtype) or x.dtype.kind == "b"):
        raise TypeError(f"{name}: expected real numbers or bools, got {x.dtype}")
    dtype = FLOAT64 if x.dtype == np.longdouble else x.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):
        return tensor(x.astype(dtype, order="C"))


def array(x: Tensor, name: str) -> np.ndarray:
    """The same memory as an array, or an error that begins with `name`."""
    try:
        if x.dtype != torch.bfloat16:
            return x.numpy(force=True)  # gradients are none of its business
        import ml_dtypes

        return x.detach().resolve_neg().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    except (AttributeError, RuntimeError, TypeError) as error:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}") from None
        raise refusal(name, x.detach(), error) from error


def tensor(x: np.ndarray) -> Tensor:
    """The same memory as a tensor; torch does not read NumPy's bfloat16."""
    if x.dtype.kind == "V":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def empty_result(q, k, v) -> Tensor:
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


def laid_out(x: Tensor, wanted: Tensor) -> Tensor:
    return x if alike(x, wanted) else wanted.copy_(x)


def alike(x: Tensor, y: Tensor) -> bool:
    """Of the same dtype, shape and memory order? The stride of an axis of 1 means nothing."""
    steps = zip(x.shape, x.stride(), y.stride(), strict=True)
    return x.dtype == y.dtype and x.shape == y.shape and all(n < 2 or a == b for n, a, b in steps)
