"""What a call tells a kernel of sizes and strides: one vector of integers on the device.

It begins with the numbers named here, then come the sizes of the leading axes, then a record for
each operand: where it begins, its strides along the leading axes, of a head, a row and a column,
all in elements. A kernel finds its own place with these, so nothing is listed per batch or head.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

from .toolkit import device_function

__all__ = ["Fields", "Operands", "pack", "place_of", "strides_of"]


# The places of single numbers in the vector.
_FIELDS = (
    "N_QUERIES", "N_KEYS", "VALUE_DIM", "HEADS",
    "GROUP",  # query heads to a key head
    "SHARE",  # query heads that share a tile: GROUP or 1
    "OF_ENTRY",  # 1 where the table of positions has a column for each batch entry, else 0
    "ENTRIES",  # the length of its rows
    "LEFT", "RIGHT",  # sides of the window, -1 where unbounded
    "REACH",  # of the relative bias
    "PART_KEYS",  # that one part of the blocks goes through
    "PARTS", "OUT_PART", "ROW_PART",  # parts, and their distance in the sums and in lse
    "SPANS",  # 1 where there are any
    "FLAGS",  # slices of the kernel that flags rows, each with its own
    "AXES",  # leading axes
)  # fmt: skip
Fields: Any = namedtuple("Fields", _FIELDS)(*range(len(_FIELDS)))

# The places of the records. OUT may be a part, for RESULT to be merged of.
_OPERANDS = ("Q", "K", "V", "OUT", "MASK", "BIAS", "START", "STOP", "RESULT")
Operands: Any = namedtuple("Operands", _OPERANDS)(*range(len(_OPERANDS)))

AXES, COUNT = Fields.AXES, len(Fields)


def pack(fields: dict[int, int], sizes, records) -> tuple[int, ...]:
    """The vector; a record is ``(first, strides)`` with a stride for each axis."""
    numbers = [0] * COUNT
    for place, number in fields.items():
        numbers[place] = number
    numbers[AXES] = len(sizes)
    numbers += sizes
    for first, strides in records:
        numbers.append(first)
        numbers += strides
    return tuple(numbers)


@device_function
def place_of(layout, operand, entry, head):
    """Where an operand begins for one batch entry and head, in elements."""
    axes = layout[AXES]
    record = COUNT + axes + operand * (axes + 4)
    place = layout[record] + head * layout[record + axes + 1]
    for axis in range(axes - 1, 0, -1):
        place += entry % layout[COUNT + axis] * layout[record + 1 + axis]
        entry //= layout[COUNT + axis]
    return place + entry * layout[record + 1]


@device_function
def strides_of(layout, operand):
    """Its strides of a head, a row and a column, in elements."""
    axes = layout[AXES]
    last = COUNT + axes + operand * (axes + 4) + axes + 1
    return layout[last], layout[last + 1], layout[last + 2]
