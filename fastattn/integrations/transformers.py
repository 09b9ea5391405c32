"""``attn_implementation="fastattn"`` for the models of Hugging Face Transformers on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch import bool as torch_bool
from transformers import AttentionInterface, AttentionMaskInterface

from .torch_operators import attend
from .transformers_masks import SpanMask, make_mask

__all__ = ["attention", "register"]

# What models hand to every attention function and no other than paged or flash attention reads:
# the mask holds the positions and the window, and the rest asks for something outside attention.
_OF_NO_CONCERN = frozenset((
    "cache_position", "position_ids", "sliding_window", "use_cache",
    "num_items_in_batch", "output_hidden_states", "output_router_logits",
))  # fmt: skip


def register(name: str = "fastattn") -> None:
    """Let models run on fastattn: afterwards ``attn_implementation=name`` chooses it.

    Parameters
    ----------
    name : str, default "fastattn"
        What models are to call it.

    Notes
    -----
    The library's masks reach the kernels as intervals of keys: causal, sliding windows, chunks,
    padding on either side, packed sequences, alone or together. Others are bool arrays. A padded
    query without a key to see gets 0, where ``eager`` averages the values of padding.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from fastattn.integrations.transformers import register
    >>> register()
    >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...                     intermediate_size=64, vocab_size=100, attn_implementation="fastattn")
    >>> model = BertModel(config).eval()
    >>> model(torch.arange(12)[None]).last_hidden_state.shape
    torch.Size([1, 12, 64])

    An existing model is told by ``model.set_attn_implementation("fastattn")``, one to be loaded by
    ``from_pretrained(..., attn_implementation="fastattn")``.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, make_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function of transformers' ``AttentionInterface``, as its eager ones.

    Parameters
    ----------
    module : nn.Module
        Its ``is_causal`` (True by default) says what no mask means, unless `is_causal` does.
    query : Tensor, (batch, heads, queries, head_dim)
    key : Tensor, (batch, kv_heads, keys, head_dim)
    value : Tensor, (batch, kv_heads, keys, value_dim)
        On the CPU; none is copied.
    attention_mask : Tensor, (batch, 1 or heads, queries, keys), optional
        A `SpanMask`, of bool (True where a query may see a key), or of numbers to be added to the
        scores. Without one a single query sees every key, and the first of several the first key.
    dropout : float, default 0.0
        Nothing else is possible.
    scaling : float, optional
        ``1 / sqrt(head_dim)`` by default.
    is_causal : bool, optional
    softcap : float, optional
        As in `fastattn.scaled_dot`.
    s_aux : Tensor, (heads,), optional
        Its `sinks`.
    position_bias : Tensor, (1 or batch, heads, queries, keys), optional
        Its `bias`.

    Returns
    -------
    out : Tensor, (batch, queries, heads, value_dim)
        Contiguous.
    weights : None

    Raises
    ------
    ValueError
        If the model asks for anything else; the message begins with its name.
    """
    if dropout:
        raise ValueError(
            f"dropout: {dropout} given, 0 wanted; there is no dropout: set the config's "
            "attention_dropout (of BERT and its kin, attention_probs_dropout_prob) to 0"
        )
    for name, x in options.items():
        if name not in _OF_NO_CONCERN and x is not None and x is not False:
            raise ValueError(
                f"{name}: {x if isinstance(x, bool) else type(x).__name__} given, None wanted; "
                'fastattn has no such option, use attn_implementation="eager"'
            )
    words: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "bias": position_bias,
    }
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:
            words.update(causal=True, q_offset=0)
    elif isinstance(attention_mask, SpanMask):
        words["spans"] = attention_mask.spans
    elif attention_mask.dtype == torch_bool:
        words["mask"] = attention_mask
    else:
        words["bias"] = attention_mask if position_bias is None else position_bias + attention_mask
    out, _ = attend(query, key, value, **words)
    return out.transpose(1, 2).contiguous(), None
