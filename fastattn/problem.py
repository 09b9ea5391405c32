"""One attention call, validated: the only place where arguments are checked.

``pose`` turns the words of the public API into a `Problem`. Nothing after it validates again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import NamedTuple

import numpy as np

from .blockmask import BlockMask
from .device import DeviceArray, on_device

__all__ = ["DISTANCE", "DOT", "Gradient", "Measure", "Problem", "pose"]

_ndarray = np.ndarray
_FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)
_INT64 = np.dtype(np.int64)
_FLOATS = "float16, bfloat16, float32 or float64 (integers and bools become float64)"

# Positions beyond this are as good as infinite; sums of three of them still fit an int64.
_FAR = 1 << 61


class Gradient(NamedTuple):
    """One gradient that a backward pass is to return."""

    name: str  # of the argument
    shape: tuple[int, ...]  # of the argument as it was given
    dtype: np.dtype  # the wider of the argument's and the result's


class Measure(NamedTuple):
    """How a query and a key are compared; a score is that times the scale."""

    name: str  # "dot": q . k, "distance": |q - k|, "additive": weights . tanh(q + k)
    weights: np.ndarray = np.empty(0)  # (head_dim,), float64, of "additive" alone


DOT, DISTANCE = Measure("dot"), Measure("distance")


@dataclass(slots=True, eq=False)  # whose fields are read three times as fast as a named tuple's
class Problem:
    """A validated attention problem: every default filled in, every array readable as it stands.

    ``batch`` stands for any number of leading axes. Arrays with ``batch`` or ``heads`` in their
    shape below may have axes of length 1 there, which broadcast; ``q_offset`` may also be an int.
    """

    q: np.ndarray  # (batch, heads, queries, head_dim), any strides, native and aligned
    k: np.ndarray  # (batch, kv_heads, keys, head_dim)
    v: np.ndarray  # (batch, kv_heads, keys, value_dim)
    k_scales: np.ndarray | None  # (batch, kv_heads, keys), float32, packed keys: k and v are int8
    v_scales: np.ndarray | None  # then, and each of their rows is multiplied by its number here
    dtype: np.dtype  # of the result and of q; k and v have it too, or both a narrower float dtype
    batch: tuple[int, ...]
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    bias: np.ndarray | None  # (batch, heads, queries, keys), any real dtype, any byte order
    alibi: np.ndarray | None  # (heads,), float64
    sinks: np.ndarray | None  # (heads,), float64
    causal: bool
    window: tuple[int | None, int | None]
    q_offset: int | np.ndarray  # (batch), int64
    kv_lengths: np.ndarray | None  # (batch), int64
    spans: tuple[np.ndarray, np.ndarray] | None  # (batch, heads, queries), int64
    mask: np.ndarray | None  # (batch, heads, queries, keys), bool
    return_lse: bool
    return_weights: bool
    result: np.ndarray  # (batch, heads, queries, value_dim): to be filled, overlaps no input
    out: np.ndarray | None  # where the caller wants a copy of it; None if it lies there already
    one_head: bool  # all operands were two-dimensional: drop the head axis on return; on a
    # device, what is allocated there has none
    threads: int | None
    precision: str | None
    copied: tuple[str, ...]  # operands that had to be copied, for `explain`
    gradients: tuple[Gradient, ...]  # in order of return; none for a forward pass alone
    score_mod: Callable | None  # (score, batch, head, i, j) -> score, after the other options
    mask_mod: Callable | None  # (batch, head, i, j) -> bool
    block_mask: BlockMask | None  # of that mask_mod
    measure: Measure

    @property
    def is_flex(self) -> bool:
        """Are there functions of the user's in it, which must be compiled or called?"""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def on_device(self) -> bool:
        """Do the arrays lie on a CUDA device? Then q, k, v, bias and mask are `DeviceArray`, with
        dtypes of their own, and so is `result`, which the backend allocates if it has no owner.
        """
        return isinstance(self.q, DeviceArray)

    @property
    def accumulator(self) -> np.dtype:
        """The dtype of sums and of ``lse``: float64 for float64, else float32."""
        return _FLOAT64 if self.dtype is _FLOAT64 else _FLOAT32

    @property
    def group(self) -> int:
        """How many query heads read one key head."""
        return self.heads // self.kv_heads if self.kv_heads else 1

    def rows(self, dim: int | None = None) -> tuple[int, ...]:
        """The shape of a result with one entry (or `dim` entries) per query."""
        shape = (*self.batch, self.heads, self.n_queries)
        return shape if dim is None else (*shape, dim)

    def intervals(self) -> tuple[np.ndarray, np.ndarray] | None:
        """``(start, stop)`` such that a query sees keys ``start <= j < stop`` and no structured
        mask hides one of those; int64, broadcastable to ``(batch, heads, queries)``, within
        ``0..n_keys``, empty where ``stop <= start``. None if every query sees every key.
        """
        left, right = self.window
        if self.causal:
            right = 0  # a window's right side is never negative, so causal is the tighter
        if left is None and right is None and self.kv_lengths is None and self.spans is None:
            return None
        start = np.zeros(1, np.int64)
        stop = np.full(1, self.n_keys, np.int64)
        if left is not None or right is not None:
            offset = self.q_offset
            if isinstance(offset, np.ndarray):
                offset = offset[..., None, None]
            position = np.arange(self.n_queries) + offset
            if left is not None:
                start = np.maximum(position - left, 0)
            if right is not None:
                stop = np.minimum(position + (right + 1), self.n_keys)
        if self.kv_lengths is not None:
            stop = np.minimum(stop, self.kv_lengths[..., None, None])
        if self.spans is not None:
            start = np.maximum(start, self.spans[0])
            stop = np.minimum(stop, self.spans[1])
        return np.minimum(start, self.n_keys), np.maximum(stop, 0)


