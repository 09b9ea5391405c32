"""Attention on PyTorch's CPU tensors, without copies, with gradients and `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from ..core.arguments import flag, renamed
from ..core.option_table import check
from .torch_operators import attend, new_seed
from .torch_tensors import check_tensors

__all__ = ["scaled_dot", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, by fastattn.

    Parameters
    ----------
    query : Tensor, (..., Hq, L, E)
        On the CPU, as all operands; float16, bfloat16, float32 or float64.
    key : Tensor, (..., H, S, E)
        Keys.
    value : Tensor, (..., H, S, Ev)
        Values.
    attn_mask : Tensor or torch.nn.attention.bias.CausalBias, optional
        Broadcastable to ``(..., Hq, L, S)``: of bool, True where a query may see a key, or of
        numbers that are added to the scores. It may require a gradient. No L x S array is made of
        a causal bias.
    dropout_p : float, default 0.0
        Drop each weight with that probability, at least 0 and below 1, and divide the others by
        ``1 - dropout_p``. The seed of a call comes from torch's default generator, so
        `torch.manual_seed` makes it reproducible; which weights are dropped is `scaled_dot`'s
        choice, not torch's.
    is_causal : bool, default False
        Query ``i`` sees the keys ``j <= i``, whatever the lengths.
    scale : float or Tensor, optional
        ``1 / sqrt(E)`` by default. A tensor, () or (Hq,), may require a gradient.
    enable_gqa : bool, default False
        Let `Hq` be a multiple of `H`.

    Returns
    -------
    Tensor, (..., Hq, L, Ev)
        In the memory order of `query`. A query that sees no key gets 0. Under `torch.autocast`
        the operands are cast as torch casts its own function's.

    Raises
    ------
    TypeError, ValueError
        The message begins with the argument's name.
    NotImplementedError
        For forward mode of forward mode, and for third derivatives.

    Notes
    -----
    Reverse and forward mode work, with one over the other for second derivatives: `torch.func.grad`
    and `jacrev`, `jvp`, `jacfwd` and `linearize`, `hessian`, ``create_graph=True``. Tangents and
    second derivatives are computed by NumPy. `torch.vmap` makes one call for each place along its
    axis: give leading axes instead where there are any.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 2, 8, 100, 64).unbind()
    >>> theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> ours = scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(ours, theirs, atol=1e-5)
    True
    """
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    enable_gqa = flag("enable_gqa", enable_gqa)
    if flag("is_causal", is_causal):
        options.update(causal=True, q_offset=0)
    try:
        if dropout_p != 0:
            options["dropout"] = dropout_p, new_seed()
        if attn_mask is not None:
            if is_causal:
                raise ValueError(
                    f"attn_mask: expected None with is_causal=True, got {type(attn_mask).__name__}"
                )
            options |= _mask(attn_mask, query, key)
        if not enable_gqa and query.dim() > 2 and key.dim() > 2 and query.size(-3) != key.size(-3):
            heads, kv_heads = query.size(-3), key.size(-3)
            if heads != 1 and kv_heads != 1:
                raise ValueError(
                    f"key: expected {heads} heads as in query, got {kv_heads}; pass "
                    "enable_gqa=True to share"
                )
        return attend(query, key, value, **options)[0]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        check_tensors({}, query=query, key=key, value=value)  # which says it better
        raise renamed(error, _NAMES) from None


_NAMES = {
    "q": "query", "k": "key", "v": "value", "bias": "attn_mask", "mask": "attn_mask",
    "dropout": "dropout_p",
}  # fmt: skip


def _mask(attn_mask, query, key) -> dict[str, Any]:
    """What torch's `attn_mask` is here."""
    if isinstance(attn_mask, CausalBias):  # its memory is not initialised
        lengths = query.size(-2), key.size(-2)
        upper_left = attn_mask.variant == CausalVariant.UPPER_LEFT
        if not upper_left and lengths != (attn_mask.seq_len_q, attn_mask.seq_len_kv):
            shape = attn_mask.seq_len_q, attn_mask.seq_len_kv
            raise ValueError(f"attn_mask: expected a causal bias of {lengths}, got one of {shape}")
        return {"causal": True, "q_offset": 0 if upper_left else lengths[1] - lengths[0]}
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a tensor, got {type(attn_mask).__name__}")
    if attn_mask.dtype == torch.bool:
        return {"mask": attn_mask}
    if not attn_mask.is_floating_point():
        raise TypeError(
            f"attn_mask: expected bool or floating point, got {attn_mask.dtype}; pass which keys "
            "are seen as bool"
        )
    return {"bias": attn_mask}


def scaled_dot(q, k, v, **options):
    """`fastattn.scaled_dot` on tensors, with gradients.

    They are those of `q`, `k`, `v`, `scale`, `bias`, `relative_bias`, `alibi` and `sinks`.

    Parameters
    ----------
    q, k, v : Tensor, (..., heads, length, dim)
        On the CPU; none is copied.
    **options
        As of `fastattn.scaled_dot`, except ``block_table``, ``out`` and ``return_weights``. Arrays
        may be tensors on the CPU, and the seed of `dropout` too, such as
        ``torch.randint(2**63 - 1, ())``. No gradient passes through `softcap`: a tensor that
        requires one is an error.

    Returns
    -------
    out : Tensor, (..., Hq, Sq, Dv)
        In the memory order of `q`.
    lse : Tensor, (..., Hq, Sq), if `return_lse`
        It passes gradients on, too.
    row_max : Tensor, (..., Hq, Sq), if `return_max`
        It passes none on.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.scaled_dot`. With gradients `backend` must compute them, too.
    NotImplementedError
        As of `scaled_dot_product_attention`, whose casts and notes hold here, too.

    Examples
    --------
    >>> import torch
    >>> from fastattn.integrations.torch import scaled_dot
    >>> q, k, v = torch.randn(3, 8, 100, 64).unbind()
    >>> sinks = torch.zeros(8, requires_grad=True)
    >>> scaled_dot(q, k, v, causal=True, window=20, sinks=sinks).square().sum().backward()
    >>> sinks.grad.shape
    torch.Size([8])
    """
    if not options:
        return attend(q, k, v)[0]
    check("torch", options)
    results = attend(q, k, v, **options)
    asked = True, options.get("return_lse"), options.get("return_max")
    found = tuple(x for x, wanted in zip(results, asked, strict=True) if wanted)
    return found if len(found) > 1 else found[0]
