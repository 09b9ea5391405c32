"""The masks of Hugging Face Transformers as one interval of keys per query, where they are that."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, reduce
from types import NoneType

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

__all__ = ["Mask", "SpanMask", "make_mask"]

# Beyond every position; sums of a few of them still fit an int64.
_FAR = 1 << 40

# (start, stop), each one for all queries or one per query.
Spans = tuple[int | np.ndarray, int | np.ndarray]


class Mask(Tensor):
    """The mask of ``eager``, 0 where a query sees a key and the least finite number elsewhere, kept
    as what is seen.

    Models hand it on to attention as it is, or a part of it. Any other operation writes it out, so
    what models compute of it is what they compute of eager's.

    Attributes
    ----------
    seen : Tensor of bool, of its shape
    q_offset : int or None
        Where the first query is among the keys; not known of a part of a mask.
    """

    seen: Tensor
    q_offset: int | None = None

    @staticmethod
    def __new__(cls, seen: Tensor, dtype: torch.dtype):
        mask = Tensor._make_wrapper_subclass(  # type: ignore
            cls, seen.shape, seen.stride(), seen.storage_offset(), dtype=dtype
        )
        mask.seen = seen
        return mask

    # Operations are seen by `__torch_dispatch__` alone.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parts = operation.decompose(*args, **kwargs)  # inference mode leaves that to be done
        if parts is not NotImplemented:
            return parts
        part = operation.is_view and operation is not _REINTERPRETED
        if (part or operation in _COPIES) and isinstance(args[0], Mask):
            parts = operation(args[0].seen, *args[1:], **kwargs)
            return tree_map_only(Tensor, lambda x: Mask(x, args[0].dtype), parts)
        if operation._schema.is_mutable and isinstance(args[0], Mask):
            raise TypeError(
                "attention_mask: expected to be read only, got a model that writes to it; use "
                'attn_implementation="eager", fastattn keeps masks in another form'
            )
        args, kwargs = tree_map_only(Mask, Mask.written_out, (args, kwargs))
        return operation(*args, **kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(self.written_out())

    def written_out(self) -> Tensor:
        """The same as a plain tensor."""
        hidden = torch.finfo(self.dtype).min
        return torch.where(self.seen, torch.zeros((), dtype=self.dtype), hidden)

    @cached_property
    def words(self) -> dict:
        """What says the same to `fastattn.scaled_dot`."""
        return {"mask": self.seen}


class SpanMask(Mask):
    """A mask (batch, 1, queries, keys), kept as the interval of keys that each query sees.

    Attributes
    ----------
    spans : (start, stop), arrays of int64 that broadcast to (batch, 1, queries)
        Query ``i`` sees the keys ``start[i] <= j < stop[i]``.
    """

    spans: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def __new__(cls, shape: tuple[int, int, int, int], spans, dtype: torch.dtype):
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore
        mask.spans = spans
        return mask

    @cached_property
    def seen(self) -> Tensor:  # type: ignore[override]
        start, stop = self.spans
        j = np.arange(self.shape[-1])
        mask = (start[..., None] <= j) & (j < stop[..., None])
        return torch.from_numpy(mask).expand(self.shape).contiguous()

    @cached_property
    def words(self) -> dict:
        start, stop = self.spans
        queries, keys = self.shape[2:]
        if not start.any():
            if (stop == keys).all():
                return {}
            first = int(stop.flat[0]) - 1 if stop.size else 0
            if (stop == np.minimum(np.arange(queries) + first + 1, keys)).all():
                return {"causal": True, "q_offset": first}
        return {"spans": self.spans}


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._unsafe_view.default}
_REINTERPRETED = torch.ops.aten.view.dtype


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
    dtype: torch.dtype = torch.float32,
    **options,
) -> Tensor | None:
    """The mask function of transformers' ``AttentionMaskInterface``, as its ``eager_mask``.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
    q_offset, kv_offset : int, or Tensor of one
        The positions of the first query and of the first key.
    mask_function : callable
        ``(batch, head, q_position, kv_position) -> bool``, made by `transformers.masking_utils`.
    attention_mask : Tensor of bool, (batch_size, length), optional
        False at the positions that are padding, as are those beyond it.
    allow_is_causal_skip : bool
        Ignored: what a mask says is never left to the attention function to know.
    allow_is_bidirectional_skip : bool
        Return None where every query sees every key.
    use_vmap, dtype, **options
        As for ``eager_mask``.

    Returns
    -------
    Mask or Tensor, (batch_size, 1, q_length, kv_length), or None
        A `SpanMask` where each query sees an interval of keys, a plain tensor of numbers while the
        call is being traced.
    """
    traced = any(is_tracing(x) for x in (attention_mask, q_offset, kv_offset))
    if not traced and not use_vmap and type(attention_mask) in (Tensor, NoneType):
        places = np.arange(q_length) + int(q_offset), np.arange(kv_length) + int(kv_offset)
        spans = _spans_of(mask_function, batch_size, *places, attention_mask)
        if spans is not None:
            start, stop = (np.minimum(np.maximum(x - kv_offset, 0), kv_length) for x in spans)
            if allow_is_bidirectional_skip and not start.any() and (stop == kv_length).all():
                return None
            mask: Mask = SpanMask((batch_size, 1, q_length, kv_length), (start, stop), dtype)
            mask.q_offset = int(q_offset) - int(kv_offset)
            return mask
    given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    options |= {"allow_is_bidirectional_skip": allow_is_bidirectional_skip, "use_vmap": use_vmap}
    if traced:
        return masking_utils.eager_mask(*given, dtype=dtype, **options)
    seen = masking_utils.sdpa_mask(*given, allow_is_causal_skip=False, **options)
    if seen is None:
        return None
    mask = Mask(seen, dtype)
    mask.q_offset = int(q_offset) - int(kv_offset)
    return mask


def _spans_of(function, batch, q, k, attention_mask) -> Spans | None:
    """``(start, stop)`` in positions of keys for the queries at the positions `q`; None where what
    `function` shows of the keys at the positions `k` cannot be told to be one interval.
    """
    try:
        spans = _spans(function, q[None, None])
    except (AttributeError, LookupError, TypeError):  # of another version of the library
        return None
    if spans is None or not _agrees(function, spans, batch, q, k):
        return None
    if attention_mask is None or not k.size:
        return spans
    return _without_padding(spans, attention_mask, k[-1] + 1)


def _agrees(function, spans: Spans, batch: int, q: np.ndarray, k: np.ndarray) -> bool:
    """Does the function say the same at the ends of each query's interval and of the keys?"""
    if not (q.size and k.size):
        return True
    shape = (batch, 1, q.size)
    start, stop = (np.broadcast_to(x, shape) for x in spans)
    ends = np.stack([start - 1, start, stop - 1, stop, start * 0 + k[0], start * 0 + k[-1]], -1)
    ends = np.clip(ends, k[0], k[-1])
    want = (start[..., None] <= ends) & (ends < stop[..., None])
    said = function(
        torch.arange(batch)[:, None, None, None], torch.zeros(1, 1, 1, 1, dtype=torch.long),
        torch.from_numpy(q)[:, None], torch.from_numpy(ends),
    )  # fmt: skip
    return bool((said.numpy() == want).all())


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
    queries), the keys at ``start <= position < stop``; None if that cannot be told. It is told by
    the names that the library gives its functions and what they close over, so `_agrees` asks them.
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
