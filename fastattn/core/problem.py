"""One attention call, validated.

``make_problem`` turns the arguments of the public API into a `Problem`. It and its helpers in
`arguments`, `options` and `output` do all the validation; nothing after it validates again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arguments import broadcast_shapes, count, flag, function, in_range, number, operand, vector
from .block_mask import BlockMask
from .device_array import DeviceArray
from .dropout import Dropout
from .dtypes import FLOAT32, FLOAT64, float_dtype, wider, widest
from .options import (
    bias_array,
    check_block_mask,
    check_wrt,
    dropout_of,
    key_lengths,
    mask_array,
    per_head,
    query_offset,
    relative_bias_array,
    score_scale,
    span_arrays,
    window_sides,
)
from .output import destination, empty_like, may_overlap
from .packing import Packing
from .pages import block_table_array, check_pool, usable_table
from .sparse_mask import SparseMask
from .visibility import KeyRange, key_range

__all__ = [
    "DISTANCE",
    "DOT",
    "SQUARED_DISTANCE",
    "Gradient",
    "Problem",
    "ScoreFunction",
    "gradient_of",
    "make_problem",
]  # fmt: skip

_ndarray = np.ndarray
_new = object.__new__

# Of each dtype that sums are kept in: the largest number, and the least whose inverse it holds too.
_MOST = {real: float(np.finfo(real).max) for real in (FLOAT32, FLOAT64)}
_LEAST = {real: float(np.finfo(real).tiny) for real in (FLOAT32, FLOAT64)}


class Gradient(NamedTuple):
    """One gradient that a backward pass is to return."""

    name: str  # of the argument
    shape: tuple[int, ...]  # of the argument as it was given
    dtype: np.dtype  # the wider of the argument's and the result's


class ScoreFunction(NamedTuple):
    """What is computed from a query and a key; times the scale it is their score."""

    # "dot": q . k, "distance": |q - k|, "squared distance", "additive": weights . tanh(q + k)
    name: str
    weights: np.ndarray = np.empty(0)  # (head_dim,), float64, of "additive" alone


DOT, DISTANCE = ScoreFunction("dot"), ScoreFunction("distance")
SQUARED_DISTANCE = ScoreFunction("squared distance")


@dataclass(slots=True, eq=False)  # whose fields are read three times as fast as a named tuple's
class Problem:
    """A validated attention problem: every default filled in, every array readable as it stands.

    ``batch`` stands for any number of leading axes. Arrays with ``batch`` or ``heads`` in their
    shape below may have axes of length 1 there, which broadcast; ``q_offset`` may also be an int.
    """

    q: np.ndarray  # (batch, heads, queries, head_dim), any strides, native and aligned
    k: np.ndarray  # (batch, kv_heads, keys, head_dim)
    v: np.ndarray  # (batch, kv_heads, keys, value_dim)
    # (batch, pages), int64: then k, v and their scales are pools, (n_pages, kv_heads, page, ...),
    # and key j of an entry is row j % page of its page j // page.
    block_table: np.ndarray | None
    # (batch, kv_heads, keys, groups), float32: k and v are int8, one group, or int4, two numbers in
    # a uint8 and 32 dims a group. None: they are floats, those of a cache float8_e4m3fn too.
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None
    dtype: np.dtype  # of the result: the widest of q, k and v, whose float dtypes are their own
    batch: tuple[int, ...]
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    head_dim: int
    value_dim: int
    scale: float | np.ndarray  # (heads,), float64
    softcap: float | None
    bias: np.ndarray | None  # (batch, heads, queries, keys), any real dtype, any byte order
    relative_bias: np.ndarray | None  # (heads, 2 R + 1), float64, from the distance -R on
    alibi: np.ndarray | None  # (heads,), float64
    sinks: np.ndarray | None  # (heads,), float64
    q_offset: int | np.ndarray  # (batch, queries), int64, of length 1 where all queries agree
    packing: Packing | None  # without batch, mask, bias, weights, pages or scales of keys
    key_range: KeyRange
    mask: Any  # ndarray (batch, heads, queries, keys), bool, or a SparseMask, or None
    return_lse: bool
    return_max: bool
    return_weights: bool
    out: np.ndarray | None  # the caller's, with an axis of heads, where a backend may fill it
    one_head: bool  # all operands were two-dimensional: drop the head axis on return; on a
    # device, what is allocated there has none
    threads: int | None
    precision: str | None
    copied: tuple[str, ...]  # arrays that take a copy, for `explain`
    gradients: tuple[Gradient, ...]  # in order of return; none for a forward pass alone
    score_mod: Callable | None  # (score, batch, head, i, j) -> score, after the other options
    mask_mod: Callable | None  # (batch, head, i, j) -> bool
    score_grad: Callable | None  # that of score_mod by its score, of the same arguments
    block_mask: BlockMask | None  # of that mask_mod
    score_function: ScoreFunction
    dropout: Dropout | None

    @property
    def is_flex(self) -> bool:
        """Does it have user functions, which must be compiled or called?"""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def is_sparse(self) -> bool:
        """Are the keys of each query listed?"""
        return type(self.mask) is SparseMask

    @property
    def on_device(self) -> bool:
        """Do the arrays lie on a CUDA device? Then q, k, v, bias and mask are `DeviceArray`, with
        dtypes of their own, and so is the result.
        """
        return isinstance(self.q, DeviceArray)

    @property
    def accumulator(self) -> np.dtype:
        """The dtype of sums and of ``lse``: float64 for float64, else float32."""
        return FLOAT64 if self.dtype is FLOAT64 else FLOAT32

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    def new_result(self) -> np.ndarray:
        """A place for the result that overlaps no input, in the memory order of `q`; on a device
        its description, without an owner: the backend allocates it.
        """
        shape = (*self.batch, self.heads, self.n_queries, self.value_dim)
        if self.q.flags.c_contiguous:
            return np.empty(shape, self.dtype)
        return empty_like(self.q, shape, self.dtype)

    def with_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array with an axis for each of the problem's, of length 1 where it has
        none.
        """
        return (1,) * (3 + len(self.batch) - len(shape)) + shape

    def rows(self, dim: int | None = None) -> tuple[int, ...]:
        """The shape of a result with one entry (or `dim` entries) per query."""
        shape = (*self.batch, self.heads, self.n_queries)
        return shape if dim is None else (*shape, dim)


