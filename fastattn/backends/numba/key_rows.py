"""Keys and values of a sub-block as rows of numbers: in place, or widened in the scratch."""

from __future__ import annotations

from .memory import floats, ints, reals
from .numbers import REAL, widen
from .vectors import VECTOR_BYTES, compiled, lanes

__all__ = ["key_rows", "value_rows"]


@compiled
def key_rows(t, first, last, scale):
    """``(address, row, dim)`` of the keys ``first <= j < last``."""
    return _rows(t, t.k_head, t.k_row, t.k_dim, t.k_page, t.k_format, t.k_scale, t.k_scales_row,
                 t.k_scales_page, t.head_dim, first, last, scale)  # fmt: skip


@compiled
def value_rows(t, first, last, scale):
    """Those of the values."""
    return _rows(t, t.v_head, t.v_row, t.v_dim, t.v_page, t.v_format, t.v_scale, t.v_scales_row,
                 t.v_scales_page, t.value_dim, first, last, scale)  # fmt: skip


@compiled
def _rows(
    t, head, row, dim, page, format, scales, scales_row, scales_page, dims, first, last, scale
):
    paged = t.block_table != 0
    if last <= first or (format == REAL and (not paged or first // t.page == (last - 1) // t.page)):
        return _row(t, head, row, page, first) if first < last else head, row, dim
    size = VECTOR_BYTES // lanes(scale)
    key, to = first, t.widened
    while key < last:
        keys = min(last - key, t.page - key % t.page) if paged else last - key
        at, own = _row(t, head, row, page, key), _row(t, scales, scales_row, scales_page, key)
        widen(at, row, dim, keys, dims, format, floats(own), scales_row, reals(to, scale))
        to += keys * dims * size
        key += keys
    return t.widened, dims * size, size


@compiled
def _row(t, head, row, page, key):
    """Where the row of a key is."""
    if t.block_table == 0:
        return head + key * row
    return head + ints(t.own_pages)[key // t.page] * page + key % t.page * row