def pose(
    q, k, v, scale=None, softcap=None, bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    return_lse=False, return_weights=False, out=None, threads=None, precision=None,
    gradients=False, wrt=(), score_mod=None, mask_mod=None, block_mask=None,
    k_scales=None, v_scales=None, measure=DOT,
) -> Problem:  # fmt: skip
    """Check the arguments of `fastattn.scaled_dot`, or of `fastattn.flex`, and state the problem
    they pose.

    With ``gradients=True`` those of `q`, `k`, `v` and the options named in ``wrt`` are to come.

    The scales of int8 keys and values are a `KVCache`'s own, and not checked. A `measure` other
    than `DOT` comes with a scale; what is wrong with its weights is said of ``w``.

    Raises
    ------
    TypeError, ValueError
        The message begins with the name of the offending argument.
    """
    if not (type(q) is _ndarray and type(k) is _ndarray and type(v) is _ndarray):
        q = _operand("q", q)
        k, v = _operand("k", k, q), _operand("v", v, q)
    given = None
    if gradients:
        given = {"q": q, "k": k, "v": v, "bias": bias, "alibi": alibi, "sinks": sinks}
        if measure.name == "additive":
            given["w"] = measure.weights
    one_head = False
    if not (q.ndim > 2 and k.ndim > 2 and v.ndim > 2):
        one_head = q.ndim == k.ndim == v.ndim == 2
        q, k, v = _with_heads("q", q), _with_heads("k", k), _with_heads("v", v)
    dtype = q.dtype
    copied: tuple[str, ...] = ()
    if not (
        (dtype is _FLOAT32 or dtype is _FLOAT64)
        and k.dtype is dtype and v.dtype is dtype
        and q.flags.aligned and k.flags.aligned and v.flags.aligned
    ):  # fmt: skip
        originals = (q, k, v)
        if k_scales is None:
            dtype = _promote(q, k, v)
            kv_dtype = k.dtype if _widened(k, v, dtype) else dtype
        else:
            dtype, kv_dtype = float_dtype("q", q), k.dtype
        q, k, v = _readable(q, dtype), _readable(k, kv_dtype), _readable(v, kv_dtype)
        pairs = zip("qkv", originals, (q, k, v), strict=True)
        copied = tuple(n for n, old, new in pairs if old is not new and not _may_overlap(old, new))

    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    batch = q_shape[:-3]
    heads, n_queries, head_dim = q_shape[-3:]
    kv_heads, n_keys, k_dim = k_shape[-3:]
    v_heads, v_keys, value_dim = v_shape[-3:]
    if k_dim != head_dim:
        raise ValueError(f"k: head_dim {k_dim} differs from q's {head_dim}")
    if head_dim < 1:
        raise ValueError("q: head_dim 0 given, at least 1 wanted")
    if v_keys != n_keys:
        raise ValueError(f"v: {v_keys} keys differ from k's {n_keys}")
    if k_shape[:-3] != batch or v_shape[:-3] != batch:
        batch = _broadcast_batch(batch, k_shape[:-3], v_shape[:-3])
    if v_heads != kv_heads:
        if kv_heads != 1 and v_heads != 1:
            raise ValueError(f"v: {v_heads} heads given, k's {kv_heads} or 1 wanted")
        kv_heads = v_heads if kv_heads == 1 else kv_heads
    if heads != kv_heads:
        if heads == 1:
            heads = kv_heads
        elif kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"k: {kv_heads} heads given, a divisor of q's {heads} wanted")

    rows = (*batch, heads, n_queries)
    scale = head_dim**-0.5 if scale is None else number("scale", scale)
    if softcap is not None:
        softcap = number("softcap", softcap)
        if not 0 < softcap < np.inf:
            raise ValueError(f"softcap: {softcap} given, a finite number > 0 wanted")
    if bias is not None:
        bias = _bias(bias, (*rows, n_keys), q)
    if mask is not None:
        mask = _mask(mask, (*rows, n_keys), q)
    if alibi is not None:
        alibi = _per_head("alibi", alibi, heads)
    if sinks is not None:
        sinks = _per_head("sinks", sinks, heads)
    if measure.name == "additive":
        measure = measure._replace(weights=vector("w", measure.weights, head_dim))

    if causal is not False:
        causal = flag("causal", causal)
    if return_lse is not False:
        return_lse = flag("return_lse", return_lse)
    if return_weights is not False:
        return_weights = flag("return_weights", return_weights)
    window = (None, None) if window is None else window_sides(window)
    if kv_lengths is not None:
        kv_lengths = _kv_lengths(kv_lengths, batch, n_keys)
        positional = causal or alibi is not None or window != (None, None)
        if q_offset is None and positional:
            raise ValueError(
                "q_offset: None given with kv_lengths and causal, window or alibi; pass 0 for a "
                "padded batch of whole sequences, kv_lengths - n_queries for a cache"
            )
    q_offset = n_keys - n_queries if q_offset is None else _q_offset(q_offset, batch)
    if spans is not None:
        spans = _spans(spans, rows, n_keys)
    if threads is not None:
        threads = count("threads", threads)
    if precision is not None and precision != "bfloat16":
        raise ValueError(f"precision: {precision!r} given, None or 'bfloat16' wanted")
    wanted = () if given is None else _gradients(wrt, given, dtype)
    if score_mod is not None:
        function("score_mod", score_mod)
    if mask_mod is not None:
        function("mask_mod", mask_mod)
    if block_mask is not None:
        _block_mask(block_mask, mask_mod, (math.prod(batch), heads, n_queries, n_keys))
        mask_mod = block_mask.mask_mod

    shape = (*rows, value_dim)
    if out is not None:
        result, out = _out(out, shape, dtype, one_head, (q, k, v, bias, mask))
    elif q.flags.c_contiguous:
        result = np.empty(shape, dtype)
    else:
        result = empty_like(q, shape, dtype)
    return Problem(
        q, k, v, k_scales, v_scales, dtype, batch, heads, kv_heads, n_queries, n_keys,
        head_dim, value_dim, scale, softcap, bias, alibi, sinks,
        causal, window, q_offset, kv_lengths, spans, mask,
        return_lse, return_weights, result, out, one_head, threads, precision, copied,
        wanted, score_mod, mask_mod, block_mask, measure,
    )  # fmt: skip