def make_problem(
    q, k, v, scale=None, softcap=None, bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    return_lse=False, return_weights=False, out=None, threads=None, precision=None,
    gradients=False, wrt=(), score_mod=None, mask_mod=None, block_mask=None,
    score_function=DOT, block_table=None, held=None, relative_bias=None, return_max=False,
    dropout=None, dropout_offset=None, score_grad=None, packing=None,
) -> Problem:  # fmt: skip
    """Check the arguments of `fastattn.scaled_dot` or `fastattn.flex` and return the problem.

    With ``gradients=True`` those of `q`, `k`, `v` and the options named in ``wrt`` are to come.

    A `score_function` other than `DOT` comes with a scale; what is wrong with its weights is said
    of ``w``. `held`, a `Held`, stands for a `block_table` where `k` and `v` are a `KVCache`'s. A
    `packing` stands for `q_offset` and `spans` where the arrays have three axes.

    Raises
    ------
    TypeError, ValueError
        The message begins with the name of the offending argument.
    """
    if not (type(q) is _ndarray and type(k) is _ndarray and type(v) is _ndarray):
        q = operand("q", q)
        k, v = operand("k", k, q), operand("v", v, q)
    arguments = None
    if gradients:
        arguments = {
            "q": q, "k": k, "v": v, "scale": scale, "bias": bias, "relative_bias": relative_bias,
            "alibi": alibi, "sinks": sinks,
        }  # fmt: skip
        if score_function.name == "additive":
            arguments["w"] = score_function.weights
    one_head = False
    if block_table is not None:
        check_pool(q, k, v)
    elif not (q.ndim > 2 and k.ndim > 2 and v.ndim > 2):
        one_head = q.ndim == k.ndim == v.ndim == 2
        q, k, v = _with_heads("q", q), _with_heads("k", k), _with_heads("v", v)
    dtype = q.dtype
    copied: tuple[str, ...] = ()
    if not (
        (dtype is FLOAT32 or dtype is FLOAT64)
        and k.dtype is dtype and v.dtype is dtype
        and q.flags.aligned and k.flags.aligned and v.flags.aligned
    ):  # fmt: skip
        originals = (q, k, v)
        q_dtype, k_dtype, v_dtype = float_dtype("q", q), k.dtype, v.dtype
        dtype = q_dtype
        if held is None or held.widens:
            k_dtype, v_dtype = float_dtype("k", k), float_dtype("v", v)
            dtype = widest({q_dtype, k_dtype, v_dtype})
        q, k, v = _readable(q, q_dtype), _readable(k, k_dtype), _readable(v, v_dtype)
        pairs = zip("qkv", originals, (q, k, v), strict=True)
        copied = tuple(n for n, old, new in pairs if old is not new and not may_overlap(old, new))

    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    batch = q_shape[:-3]
    heads, n_queries, head_dim = q_shape[-3:]
    kv_heads, n_keys, k_dim = k_shape[-3:]
    v_heads, v_keys, value_dim = v_shape[-3:]
    k_scales = v_scales = None
    if held is not None:
        block_table, n_keys, k_dim, value_dim = held[:4]
        v_keys = n_keys
        k_scales, v_scales = held.scales or (None, None)
    if k_dim != head_dim:
        raise ValueError(f"k: expected head_dim {head_dim} as in q, got {k_dim}")
    if head_dim < 1:
        raise ValueError("q: expected head_dim of at least 1, got 0")
    if v_keys != n_keys:
        raise ValueError(f"v: expected {n_keys} keys as in k, got {v_keys}")
    if held is not None:
        pass
    elif block_table is not None:
        block_table = block_table_array(block_table, batch[0])
        n_keys *= block_table.shape[1]
        if kv_lengths is None:
            raise ValueError("kv_lengths: expected a value with block_table, got None")
    elif k_shape[:-3] != batch or v_shape[:-3] != batch:
        batch = _broadcast_batch(batch, k_shape[:-3], v_shape[:-3])
    if v_heads != kv_heads:
        if kv_heads != 1 and v_heads != 1:
            raise ValueError(f"v: expected {kv_heads} heads as in k, or 1, got {v_heads}")
        kv_heads = v_heads if kv_heads == 1 else kv_heads
    if heads != kv_heads:
        if heads == 1:
            heads = kv_heads
        elif kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"k: expected a number of heads that divides q's {heads}, got {kv_heads}"
            )

    rows = (*batch, heads, n_queries)
    real = FLOAT64 if dtype is FLOAT64 else FLOAT32
    if scale is None:
        scale = head_dim**-0.5
    else:
        scale = _within(scale, real) if type(scale) is float else score_scale(scale, heads, real)
    if softcap is not None:
        softcap = number("softcap", softcap)
        if not 0 < softcap < np.inf:
            raise ValueError(f"softcap: expected a finite number > 0, got {softcap}")
        softcap = max(_within(softcap, real), _LEAST[real])
    if bias is not None:
        bias = bias_array(bias, (*rows, n_keys), q)
    if mask is not None:
        mask = mask_array(mask, (*rows, n_keys), q)
    if relative_bias is not None:
        relative_bias = relative_bias_array(relative_bias, heads, real)
    if alibi is not None:
        alibi = per_head("alibi", alibi, heads, real)
    if sinks is not None:
        sinks = per_head("sinks", sinks, heads, real)
    if score_function.name == "additive":
        weights = in_range(vector("w", score_function.weights, head_dim), real).astype(FLOAT64)
        score_function = score_function._replace(weights=weights)

    if causal is not False:
        causal = flag("causal", causal)
    if return_lse is not False:
        return_lse = flag("return_lse", return_lse)
    if return_max is not False:
        return_max = flag("return_max", return_max)
    if return_weights is not False:
        return_weights = flag("return_weights", return_weights)
    window = (None, None) if window is None else window_sides(window)
    if kv_lengths is not None:
        kv_lengths = key_lengths(kv_lengths, batch, n_keys)
        positional = (
            causal or window != (None, None) or alibi is not None or relative_bias is not None
        )
        if q_offset is None and positional:
            raise ValueError(
                "q_offset: expected a value with kv_lengths and causal, window, alibi or "
                "relative_bias, got None; pass 0 for a padded batch of whole sequences, "
                "kv_lengths - n_queries for a cache"
            )
    if packing is not None:
        q_offset, spans = packing.q_offset(), packing.spans()
    else:
        q_offset = n_keys - n_queries if q_offset is None else query_offset(q_offset, batch)
    if spans is not None:
        spans = span_arrays(spans, rows, n_keys)
    visible = key_range(n_queries, n_keys, q_offset, causal, window, kv_lengths, spans)
    if block_table is not None and held is None:
        block_table = usable_table(block_table, k_shape[0], k_shape[2], visible)
    if dropout is not None or dropout_offset is not None:
        dropout = dropout_of(dropout, dropout_offset)
    if threads is not None:
        threads = count("threads", threads)
    if precision is not None and not (isinstance(precision, str) and precision == "bfloat16"):
        raise ValueError(f"precision: expected None or 'bfloat16', got {precision!r}")
    requested = () if arguments is None else _gradients(wrt, arguments, dtype)
    if score_mod is not None:
        function("score_mod", score_mod)
    if mask_mod is not None:
        function("mask_mod", mask_mod)
    if score_grad is not None:
        function("score_grad", score_grad)
    if block_mask is not None:
        check_block_mask(block_mask, mask_mod, (math.prod(batch), heads, n_queries, n_keys))
        mask_mod = block_mask.mask_mod

    if out is not None:
        masks = mask.arrays if type(mask) is SparseMask else (mask,)
        inputs = (q, bias, *masks) if held is not None else (q, k, v, bias, *masks)
        out = destination(out, (*rows, value_dim), dtype, one_head, inputs)
        if out is None:
            copied += ("out",)
    # By its attributes, which takes a third of the time of a call by 38 keywords.
    p = _new(Problem)
    p.q, p.k, p.v, p.k_scales, p.v_scales = q, k, v, k_scales, v_scales
    p.block_table, p.dtype, p.batch = block_table, dtype, batch
    p.heads, p.kv_heads, p.n_queries, p.n_keys = heads, kv_heads, n_queries, n_keys
    p.head_dim, p.value_dim = head_dim, value_dim
    p.scale, p.softcap, p.bias, p.relative_bias = scale, softcap, bias, relative_bias
    p.alibi, p.sinks, p.dropout = alibi, sinks, dropout
    p.q_offset, p.packing, p.key_range, p.mask = q_offset, packing, visible, mask
    p.return_lse, p.return_max, p.return_weights = return_lse, return_max, return_weights
    p.out, p.one_head, p.copied, p.gradients = out, one_head, copied, requested
    p.threads, p.precision, p.score_function = threads, precision, score_function
    p.score_mod, p.mask_mod, p.score_grad = score_mod, mask_mod, score_grad
    p.block_mask = block_mask
    return p


