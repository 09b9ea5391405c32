"""Which keys are seen, and their scores.

What is done to scores is the same for any kernel: its blocks tell with ``row_of(r, ty)`` and
``key_of(c, tx)`` which query and key of the tile the score ``s[r, c]`` of a thread is of. The order
of the options is that of `fastattn.reference.scores`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .elements import POSITIVE, reader
from .tile import Blocks, Geometry
from .toolkit import cuda, device_function

__all__ = ["Options", "Rows", "look_maker", "options_maker", "score_maker"]


class Rows(NamedTuple):
    """What a block of threads keeps of each of its rows, in shared memory."""

    query: Any  # the row of q, and of the mask, the bias and the results
    head: Any  # counted from the first of the tile
    place: Any  # of its q, in elements
    scale: Any
    start: Any  # the keys [start, stop) that its intervals show
    stop: Any
    any_visible: Any  # is a key visible to it?
    top: Any  # the largest score so far, that sums are relative to
    high: Any  # the same without the sink
    rescale: Any  # of the sums, since top has changed; in the end the sum of the weights
    factor: Any  # the product of those since the sums were last folded
    wanted: Any  # is it to be computed, where only some are?


class Options(NamedTuple):
    """What is added to scores, and where it begins for the tile."""

    mask: Any
    mask_at: Any
    mask_strides: Any  # of a head, a row, a column
    bias: Any
    bias_at: Any
    bias_strides: Any
    per_head: Any  # scale, alibi, sinks, relative_bias
    softcap: Any
    offset: Any  # of the first query on the key axis
    heads: Any
    first_head: Any
    reach: Any


def look_maker(b: Geometry):
    """A device function that tells which of its scores a thread sees, as bits."""
    ROWS, COLS, row_of, key_of = b.rows, b.cols, b.row_of, b.key_of
    MASKED = b.spec.mask

    def look(rows, options, begin, tx, ty):
        seen = 0
        mask_head, mask_row, mask_key = options.mask_strides
        for r in range(ROWS):
            row = row_of(r, ty)
            low, high = rows.start[row] - begin, rows.stop[row] - begin
            at = options.mask_at + rows.query[row] * mask_row + rows.head[row] * mask_head
            for c in range(COLS):
                key = key_of(c, tx)
                sees = low <= key and key < high
                if MASKED and sees:
                    sees = options.mask[at + (begin + key) * mask_key & POSITIVE] != 0
                if sees:
                    seen |= 1 << r * COLS + c
        return seen

    return device_function(look)


def score_maker(b: Blocks):
    """A device function that adds the products of a chunk of q and k to a thread's scores."""
    ROWS, COLS, TY, TX = b.rows, b.cols, b.tile.ty, b.tile.tx
    CHUNK, Q_ROW, K_ROW, real = b.chunk, b.q_row, b.k_row, b.real
    FOURS = 0x10000 - 4  # see Blocks.columns: four words are read at once

    def score(s, qs, ks, q_from, tx, ty):
        a = cuda.local.array((ROWS, 4), real)
        x = cuda.local.array(4, real)
        for d in range(0, CHUNK, 4):
            from_q = ty * Q_ROW + q_from + d & FOURS
            from_k = tx * K_ROW + d & FOURS
            for r in range(ROWS):
                for u in range(4):
                    a[r, u] = qs[from_q + r * TY * Q_ROW + u]
            for c in range(COLS):
                for u in range(4):
                    x[u] = ks[from_k + c * TX * K_ROW + u]
                for r in range(ROWS):
                    for u in range(4):
                        s[r, c] += a[r, u] * x[u]

    return device_function(score)


def adder(real):
    """A device function that adds to a score within the range of `real`."""
    MOST = np.finfo(real).max

    def add(x, y):
        total = x + y
        if abs(x) <= MOST and abs(y) <= MOST:
            return min(max(total, -MOST), MOST)
        return total

    return device_function(add)


def options_maker(b: Geometry):
    """A device function that makes products scores, -inf where hidden, and returns what is seen."""
    ROWS, COLS, row_of, key_of, real = b.rows, b.cols, b.row_of, b.key_of, b.real
    SCALES = b.scales
    SOFTCAP, BIASED, ALIBI = b.spec.softcap, b.spec.bias, b.spec.alibi
    RELATIVE = b.spec.relative_bias
    INF, MOST = real(math.inf), np.finfo(real).max
    read_bias = reader("b" in b.spec.bfloat16, b.spec.clamp_bias, real)
    add = adder(real)

    def apply_options(s, seen, partial, rows, options, begin, tx, ty):
        bias_head, bias_row, bias_key = options.bias_strides
        for r in range(ROWS):
            row = row_of(r, ty)
            i, h = rows.query[row], options.first_head + rows.head[row]
            at = options.bias_at + i * bias_row + rows.head[row] * bias_head
            for c in range(COLS):
                j = begin + key_of(c, tx)
                sees = seen >> r * COLS + c & 1 != 0
                x = s[r, c]
                if SCALES:
                    x = x * rows.scale[row]
                if SOFTCAP:
                    x = options.softcap * real(math.tanh(x / options.softcap))
                if BIASED and sees:
                    y = read_bias(options.bias, at + j * bias_key)
                    sees = y != -INF
                    x = add(x, y)
                if RELATIVE and sees:
                    d = min(max(j - i - options.offset, -options.reach), options.reach)
                    d += options.reach + h * (2 * options.reach + 1) + 3 * options.heads
                    y = options.per_head[d & POSITIVE]
                    sees = y != -INF
                    x = add(x, y)
                if ALIBI:
                    slope = options.per_head[options.heads + h]
                    y = x - slope * real(abs(options.offset + i - j))
                    if abs(x) <= MOST and abs(slope) <= MOST:
                        y = min(max(y, -MOST), MOST)
                    x = y
                if partial and not sees:
                    x = -INF
                    seen &= ~(1 << r * COLS + c)
                s[r, c] = x
        return seen

    return device_function(apply_options)
