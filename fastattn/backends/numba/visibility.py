"""Who sees what of a strip of keys: intervals, masks and the user's mask function."""

from __future__ import annotations

import numpy as np

from .hooks import POSITIVE, for_rows
from .memory import ahead, flags, ints, nonzero_bytes, own_flags, uint64s
from .tile import (
    INNER_FIRST,
    INNER_LAST,
    MASK_QUERIES,
    PANEL_FIELDS,
    PIECE_FIELDS,
    PIECE_FIRST,
    PIECE_LAST,
    PIECE_STATE,
    PIECE_VECS,
    SEE_ALL,
    SEE_NONE,
    SEE_SOME,
    STRIP_KEYS,
    VECS,
    inlined,
    mask_rows,
    pieces_of,
    row_of,
    seen_in_block,
)
from .vectors import TILE_VECS, compiled, lanes

# The vectors of a panel are computed one by one where all together would compute more than so many
# times the scores. Not from 1 on: a vector alone loads as many keys as all of them.
APART = 1.25


@compiled
def see(t, p, key, keys, begin, scale, mask_mod):
    """What one panel sees of `keys` keys from `key` on, before their scores are known. Where that
    is some of them, set seen[key][lane].
    """
    if keys <= 0:
        return SEE_NONE
    panel, seen = ints(t.panel + 8 * PANEL_FIELDS * p), seen_in_block(t, scale, p, key - begin)
    state = SEE_ALL
    inside = panel[INNER_FIRST] <= key and key + keys <= panel[INNER_LAST]
    if not inside or t.mask != 0:
        state = look(t, p, key, keys, seen, scale)
    if mask_mod is not None and state != SEE_NONE:
        state = call_mask_mod(t, p, key, keys, seen, state, scale, mask_mod)
    return state


@compiled
def any_visible(seen, count):
    """Is one of so many flags not 0?"""
    some = np.uint8(0)
    for x in range(count):
        some = np.uint8(some | seen[x])
    return some != 0


@inlined
def bound_piece(t, p, n, piece, key, keys, begin, scale):
    """Find the first and the last key that a query of vector `n` sees, or that there is none."""
    width, size = lanes(scale), TILE_VECS * lanes(scale)
    seen = ahead(seen_in_block(t, scale, p, key - begin), n * width)
    first, last = 0, keys
    while first < last and not any_visible(ahead(seen, first * size), width):
        first += 1
    while first < last and not any_visible(ahead(seen, (last - 1) * size), width):
        last -= 1
    piece[PIECE_VECS], piece[PIECE_STATE] = 1 if first < last else 0, SEE_SOME
    piece[PIECE_FIRST], piece[PIECE_LAST] = key + first, key + last


@compiled
def cut(t, p, strip, key, keys, begin, scale, mask_mod):
    """Set the pieces of a panel in which some query sees some of `keys` keys from `key` on."""
    vecs, pieces = ints(t.panel + 8 * PANEL_FIELDS * p)[VECS], pieces_of(t, p, strip)
    state = see(t, p, key, keys, begin, scale, mask_mod)
    first, last, apart = key, key + keys, 0
    if state == SEE_SOME:
        first, last = last, first
        for n in range(vecs):
            piece = ahead(pieces, n * PIECE_FIELDS)
            bound_piece(t, p, n, piece, key, keys, begin, scale)
            if piece[PIECE_VECS] > 0:
                first, last = min(first, piece[PIECE_FIRST]), max(last, piece[PIECE_LAST])
                apart += piece[PIECE_LAST] - piece[PIECE_FIRST]
    if state != SEE_SOME or APART * apart > vecs * (last - first):
        for n in range(vecs):
            pieces[n * PIECE_FIELDS + PIECE_VECS] = 0
        pieces[PIECE_VECS] = 0 if state == SEE_NONE else vecs
        pieces[PIECE_FIRST], pieces[PIECE_LAST], pieces[PIECE_STATE] = first, last, state


@compiled
def look(t, p, key, keys, seen, scale):
    """What the panel sees by intervals and mask; where that is some keys, set seen[key][lane]."""
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
        return SEE_NONE
    if common == every:
        return SEE_ALL
    for j in range(keys):
        for i in range(size):
            seen[j * size + i] = (words[i] >> np.uint64(j)) & np.uint64(1)
    return SEE_SOME


@compiled
def first_bits(count):
    if count <= 0:
        return np.uint64(0)
    return ~np.uint64(0) if count >= 64 else (np.uint64(1) << np.uint64(count)) - np.uint64(1)


@compiled
def mask_bits(at, stride, keys):
    """Bit j: does a row of the mask show key j?"""
    if stride == 1 and keys == 64:
        return nonzero_bytes(at)
    bits = np.uint64(0)
    for j in range(keys):
        bits |= np.uint64(flags(at)[j * stride] != 0) << np.uint64(j)
    return bits


@compiled
def call_mask_mod(t, p, key, keys, seen, state, scale, mask_mod):
    """Take the keys that the function hides out of `seen`. Returns what the panel sees then. Only
    blocks of which some keys are visible and not all are worth a call.
    """
    size = TILE_VECS * lanes(scale)
    batch, head = t.batch, ints(t.row_head)[p * size]
    begin, end = mask_rows(t, p, scale)
    if blocks_agree(t, head, begin, end, key, SEE_NONE):
        return SEE_NONE
    if blocks_agree(t, head, begin, end, key, SEE_ALL):
        return state
    if state == SEE_ALL:
        for x in range(keys * size):
            seen[x] = 1
    shown = own_flags(np.uint8(0))
    # Panels and rows of the block mask begin at multiples of it, so such lanes lie in one row.
    width = min(size & -size, MASK_QUERIES)
    for n in range(0, size, width):
        query, rows = ints(t.row_query)[p * size] + n, min(width, t.rows - p * size - n)
        block = block_of(t, head, query // MASK_QUERIES, key) if rows > 0 else SEE_NONE
        for x in range(keys * width):
            shown[x] = block == SEE_ALL
        for j in range(keys if block == SEE_SOME else 0):
            to = ahead(shown, j * width)
            j_key = (key + j) & POSITIVE
            for_rows(show, query, rows, scale, to, batch, head % t.heads, j_key, mask_mod)
        for j in range(keys):
            for i in range(width):
                seen[j * size + n + i] &= shown[j * width + i]
    return SEE_SOME if any_visible(seen, keys * size) else SEE_NONE


@compiled
def show(lane, i, shown, batch, head, j, mask_mod):
    shown[lane] = bool(mask_mod(batch, head, i, j))


@compiled
def block_of(t, head, row, key):
    """What the block mask says of a row of it and the strip of a key; without one, some."""
    if t.blocks == 0:
        return SEE_SOME
    at = ints(t.blocks)[head] + row * t.blocks_row + key // STRIP_KEYS * t.blocks_dim
    return np.int64(flags(at)[0])


@compiled
def blocks_agree(t, head, begin, end, key, state):
    agree = True
    for row in range(begin, end):
        agree &= block_of(t, head, row, key) == state
    return agree