def _within(x: float, real: np.dtype) -> float:
    """A finite `x` drawn in to the range in which sums are kept."""
    return x if math.isinf(x) else min(max(x, -_MOST[real]), _MOST[real])


def _readable(x, dtype):
    """`x` as backends read it: native, aligned, of that float dtype, which differs from its own
    only where that holds integers; on a device the kernel converts.
    """
    if isinstance(x, DeviceArray) or (x.dtype is dtype and x.flags.aligned):
        return x
    return np.require(x, dtype, "A")


def _with_heads(name, x):
    if x.ndim < 2:
        float_dtype(name, x)
        raise ValueError(f"{name}: expected at least 2 axes, (..., length, dim), got {x.ndim}")
    return x[None] if x.ndim == 2 else x


def _broadcast_batch(q_batch, k_batch, v_batch):
    batch = q_batch
    for name, other in (("k", k_batch), ("v", v_batch)):
        try:
            batch = broadcast_shapes(batch, other)
        except ValueError:
            raise ValueError(
                f"{name}: expected leading axes that broadcast with {batch}, got {other}"
            ) from None
    return batch


def _gradients(wrt, arguments: dict, dtype) -> tuple[Gradient, ...]:
    check_wrt(wrt, {name: x for name, x in arguments.items() if name not in "qkv"})
    arrays = [(name, arguments[name]) for name in "qkv"]
    arrays += [(name, operand(name, arguments[name])) for name in wrt]
    return tuple(gradient_of(name, x, dtype) for name, x in arrays)


def gradient_of(name: str, x, dtype) -> Gradient:
    """That of the argument `x` of a call with results of `dtype`."""
    return Gradient(name, x.shape, wider(dtype, x.dtype))
