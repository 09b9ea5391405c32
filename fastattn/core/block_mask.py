"""What a mask function leaves of the square of queries and keys, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["ALL", "BLOCK_KEYS", "BLOCK_QUERIES", "NONE", "SOME", "BlockMask"]

BLOCK_QUERIES = 16
BLOCK_KEYS = 64
NONE, SOME, ALL = 0, 1, 2


@dataclass(frozen=True, repr=False)
class BlockMask:
    """What `block_mask` made of a function, for ``flex(..., block_mask=...)``.

    Attributes
    ----------
    mask_mod : callable
        The function.
    n_queries, n_keys : int
        What it was made for.
    blocks : ndarray of uint8, (batch, heads, blocks of 16 queries, blocks of 64 keys)
        0 where nothing of a block is seen, 1 where something, 2 where everything.
    """

    mask_mod: Callable
    n_queries: int
    n_keys: int
    blocks: np.ndarray

    def __repr__(self) -> str:
        shape = (*self.blocks.shape[:2], self.n_queries, self.n_keys)
        empty = np.mean(self.blocks == NONE) if self.blocks.size else 0.0
        return f"BlockMask({getattr(self.mask_mod, '__name__', '?')}, {shape}, {empty:.0%} skipped)"
