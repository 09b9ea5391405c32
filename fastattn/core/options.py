"""The options of a call, checked: each as a `Problem` has it, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from .arguments import FAR, broadcast, in_range, integer, integers, number, operand, plain
from .block_mask import BlockMask
from .dropout import Dropout
from .dtypes import is_real
from .sparse_mask import is_sparse, sparse_mask

__all__ = [
    "bias_array", "check_block_mask", "check_wrt", "dropout_of", "dropout_start", "key_lengths",
    "mask_array", "per_head", "query_offset", "relative_bias_array", "score_scale", "span_arrays",
    "span_sides", "window_sides", "wrt_names",
]  # fmt: skip

_INT64 = np.dtype(np.int64)


def bias_array(value, shape, q):
    x = operand("bias", value, q)
    if x.dtype.kind == "b":
        raise TypeError("bias: expected real numbers, got bool; pass which keys are seen as mask=")
    if not is_real(x.dtype):
        raise TypeError(f"bias: expected real numbers, got {x.dtype}")
    return broadcast("bias", x, shape, "(..., heads, queries, keys)")


def mask_array(value, shape, q):
    if is_sparse(value):
        return sparse_mask(value, shape[:-3], *shape[-2:])
    x = operand("mask", value, q)
    if x.dtype.kind != "b":
        hint = "scores to add go into bias="
        if x.dtype.kind in "iu":
            hint = f"mask.astype(bool) makes one of zeros and ones; {hint}"
        raise TypeError(f"mask: expected bool, got {x.dtype}; {hint}")
    return broadcast("mask", x, shape, "(..., heads, queries, keys)")


def per_head(name, value, heads, real) -> np.ndarray:
    """A number for each query head as float64, within the range of sums of dtype `real`."""
    x = plain(name, value)
    if not is_real(x.dtype):
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.shape != (heads,):
        raise ValueError(f"{name}: expected shape ({heads},), one per query head, got {x.shape}")
    return in_range(x, real).astype(np.float64)


def score_scale(value, heads, real) -> float | np.ndarray:
    """One number for all query heads, or one for each as `per_head` has them."""
    if not isinstance(value, Real):
        value = plain("scale", value)
        if value.ndim:
            return per_head("scale", value, heads, real)
    return float(in_range(np.asarray(number("scale", value)), real))


def relative_bias_array(value, heads, real) -> np.ndarray:
    """A number for each query head and distance as float64, as `per_head` has them."""
    x = plain("relative_bias", value)
    if not is_real(x.dtype):
        raise TypeError(f"relative_bias: expected real numbers, got {x.dtype}")
    if x.ndim != 2 or x.shape[0] != heads or x.shape[1] % 2 == 0:
        raise ValueError(
            f"relative_bias: expected shape ({heads}, 2 * R + 1), one row per query head and an "
            f"odd number of distances, got {x.shape}"
        )
    return np.array(in_range(x, real), np.float64, order="C")  # `out` may overlap it


def window_sides(value) -> tuple[int | None, int | None]:
    """``(left, right)`` of a window, or an error."""
    if isinstance(value, (tuple, list)):
        sides = tuple(value)
        if len(sides) != 2:
            raise ValueError(f"window: expected (left, right), got {len(sides)} sides")
    else:
        sides = (value, value)
    left, right = (None if side is None else integer("window", side) for side in sides)
    for side in (left, right):
        if side is not None and side < 0:
            raise ValueError(f"window: expected sides of at least 0, got {side}")
    return (
        None if left is None else min(left, FAR),
        None if right is None else min(right, FAR),
    )


def key_lengths(value, batch, n_keys) -> np.ndarray:
    x = integers("kv_lengths", value)
    if x.size and (x.min() < 0 or x.max() > n_keys):
        wrong = next(n for n in plain("kv_lengths", value).flat if not 0 <= n <= n_keys)
        raise ValueError(f"kv_lengths: expected 0..{n_keys}, got {wrong}")
    return broadcast("kv_lengths", x, batch, "the leading axes")


def query_offset(value, batch) -> int | np.ndarray:
    """An int, or an array of (batch, 1)."""
    if type(value) is int and -FAR < value < FAR:
        return value
    x = integers("q_offset", value)
    if x.ndim == 0:
        return int(x)
    return broadcast("q_offset", x, batch, "the leading axes")[..., None]


def span_sides(value) -> tuple:
    """``(start, stop)`` as given, or an error."""
    try:
        start, stop = value
    except (TypeError, ValueError):
        raise TypeError(f"spans: expected (start, stop), got {type(value).__name__}") from None
    return start, stop


def span_arrays(value, rows, n_keys) -> tuple[np.ndarray, np.ndarray]:
    start, stop = (_span(x, rows, n_keys) for x in span_sides(value))
    return start, stop


def _span(value, rows, n_keys) -> np.ndarray:
    quick = type(value) is np.ndarray and value.dtype is _INT64  # far ones need no drawing in
    x = value if quick else integers("spans", value)
    x = np.minimum(np.maximum(x, 0), n_keys)  # np.clip takes four times as long for a few
    return broadcast("spans", x, rows, "(..., heads, queries)")


def dropout_of(value, offset) -> Dropout | None:
    """The `Dropout` of these options; None for a rate of 0."""
    place = dropout_start(offset)
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"dropout: expected (rate, seed), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"dropout: expected (rate, seed), got {len(value)} numbers")
    rate, seed = number("dropout", value[0]), integer("dropout", value[1])
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: expected a rate of at least 0 and below 1, got {rate}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"dropout: expected a seed in 0..2**64 - 1, got {seed}")
    return Dropout(rate, seed, place) if rate > 0 else None


def dropout_start(value) -> tuple[int, int, int, int]:
    """The (b, h, i, j) of a call's first weight in a whole."""
    if value is None:
        return 0, 0, 0, 0
    try:
        items = tuple(value)
    except TypeError:
        raise TypeError(
            f"dropout_offset: expected (b, h, i, j), got {type(value).__name__}"
        ) from None
    if len(items) != 4:
        raise ValueError(f"dropout_offset: expected (b, h, i, j), got {len(items)} numbers")
    b, h, i, j = (integer("dropout_offset", item) for item in items)
    for x in (b, h, i, j):
        if not 0 <= x < 1 << 63:
            raise ValueError(f"dropout_offset: expected numbers in 0..2**63 - 1, got {x}")
    return b, h, i, j