def count(name: str, value) -> int:
    """A whole number of at least 1, or an error that names the argument."""
    n = _integer(name, value)
    if n < 1:
        raise ValueError(f"{name}: {n} given, at least 1 wanted")
    return n


def function(name: str, value) -> None:
    """A Python function, or a compiled one that was made of it; else an error that names it."""
    if not isinstance(getattr(value, "py_func", value), FunctionType):
        raise TypeError(f"{name}: {type(value).__name__} given, a function wanted")


def _operand(name, value, q=None):
    """`value` as an array, which must lie where `q` does."""
    if type(value) is not _ndarray and on_device(value):
        if q is not None and not isinstance(q, DeviceArray):
            raise TypeError(f"{name}: on a CUDA device, one in the host's memory like q wanted")
        x = DeviceArray(name, value)
        if q is not None and None not in (x.device, q.device) and x.device != q.device:
            raise ValueError(f"{name}: on CUDA device {x.device}, one on q's {q.device} wanted")
        return x
    if isinstance(q, DeviceArray):
        raise TypeError(f"{name}: in the host's memory, one on the CUDA device like q wanted")
    return plain(name, value)


def plain(name, value) -> np.ndarray:
    """`value` as an array in the host's memory, or an error that names the argument."""
    if type(value) is not _ndarray and on_device(value):
        raise TypeError(f"{name}: on a CUDA device, one in the host's memory wanted")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked array given, a plain array wanted; pass mask= instead")
    try:
        return np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name}: not an array: {error}") from None


