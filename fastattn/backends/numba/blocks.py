"""The blocks that a mask function hides, shows in part, or shows."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from ...core.block_mask import ALL, BLOCK_KEYS, BLOCK_QUERIES, NONE, SOME
from ...core.thread_pool import share
from ...core.threads import openmp_setting, thread_count
from .hooks import mask_function

# Pairs of a launch: some 10 ms.
LAUNCH_PAIRS = 10_000_000


def classify_blocks(mask_mod, batch: int, heads: int, n_queries: int, n_keys: int) -> np.ndarray:
    """The visibility of every block, (batch, heads, blocks of queries, blocks of keys)."""
    mask_mod = mask_function(mask_mod)
    fill = _filler(mask_mod)
    per_head = -(-n_queries // BLOCK_QUERIES)
    blocks = np.empty((batch, heads, per_head, -(-n_keys // BLOCK_KEYS)), np.uint8)
    args = (blocks, n_queries, n_keys, mask_mod)
    fill(0, 0, *args)  # compiles, where that is to be done, on this thread alone

    def start():
        return lambda begin, end: fill(begin, end, *args)

    step = max(1, LAUNCH_PAIRS // (BLOCK_QUERIES * n_keys))
    share(batch * heads * per_head, step, thread_count(None, openmp_setting()), start)
    return blocks


@lru_cache(32)
def _filler(mask_mod):
    return njit(nogil=True, error_model="numpy")(_fill)


def _fill(begin, end, blocks, n_queries, n_keys, mask_mod):
    _, heads, per_head, columns = blocks.shape
    for item in range(begin, end):
        row, head, batch = item % per_head, item // per_head % heads, item // per_head // heads
        first, last = row * BLOCK_QUERIES, min((row + 1) * BLOCK_QUERIES, n_queries)
        for column in range(columns):
            key, stop = column * BLOCK_KEYS, min((column + 1) * BLOCK_KEYS, n_keys)
            visible = 0
            for i in range(first, last):
                for j in range(key, stop):
                    visible += 1 if mask_mod(batch, head, i, j) else 0
            every = (last - first) * (stop - key)
            state = NONE if visible == 0 else ALL if visible == every else SOME
            blocks[batch, head, row, column] = state
