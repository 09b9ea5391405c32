"""Which keys the rows of a tile may see, by the intervals of `core.visibility.KeyRange`."""

from __future__ import annotations

import numpy as np

from .layout import Fields, Operands, place_of, strides_of
from .tile import Geometry
from .toolkit import cuda, device_function

__all__ = ["key_limits", "row_describer"]

N_KEYS, LEFT, RIGHT = Fields.N_KEYS, Fields.LEFT, Fields.RIGHT
SHARE, PARTS, PART_KEYS, Q = Fields.SHARE, Fields.PARTS, Fields.PART_KEYS, Operands.Q


def row_describer(b: Geometry):
    """A device function that fills what is kept of each row, and the bounds of the tile."""
    BLOCK_Q = b.queries

    def describe_rows(rows, layout, positions, start, stop, per_head, entry, first_head,
                      first_row, n_rows, bounds, t):  # fmt: skip
        if t == 0:
            bounds[0] = layout[N_KEYS]
            bounds[1] = 0
            bounds[2] = 0
            bounds[3] = layout[N_KEYS]
        cuda.syncthreads()
        if t < n_rows:
            share = layout[SHARE]
            i, h = (first_row + t) // share, (first_row + t) % share
            rows.query[t], rows.head[t] = i, h
            q_head, q_row, _ = strides_of(layout, Q)
            rows.place[t] = place_of(layout, Q, entry, first_head) + i * q_row + h * q_head
            rows.scale[t] = per_head[first_head + h]
            low, high = limits_of_row(layout, positions, start, stop, entry, first_head + h, i)
            rows.start[t], rows.stop[t] = low, high
            if low < high:
                cuda.atomic.min(bounds, 0, low)
                cuda.atomic.max(bounds, 1, high)
            cuda.atomic.max(bounds, 2, low)
            cuda.atomic.min(bounds, 3, high)
        elif t < BLOCK_Q:
            rows.query[t], rows.head[t], rows.start[t], rows.stop[t] = 0, 0, 0, 0
        cuda.syncthreads()

    return device_function(describe_rows)


@device_function
def limits_of_row(layout, positions, start, stop, entry, head, i):
    """The keys ``[low, high)`` that the intervals of query `i` show."""
    start_at = stop_at = np.int64(-1)
    if layout[Fields.SPANS]:
        start_at = place_of(layout, Operands.START, entry, head)
        start_at += i * strides_of(layout, Operands.START)[1]
        stop_at = place_of(layout, Operands.STOP, entry, head)
        stop_at += i * strides_of(layout, Operands.STOP)[1]
    return row_limits(layout, positions, start, stop, start_at, stop_at, entry, i)


@device_function
def key_limits(bounds, layout, part):
    """The keys [first, last) seen by some row, [inner_first, inner_last) by every row, within a
    part of the keys.
    """
    first, last = bounds[0], bounds[1]
    if layout[PARTS] > 1:
        first = max(first, part * layout[PART_KEYS])
        last = min(last, (part + 1) * layout[PART_KEYS])
    return first, last, bounds[2], bounds[3]


@device_function
def row_limits(layout, positions, start, stop, start_at, stop_at, entry, i):
    """The keys ``[low, high)`` that the intervals of query `i` show."""
    offset = positions[entry * layout[Fields.OF_ENTRY]]
    length = positions[layout[Fields.ENTRIES] + entry * layout[Fields.OF_ENTRY]]
    low, high = np.int64(0), length
    if layout[LEFT] >= 0:
        low = max(low, i + offset - layout[LEFT])
    if layout[RIGHT] >= 0:
        high = min(high, i + offset + layout[RIGHT] + 1)
    if start_at >= 0:
        low = max(low, start[start_at])
        high = min(high, stop[stop_at])
    return min(low, layout[N_KEYS]), max(high, np.int64(0))