def _readable(x, dtype):
    """`x` as backends read it: native, aligned, of that dtype; on a device the kernel converts."""
    if isinstance(x, DeviceArray) or (x.dtype is dtype and x.flags.aligned):
        return x
    return np.require(x, dtype, "A")


def _may_overlap(x, y) -> bool:
    return x.may_overlap(y) if isinstance(x, DeviceArray) else np.may_share_memory(x, y)


def _with_heads(name, x):
    if x.ndim < 2:
        raise ValueError(f"{name}: {x.ndim} axes given, at least 2 wanted: (..., length, dim)")
    return x[None] if x.ndim == 2 else x


def _is_bfloat16(dtype) -> bool:
    return dtype.name == "bfloat16"


def _is_real(dtype) -> bool:
    return dtype.kind in "fiu" or _is_bfloat16(dtype)


def _widened(k, v, dtype) -> bool:
    """Do backends read `k` and `v` as they lie, though narrower than the result's `dtype`?"""
    return dtype is _FLOAT32 and k.dtype == v.dtype and k.dtype.isnative


def float_dtype(name: str, x: np.ndarray) -> np.dtype:
    """The dtype that `x` is computed in, or an error that names the argument."""
    dtype = _computed_in(x.dtype)
    if dtype is None:
        raise TypeError(f"{name}: {x.dtype} given, {_FLOATS} wanted")
    return dtype


@lru_cache  # a dtype's name takes 2 us
def _computed_in(dtype: np.dtype) -> np.dtype | None:
    if dtype.kind in "biu":
        return _FLOAT64
    if dtype.name in ("float16", "bfloat16", "float32", "float64"):
        return np.dtype(dtype.type)  # native
    return None


def _promote(q, k, v) -> np.dtype:
    return widest({float_dtype("q", q), float_dtype("k", k), float_dtype("v", v)})


def widest(wanted: set) -> np.dtype:
    """The dtype in which all of `wanted` are computed together."""
    for dtype in (_FLOAT64, _FLOAT32):
        if dtype in wanted:
            return dtype
    return wanted.pop() if len(wanted) == 1 else _FLOAT32  # float16 with bfloat16


def _broadcast_batch(q_batch, k_batch, v_batch):
    batch = q_batch
    for name, other in (("k", k_batch), ("v", v_batch)):
        try:
            batch = np.broadcast_shapes(batch, other)
        except ValueError:
            raise ValueError(
                f"{name}: leading axes {other} do not broadcast with {batch}"
            ) from None
    return batch


def as_real(x, scales, real):
    """Keys or values in the dtype `real`, each row times its number in `scales` where given."""
    x = x.astype(real)
    return x if scales is None else x * scales[..., None].astype(real)


