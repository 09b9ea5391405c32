"""``attn_implementation="fastattn"`` for the models of Hugging Face Transformers on the CPU."""

from __future__ import annotations

from collections.abc import Set
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from .torch_operators import attend, new_seed
from .transformers_masks import Mask, make_mask
from .transformers_models import keep_in_continuous_batching, refuse_models_without_interface

__all__ = ["attention", "register"]

# Of the arguments that models pass to every attention function, those that change the scores or the
# visible keys, or ask for more than the output. The others are for paged or flash attention.
_REFUSED = frozenset((
    "alibi", "attention_bias", "attn_bias", "block_indices", "block_table", "cross_attn_head_mask",
    "head_mask", "layer_head_mask", "logits_soft_cap", "output_attentions", "rel_pos",
    "rel_pos_bias", "relative_position_bias",
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

    Continuous batching (``model.generate_batch``) is served without a mask: each request's queries
    attend to its own keys. These the library copies together from its pages before each layer; it
    hands on the pages themselves for flash attention on a GPU only.

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
    refuse_models_without_interface(attention)
    keep_in_continuous_batching(attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    relative_bias: Tensor | None = None,
    write_index: list[Tensor] | None = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function of transformers' ``AttentionInterface``, as its eager ones.

    Parameters
    ----------
    module : nn.Module
        In its training mode there is dropout.
    query : Tensor, (batch, heads, queries, head_dim)
    key : Tensor, (batch, kv_heads, keys, head_dim)
    value : Tensor, (batch, kv_heads, keys, value_dim)
        On the CPU; none is copied.
    attention_mask : Tensor, (batch, 1 or heads, queries, keys), optional
        Numbers to be added to the scores (what the library's masks are), or of bool, True where a
        query may see a key. Without one every query sees every key.
    dropout : float, default 0.0
        As `dropout_p` of `scaled_dot_product_attention`; ignored outside training.
    scaling : float, optional
        ``1 / sqrt(head_dim)`` by default.
    softcap : float, optional
        As in `fastattn.scaled_dot`.
    s_aux : Tensor, (heads,), optional
        Its `sinks`.
    sinks : Tensor, (batch, heads, queries, 1), optional
        The same, one per query.
    position_bias : Tensor, (1 or batch, heads, queries, keys), optional
        Its `bias`.
    indices : Tensor of ints, (batch, queries, n), optional
        Of the keys that a query may see, those that it does.
    relative_bias : Tensor, (heads, 2 * R + 1), optional
        As in `fastattn.scaled_dot`, gradient included: in place of a `position_bias` of queries x
        keys. With a mask of the library's, positions are the mask's; otherwise the last query is at
        the last key.
    write_index : list of Tensor, optional
        Given in continuous batching only: then the one entry of the batch has the requests packed
        end to end, ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say where each begins, and
        ``sliding_window``, if any, how many keys a query sees.
    **options
        What asks for nothing that attention computes, such as ``use_cache``, is ignored; so is
        ``is_causal``, which models set whatever their mask says.

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
    _refuse(_REFUSED, options)
    scores = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if write_index is not None and attention_mask is None:
        unserved = {
            "indices": indices, "position_bias": position_bias, "relative_bias": relative_bias,
            "sinks": sinks,
        }  # fmt: skip
        _refuse(unserved.keys(), unserved)
        return _each_request(query, key, value, scores, **options), None
    words = _seen(attention_mask, indices, key.shape[2])
    if position_bias is not None:
        bias = words.get("bias")
        words["bias"] = position_bias if bias is None else position_bias + bias
    words |= scores
    if relative_bias is not None:
        words |= {"relative_bias": relative_bias, **_positions(attention_mask, words)}
    if dropout and module.training:
        words["dropout"] = dropout, new_seed()
    out, lse, _ = attend(query, key, value, return_lse=sinks is not None, **words)
    if sinks is not None and lse is not None:
        # One more term of the sum: exp(lse) / (exp(lse) + exp(sink)) of each weight is left.
        out = out * (lse[..., None] - sinks).sigmoid().to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _each_request(
    query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any], *, cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor, sliding_window: int | None = None, is_causal: bool = True, **_others,
) -> Tensor:  # fmt: skip
    """The attention of packed requests, each as if it were alone."""
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    window = None if sliding_window is None else (sliding_window - 1, None)
    ends = zip(pairwise(cu_seq_lens_q.tolist()), pairwise(cu_seq_lens_k.tolist()), strict=True)
    for queries, keys in ((slice(*q), slice(*k)) for q, k in ends):
        own, _, _ = attend(
            query[:, :, queries], key[:, :, keys], value[:, :, keys], causal=is_causal,
            window=window, **scores,
        )  # fmt: skip
        out[:, queries] = own.transpose(1, 2)
    return out


def _refuse(names: Set[str], options: dict[str, Any]) -> None:
    for name in names & options.keys():
        x = options[name]
        if x is not None and x is not False:
            raise ValueError(
                f"{name}: expected None, got {x if isinstance(x, bool) else type(x).__name__}; "
                'fastattn has no such option here, use attn_implementation="eager"'
            )


def _positions(mask: Tensor | None, words: dict[str, Any]) -> dict[str, Any]:
    """Where the queries are among the keys, in the words of `fastattn.scaled_dot`; `words` are what
    the mask shows.
    """
    if not isinstance(mask, Mask):
        return {}
    if mask.q_offset is None:
        raise ValueError(
            "relative_bias: expected None with a part of a mask, which does not say where the "
            "queries are, got a tensor"
        )
    as_spans = {"causal": False, "spans": mask.spans} if words.get("causal") else {}
    return {"q_offset": mask.q_offset, **as_spans}


def _seen(mask: Tensor | None, indices: Tensor | None, keys: int) -> dict[str, Any]:
    """Which keys a query sees, as options of `fastattn.scaled_dot`."""
    if indices is not None:
        chosen = indices.new_zeros((*indices.shape[:-1], keys), dtype=torch.bool)
        chosen = chosen.scatter(-1, indices.long(), True)[:, None]
        mask = mask.seen if isinstance(mask, Mask) else mask
        if mask is None or mask.dtype == torch.bool:
            mask = chosen if mask is None else mask & chosen
        else:
            mask = mask.masked_fill(~chosen, -torch.inf)
    if mask is None:
        return {}
    if isinstance(mask, Mask):
        return dict(mask.words)
    return {"mask" if mask.dtype == torch.bool else "bias": mask}
