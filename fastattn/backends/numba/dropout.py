"""Dropout: a tile's weights that are dropped become 0. See `fastattn.core.dropout`."""

from __future__ import annotations

import numpy as np

from ...core.dropout import KEYS, ROUNDS
from .memory import ahead, ints, uint64s
from .tile import TILE_VECS
from .vectors import compiled, constant, lanes

# Numba makes a float of a signed and an unsigned integer, so all are unsigned.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _HALF, _WORD = np.uint64(0xFFFFFFFF), np.uint64(16), np.uint64(32)
_KEYS = np.uint64(KEYS)


@compiled
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(ROUNDS):
        a, b = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (b >> _WORD) ^ c1 ^ k0, b & _LOW, (a >> _WORD) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@compiled
def draw_row_keys(t, scale):
    """drop_rows[4][row]: the words of the key of each row's head, and of its query."""
    rows = t.micropanels * TILE_VECS * lanes(scale)
    to, seed = uint64s(t.drop_rows), np.uint64(t.drop_seed)
    entry = np.uint64(t.batch) + np.uint64(t.drop_entry)
    for i in range(rows):
        head = np.uint64(ints(t.row_head)[i] % t.heads) + np.uint64(t.drop_head)
        query = np.uint64(ints(t.row_query)[i]) + np.uint64(t.drop_query)
        words = philox(
            entry & _LOW, entry >> _WORD, head & _LOW, head >> _WORD, seed & _LOW, seed >> _WORD
        )
        to[i], to[rows + i] = words[0], words[1]
        to[2 * rows + i], to[3 * rows + i] = query & _LOW, query >> _WORD


@compiled
def drop(t, row, vecs, keys, key, weights, scale):
    """Drop some of weights[key][lane], of so many keys from `key` on and the rows from `row` on."""
    size, width = TILE_VECS * lanes(scale), vecs * lanes(scale)
    rows = t.micropanels * size
    own, words = ahead(uint64s(t.drop_rows), row), uint64s(t.drop_words)
    first, threshold = np.uint64(key) + np.uint64(t.drop_key), np.uint64(t.drop_threshold)
    before = np.int64(first % _KEYS)
    counter = first // _KEYS
    for j in range(-before, keys, KEYS):
        low, high = counter & _LOW, counter >> _WORD
        for i in range(width):
            w0, w1, w2, w3 = philox(
                low, high, own[2 * rows + i], own[3 * rows + i], own[i], own[rows + i]
            )
            words[i], words[size + i], words[2 * size + i], words[3 * size + i] = w0, w1, w2, w3
        for n in range(max(0, -j), min(KEYS, keys - j)):
            number, weight = ahead(words, n // 2 * size), ahead(weights, (j + n) * size)
            turn = np.uint64(n % 2 * 16)
            for i in range(width):
                x = (number[i] >> turn | number[i] << turn) & _LOW
                weight[i] = weight[i] if x >= threshold else constant(0.0, scale)
        counter += np.uint64(1)
