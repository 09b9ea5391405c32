"""The masks of Hugging Face Transformers as one interval of keys per query, where they are that."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from types import NoneType

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

__all__ = ["SpanMask", "make_mask"]

# Beyond every position; sums of a few of them still fit an int64.
_FAR = 1 << 40

# (start, stop), each one for all queries or one per query.
Spans = tuple[int | np.ndarray, int | np.ndarray]


class SpanMask(Tensor):
    """A bool mask (batch, 1, queries, keys), kept as the interval of keys that each query sees.

    Models hand it on to attention as it is. Any operation on it writes it out, so one that changes
    its masks gets a plain tensor and is right, if slower.

    Attributes
    ----------
    spans : (start, stop), arrays of int64 that broadcast to (batch, 1, queries)
        Query ``i`` sees the keys ``start[i] <= j < stop[i]``.
    """

    spans: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int, int], spans):
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool)  # type: ignore
        mask.spans = spans
        return mask

    # Operations give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(SpanMask, SpanMask.written_out, (args, kwargs or {}))
        return operation(*args, **kwargs)

    def written_out(self) -> Tensor:
        """The same as a plain tensor."""
        start, stop = self.spans
        j = np.arange(self.shape[-1])
        mask = (start[..., None] <= j) & (j < stop[..., None])
        return torch.from_numpy(mask).expand(self.shape)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **options,
) -> Tensor | None:
    """The mask function of transformers' ``AttentionMaskInterface``, as its ``sdpa_mask``.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
    q_offset, kv_offset : int, or Tensor of one
        The positions of the first query and of the first key.
    mask_function : callable
        ``(batch, head, q_position, kv_position) -> bool``, made by `transformers.masking_utils`.
    attention_mask : Tensor of bool, (batch_size, length), optional
        False at the positions that are padding, as are those beyond it.
    allow_is_causal_skip, allow_is_bidirectional_skip : bool
        Return None where it means the same: causal attention, or every key.
    use_vmap, **options
        As for ``sdpa_mask``.

    Returns
    -------
    SpanMask or Tensor of bool, (batch_size, 1, q_length, kv_length), or None
        A `SpanMask` where each query sees an interval of keys, unless the call is being traced.
    """
    spans = None
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not use_vmap and not traced and type(attention_mask) in (Tensor, NoneType):
        spans = _spans(mask_function, np.arange(q_length)[None, None] + int(q_offset))
        if spans is not None and attention_mask is not None:
            spans = _without_padding(spans, attention_mask, kv_offset + kv_length)
    if spans is None:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap, **options,
        )  # fmt: skip
    start, stop = (np.minimum(np.maximum(x - kv_offset, 0), kv_length) for x in spans)
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        every = allow_is_bidirectional_skip or q_length == 1
        none = kv_length if every else np.minimum(np.arange(q_length) + 1, kv_length)
        if not start.any() and (stop == none).all():
            return None
    return SpanMask((batch_size, 1, q_length, kv_length), (start, stop))


def _without_padding(spans: Spans, attention_mask: Tensor, length: int) -> Spans | None:
    """Also within what is real of so many positions, or None where that is not an interval."""
    if attention_mask.ndim != 2:
        return None
    real = attention_mask.numpy()
    if real.shape[1] >= length and real.all():
        return spans
    first = real.argmax(axis=1)[:, None]
    last = first + real.sum(axis=1)[:, None]
    j = np.arange(real.shape[1])
    if ((first <= j) & (j < last) != real).any():
        return None
    return _intersection(spans, (first[..., None], last[..., None]))


def _intersection(a: Spans, b: Spans) -> Spans:
    return np.maximum(a[0], b[0]), np.minimum(a[1], b[1])


def _spans(function: Callable, q: np.ndarray) -> Spans | None:
    """``(start, stop)`` such that `function` shows the query at position `q`, of (batch or 1, 1,
    queries), the keys at ``start <= position < stop``; None if that cannot be told.
    """
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    given = {name: cell.cell_contents for name, cell in cells}
    match function.__qualname__.partition(".")[0]:
        case "bidirectional_mask_function":
            return -_FAR, _FAR
        case "causal_mask_function":
            return -_FAR, q + 1
        case "sliding_window_overlay":
            return q - given["sliding_window"] + 1, _FAR
        case "sliding_window_bidirectional_overlay":
            return q - given["sliding_window"], q + given["sliding_window"] + 1
        case "chunked_overlay":
            size, origin = given["chunk_size"], given["left_padding"].numpy()[:, None, None]
            start = (q - origin) // size * size + origin
            return start, start + size
        case "packed_sequence_mask_function":
            return _runs(given["packed_sequence_mask"].numpy(), q)
        case "remap_positions_for_packed_sequence":
            # Only ever used together with the former: between a query and the keys of its own
            # sequence positions differ by as much as places do.
            positions = given["position_ids"].numpy()[:, None, q.ravel()]
            spans = _spans(given["mask_function"], positions)
            return spans and (spans[0] + (q - positions), spans[1] + (q - positions))
        case "and_masks":
            parts = [_spans(part, q) for part in given["mask_functions"]]
            known = [spans for spans in parts if spans is not None]
            return reduce(_intersection, known) if len(known) == len(parts) else None
    return None


def _runs(ids: np.ndarray, q: np.ndarray) -> Spans:
    """Where the run of `ids`, (batch, length) and never decreasing, starts and ends around `q`."""
    j = np.arange(ids.shape[1])
    new = np.diff(ids, axis=1) != 0
    start, stop = np.zeros_like(ids), np.full_like(ids, len(j))
    start[:, 1:] = np.maximum.accumulate(np.where(new, j[1:], 0), axis=1)
    stop[:, :-1] = np.minimum.accumulate(np.where(new, j[1:], len(j))[:, ::-1], axis=1)[:, ::-1]
    return start[:, None, q.ravel()], stop[:, None, q.ravel()]