def check_block_mask(value, mask_mod, grid) -> None:
    if not isinstance(value, BlockMask):
        raise TypeError(
            f"block_mask: expected the result of fastattn.block_mask, got {type(value).__name__}"
        )
    if mask_mod is not None and mask_mod is not value.mask_mod:
        raise ValueError("block_mask: expected one made from this mask_mod, got one of another")
    made_for = (*value.blocks.shape[:2], value.n_queries, value.n_keys)
    fits = all(made in (1, n) for made, n in zip(made_for[:2], grid, strict=False))
    if not fits or made_for[2:] != grid[2:]:
        raise ValueError(
            f"block_mask: expected one made for (batch, heads, n_queries, n_keys) {grid}, "
            f"got one for {made_for}"
        )


def check_wrt(wrt, given: dict) -> None:
    """An error if `wrt` is no tuple of names of arrays that are given."""
    for name in wrt_names(wrt):
        if name not in given:
            raise ValueError(f"wrt: expected some of {', '.join(map(repr, given))}, got {name!r}")
        if given[name] is None:
            raise ValueError(
                f"wrt: expected names of arrays that are passed, got {name!r} without {name}="
            )


def wrt_names(wrt) -> Sequence[str]:
    """`wrt`, or an error if it is no tuple of names."""
    if isinstance(wrt, str) or not isinstance(wrt, Sequence):
        raise TypeError(f"wrt: expected a tuple of names, got {type(wrt).__name__}")
    for name in wrt:
        if not isinstance(name, str):
            raise TypeError(f"wrt: expected a tuple of names, got {name!r} in it")
    return wrt
