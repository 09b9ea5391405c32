"""Which keys of a sub-block are visible: key ranges, masks and the user's mask function."""

from __future__ import annotations

import numpy as np

from .hooks import POSITIVE, for_rows
from .memory import ahead, flags, ints, nonzero_bytes, own_flags, uint64s
from .tile import (
    EMPTY,
    FULL,
    INNER_FIRST,
    INNER_LAST,
    MASK_QUERIES,
    MICROPANEL_FIELDS,
    PARTIAL,
    SUB_BLOCK_K,
    SUB_FIELDS,
    SUB_FIRST,
    SUB_LAST,
    SUB_VECS,
    SUB_VISIBILITY,
    VECS,
    inlined,
    mask_rows,
    row_of,
    subs_of,
    visible_in_block,
)
from .vectors import TILE_VECS, compiled, lanes

# The vectors of a micropanel are computed one by one where all together would compute so many times
# the scores. More than 1, because one vector loads as many keys as all of them.
SPLIT_GAIN = 1.25


@compiled
def classify(t, p, key, keys, begin, scale, mask_mod):
    """The visibility of `keys` keys from `key` on to a micropanel, before their scores are known.

    If it is PARTIAL, sets visible[key][lane].
    """
    if keys <= 0:
        return EMPTY
    micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
    visible = visible_in_block(t, scale, p, key - begin)
    visibility = FULL
    inside = micropanel[INNER_FIRST] <= key and key + keys <= micropanel[INNER_LAST]
    if not inside or t.mask != 0:
        visibility = classify_by_bits(t, p, key, keys, visible, scale)
    if mask_mod is not None and visibility != EMPTY:
        visibility = call_mask_mod(t, p, key, keys, visible, visibility, scale, mask_mod)
    return visibility


@compiled
def any_set(visible, count):
    """Is any of the first `count` flags set?"""
    some = np.uint8(0)
    for x in range(count):
        some = np.uint8(some | visible[x])
    return some != 0


@inlined
def bound_sub(t, p, n, sub, key, keys, begin, scale):
    """Find the first and the last key that a query of vector `n` sees, or that there is none."""
    width, size = lanes(scale), TILE_VECS * lanes(scale)
    visible = ahead(visible_in_block(t, scale, p, key - begin), n * width)
    first, last = 0, keys
    while first < last and not any_set(ahead(visible, first * size), width):
        first += 1
    while first < last and not any_set(ahead(visible, (last - 1) * size), width):
        last -= 1
    sub[SUB_VECS], sub[SUB_VISIBILITY] = 1 if first < last else 0, PARTIAL
    sub[SUB_FIRST], sub[SUB_LAST] = key + first, key + last


@compiled
def split_by_visibility(t, p, sub_block, key, keys, begin, scale, mask_mod):
    """Set the subs of a micropanel for `keys` keys from `key` on."""
    vecs, subs = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)[VECS], subs_of(t, p, sub_block)
    visibility = classify(t, p, key, keys, begin, scale, mask_mod)
    first, last, split_keys = key, key + keys, 0
    if visibility == PARTIAL:
        first, last = last, first
        for n in range(vecs):
            sub = ahead(subs, n * SUB_FIELDS)
            bound_sub(t, p, n, sub, key, keys, begin, scale)
            if sub[SUB_VECS] > 0:
                first, last = min(first, sub[SUB_FIRST]), max(last, sub[SUB_LAST])
                split_keys += sub[SUB_LAST] - sub[SUB_FIRST]
    if visibility != PARTIAL or SPLIT_GAIN * split_keys > vecs * (last - first):
        for n in range(vecs):
            subs[n * SUB_FIELDS + SUB_VECS] = 0
        subs[SUB_VECS] = 0 if visibility == EMPTY else vecs
        subs[SUB_FIRST], subs[SUB_LAST], subs[SUB_VISIBILITY] = first, last, visibility


@compiled
def classify_by_bits(t, p, key, keys, visible, scale):
    """The visibility by key ranges and mask. If it is PARTIAL, sets visible[key][lane]."""
    size = TILE_VECS * lanes(scale)
    words = uint64s(t.words)
    every, any_bit = first_bits(keys), np.uint64(0)
    common, masked, masked_row = every, every, 0
    for i in range(size):
        row = p * size + i
        start, stop = ints(t.row_start)[row] - key, ints(t.row_stop)[row] - key
        bits = first_bits(stop) & ~first_bits(start) & every
        if t.mask != 0:
            at = row_of(t, t.mask, t.mask_row, row) + key * t.mask_dim
            if at != masked_row:
                masked_row, masked = at, mask_bits(at, t.mask_dim, keys)
            bits &= masked
        words[i] = bits
        any_bit |= bits
        common &= bits
    if any_bit == 0:
        return EMPTY
    if common == every:
        return FULL
    for j in range(keys):
        for i in range(size):
            visible[j * size + i] = (words[i] >> np.uint64(j)) & np.uint64(1)
    return PARTIAL


@compiled
def first_bits(count):
    if count <= 0:
        return np.uint64(0)
    return ~np.uint64(0) if count >= 64 else (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@compiled
def mask_bits(at, stride, keys):
    """Bit j: is key j visible by this row of the mask?"""
    if stride == 1 and keys == 64:
        return nonzero_bytes(at)
    bits = np.uint64(0)
    for j in range(keys):
        bits |= np.uint64(flags(at)[j * stride] != 0) << np.uint64(j)
    return bits


@compiled
def call_mask_mod(t, p, key, keys, visible, visibility, scale, mask_mod):
    """Hide the keys that the function hides. Returns the visibility that is left.

    Only blocks that the block mask calls PARTIAL are worth a call.
    """
    size = TILE_VECS * lanes(scale)
    batch, head = t.batch, ints(t.row_head)[p * size]
    begin, end = mask_rows(t, p, scale)
    if blocks_agree(t, head, begin, end, key, EMPTY):
        return EMPTY
    if blocks_agree(t, head, begin, end, key, FULL):
        return visibility
    if visibility == FULL:
        for x in range(keys * size):
            visible[x] = 1
    shown = own_flags(np.uint8(0))
    # Micropanels and rows of the block mask begin at multiples of `width`: its lanes share a row.
    width = min(size & -size, MASK_QUERIES)
    for n in range(0, size, width):
        query, rows = ints(t.row_query)[p * size] + n, min(width, t.rows - p * size - n)
        block = block_of(t, head, query // MASK_QUERIES, key) if rows > 0 else EMPTY
        for x in range(keys * width):
            shown[x] = block == FULL
        for j in range(keys if block == PARTIAL else 0):
            to = ahead(shown, j * width)
            j_key = (key + j) & POSITIVE
            for_rows(show, query, rows, scale, to, batch, head % t.heads, j_key, mask_mod)
        for j in range(keys):
            for i in range(width):
                visible[j * size + n + i] &= shown[j * width + i]
    return PARTIAL if any_set(visible, keys * size) else EMPTY


@compiled
def show(lane, i, shown, batch, head, j, mask_mod):
    shown[lane] = bool(mask_mod(batch, head, i, j))


@compiled
def block_of(t, head, row, key):
    """The visibility of a key's sub-block in a row of the block mask; PARTIAL without one."""
    if t.blocks == 0:
        return PARTIAL
    at = ints(t.blocks)[head] + row * t.blocks_row + key // SUB_BLOCK_K * t.blocks_dim
    return np.int64(flags(at)[0])


@compiled
def blocks_agree(t, head, begin, end, key, visibility):
    agree = True
    for row in range(begin, end):
        agree &= block_of(t, head, row, key) == visibility
    return agree