def flag(name: str, value) -> bool:
    """True or False, or an error that names the argument."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name}: {type(value).__name__} given, bool wanted")


def number(name: str, value) -> float:
    """A real number, or an error that names the argument."""
    if type(value) is float:
        return value
    x = plain(name, value)
    if x.ndim or not _is_real(x.dtype):
        what = x.dtype if x.ndim == 0 else f"array of shape {x.shape}"
        raise TypeError(f"{name}: {what} given, a real number wanted")
    return float(x)


def _integer(name, value) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {type(value).__name__} given, an integer wanted") from None


def integers(name: str, value) -> np.ndarray:
    """`value` as int64, far values drawn in to +-2**61."""
    x = plain(name, value)
    if x.dtype.kind == "O" and all(isinstance(item, int) for item in x.flat):
        pass  # Python integers too large for int64
    elif x.dtype.kind not in "iu" and x.size:
        raise TypeError(f"{name}: {x.dtype} given, integers wanted")
    if x.dtype.kind == "u":
        return np.minimum(x, np.asarray(_FAR, np.uint64)).astype(np.int64)
    return np.asarray(np.clip(x, -_FAR, _FAR)).astype(np.int64)


def _broadcast(name, x, shape, axes):
    try:
        return x.broadcast_to(shape) if isinstance(x, DeviceArray) else np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(
            f"{name}: shape {x.shape} given, one that broadcasts to {axes} = {shape} wanted"
        ) from None


def _bias(value, shape, q):
    x = _operand("bias", value, q)
    if x.dtype.kind == "b":
        raise TypeError("bias: bool given, numbers wanted; pass which keys are seen as mask=")
    if not _is_real(x.dtype):
        raise TypeError(f"bias: {x.dtype} given, real numbers wanted")
    return _broadcast("bias", x, shape, "(..., heads, queries, keys)")


def _mask(value, shape, q):
    x = _operand("mask", value, q)
    if x.dtype.kind != "b":
        raise TypeError(f"mask: {x.dtype} given, bool wanted; pass scores to add as bias=")
    return _broadcast("mask", x, shape, "(..., heads, queries, keys)")


def _per_head(name, value, heads) -> np.ndarray:
    x = plain(name, value)
    if not _is_real(x.dtype):
        raise TypeError(f"{name}: {x.dtype} given, real numbers wanted")
    if x.shape != (heads,):
        raise ValueError(f"{name}: shape {x.shape} given, one per query head, ({heads},), wanted")
    return x.astype(np.float64)


def vector(name: str, value, dim: int) -> np.ndarray:
    """`dim` real numbers as float64, or an error that names the argument."""
    x = plain(name, value)
    if not _is_real(x.dtype):
        raise TypeError(f"{name}: {x.dtype} given, real numbers wanted")
    if x.shape != (dim,):
        raise ValueError(f"{name}: shape {x.shape} given, ({dim},) wanted")
    return np.ascontiguousarray(x, np.float64)


def window_sides(value) -> tuple[int | None, int | None]:
    """``(left, right)`` of a window, or an error."""
    if isinstance(value, (tuple, list)):
        sides = tuple(value)
        if len(sides) != 2:
            raise ValueError(f"window: {len(sides)} sides given, (left, right) wanted")
    else:
        sides = (value, value)
    left, right = (None if side is None else _integer("window", side) for side in sides)
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(f"window: {side} given, sides of at least 0 wanted")
    return (
        None if left is None else min(left, _FAR),
        None if right is None else min(right, _FAR),
    )


def _kv_lengths(value, batch, n_keys) -> np.ndarray:
    x = integers("kv_lengths", value)
    if x.size and (x.min() < 0 or x.max() > n_keys):
        wrong = next(n for n in np.asarray(value).flat if not 0 <= n <= n_keys)
        raise ValueError(f"kv_lengths: {wrong} given, 0..{n_keys} wanted")
    return _broadcast("kv_lengths", x, batch, "the leading axes")


def _q_offset(value, batch) -> int | np.ndarray:
    if type(value) is int and -_FAR < value < _FAR:
        return value
    x = integers("q_offset", value)
    return int(x) if x.ndim == 0 else _broadcast("q_offset", x, batch, "the leading axes")


def span_sides(value) -> tuple:
    """``(start, stop)`` as given, or an error."""
    try:
        start, stop = value
    except (TypeError, ValueError):
        raise TypeError(f"spans: {type(value).__name__} given, (start, stop) wanted") from None
    return start, stop


def _spans(value, rows, n_keys) -> tuple[np.ndarray, np.ndarray]:
    start, stop = (_span(x, rows, n_keys) for x in span_sides(value))
    return start, stop


def _span(value, rows, n_keys) -> np.ndarray:
    quick = type(value) is _ndarray and value.dtype is _INT64  # far ones need no drawing in
    x = value if quick else integers("spans", value)
    x = np.minimum(np.maximum(x, 0), n_keys)  # np.clip takes four times as long for a few
    return _broadcast("spans", x, rows, "(..., heads, queries)")


def _block_mask(value, mask_mod, grid) -> None:
    if not isinstance(value, BlockMask):
        raise TypeError(
            f"block_mask: {type(value).__name__} given, the result of fastattn.block_mask wanted"
        )
    if mask_mod is not None and mask_mod is not value.mask_mod:
        raise ValueError("block_mask: made from another mask_mod than the one given")
    made_for = (*value.blocks.shape[:2], value.n_queries, value.n_keys)
    fits = all(made in (1, n) for made, n in zip(made_for[:2], grid, strict=False))
    if not fits or made_for[2:] != grid[2:]:
        raise ValueError(
            f"block_mask: made for (batch, heads, n_queries, n_keys) {made_for}, {grid} wanted"
        )


def check_wrt(wrt, given: dict) -> None:
    """An error if `wrt` is no tuple of names of arrays that are given."""
    if isinstance(wrt, str) or not isinstance(wrt, Sequence):
        raise TypeError(f"wrt: {type(wrt).__name__} given, a tuple of names wanted")
    for name in wrt:
        if not isinstance(name, str) or name not in given:
            names = ", ".join(map(repr, given))
            raise ValueError(f"wrt: {name!r} given, some of {names} wanted")
        if given[name] is None:
            raise ValueError(f"wrt: {name!r} given, but no {name}=")


def _gradients(wrt, given: dict, dtype) -> tuple[Gradient, ...]:
    check_wrt(wrt, {name: x for name, x in given.items() if name not in "qkv"})
    arrays = [(name, given[name]) for name in "qkv"]
    arrays += [(name, _operand(name, given[name])) for name in wrt]
    return tuple(gradient_of(name, x, dtype) for name, x in arrays)


def gradient_of(name: str, x, dtype) -> Gradient:
    """That of the argument `x` of a call with results of `dtype`."""
    return Gradient(name, x.shape, _with(dtype, x.dtype))


def _with(dtype, other) -> np.dtype:
    """The wider of `dtype` and the real dtype `other`; long double counts as float64."""
    short = (other.kind == "f" and other.itemsize < 8) or _is_bfloat16(other)
    return widest({dtype, other.newbyteorder("=") if short else _FLOAT64})


def empty_like(x, shape, dtype):
    """An array of `shape` whose axes lie in memory in the order of x's."""
    if isinstance(x, DeviceArray):
        return x.planned(shape, dtype)
    lead = len(shape) - x.ndim
    x = x.reshape((1,) * lead + x.shape) if lead else x
    return np.empty_like(x, dtype, shape=shape, subok=False)


