"""Attention on PyTorch's CPU tensors, without copies, with gradients and `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_operators import attend

__all__ = ["scaled_dot", "scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, by fastattn.

    Parameters
    ----------
    query : Tensor, (..., Hq, L, E)
    key : Tensor, (..., H, S, E)
    value : Tensor, (..., H, S, Ev)
        On the CPU; float16, bfloat16, float32 or float64.
    attn_mask : Tensor, optional
        Broadcastable to ``(..., Hq, L, S)``: of bool, True where a query may see a key, or of
        numbers that are added to the scores. It may require a gradient.
    dropout_p : float, default 0.0
        Nothing else is possible: drop whole heads or positions outside.
    is_causal : bool, default False
        Query ``i`` sees the keys ``j <= i``, whatever the lengths.
    scale : float, optional
        ``1 / sqrt(E)`` by default.
    enable_gqa : bool, default False
        Let `Hq` be a multiple of `H`.

    Returns
    -------
    Tensor, (..., Hq, L, Ev)
        In the memory order of `query`. A query that sees no key gets 0.

    Raises
    ------
    TypeError, ValueError
        The message begins with the argument's name.

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
    if dropout_p != 0:
        raise ValueError(f"dropout_p: {dropout_p} given, 0 wanted; there is no dropout")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: given with is_causal=True, one of the two wanted")
    if not enable_gqa and query.dim() > 2 and key.dim() > 2 and query.size(-3) != key.size(-3):
        heads, kv_heads = query.size(-3), key.size(-3)
        if heads != 1 and kv_heads != 1:
            raise ValueError(
                f"key: {kv_heads} heads given for query's {heads}; pass enable_gqa=True to share"
            )
    options: dict[str, Any] = {"causal": True, "q_offset": 0} if is_causal else {}
    if scale is not None:
        options["scale"] = scale
    if attn_mask is not None:
        options["mask" if attn_mask.dtype == torch.bool else "bias"] = attn_mask
    return attend(query, key, value, **options)[0]


def scaled_dot(
    q, k, v, *,
    scale=None, softcap=None, bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    return_lse=False, backend=None, threads=None, precision=None,
):  # fmt: skip
    """`fastattn.scaled_dot` on tensors, with gradients of `q`, `k`, `v`, `bias`, `alibi`, `sinks`.

    Parameters
    ----------
    q, k, v : Tensor, (..., heads, length, dim)
        On the CPU; none is copied.
    bias, alibi, sinks, q_offset, kv_lengths, spans, mask : Tensor or as in `fastattn.scaled_dot`
    scale, softcap, causal, window, return_lse, backend, threads, precision
        As in `fastattn.scaled_dot`.

    Returns
    -------
    out : Tensor, (..., Hq, Sq, Dv)
        In the memory order of `q`.
    lse : Tensor, (..., Hq, Sq), if `return_lse`
        It passes gradients on, too.

    Raises
    ------
    TypeError, ValueError
        As `fastattn.scaled_dot`. With gradients `backend` must compute them, too.

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
    out, lse = attend(
        q, k, v, scale=scale, softcap=softcap, bias=bias, alibi=alibi, sinks=sinks, causal=causal,
        window=window, q_offset=q_offset, kv_lengths=kv_lengths, spans=spans, mask=mask,
        return_lse=return_lse, backend=backend, threads=threads, precision=precision,
    )  # fmt: skip
    return (out, lse) if return_lse else out