def _out(out, shape, dtype, one_head, inputs):
    """Where a backend may write, and `out` if that is elsewhere because `out` itself would do
    harm (it overlaps an input) or cannot be written by a kernel.
    """
    q = inputs[0]
    x = _operand("out", out, q) if isinstance(q, DeviceArray) else out
    if not isinstance(x, (np.ndarray, DeviceArray)) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"out: {type(out).__name__} given, a plain NumPy array wanted")
    wanted = shape[1:] if one_head else shape
    if x.shape != wanted:
        raise ValueError(f"out: shape {x.shape} given, {wanted} wanted")
    if x.dtype.newbyteorder("=") != dtype:
        raise ValueError(f"out: {x.dtype} given, {dtype} wanted")
    if not x.flags.writeable:
        raise ValueError("out: read-only array given, a writeable one wanted")
    if _overlaps_itself(x):
        raise ValueError("out: overlaps itself in memory, every element of its own wanted")
    writable = x.dtype.isnative and x.flags.aligned and type(x) in (np.ndarray, DeviceArray)
    if writable and not any(_may_overlap(x, y) for y in inputs if y is not None):
        return (x[None] if one_head else x), None
    return empty_like(q, shape, dtype), out


def _overlaps_itself(x) -> bool:
    axes = sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1)
    if x.size == 0:
        return False
    extent = x.itemsize
    for stride, n in axes:
        if stride < extent:
            break
        extent += stride * (n - 1)
    else:
        return False  # each axis steps over all that lies within
    # Interleaved axes: rare enough to look at every address.
    address = np.zeros(1, np.int64)
    for stride, n in axes:
        address = (address[:, None] + stride * np.arange(n)).ravel()
    address.sort()
    return bool((np.diff(address) < x.itemsize).any())
