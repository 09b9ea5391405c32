"""Which blocks of the square of queries and keys a mask function leaves anything of."""

from __future__ import annotations

from .core.arguments import count, function
from .core.block_mask import BlockMask

__all__ = ["block_mask"]


def block_mask(mask_mod, n_queries, n_keys, batch=1, heads=1) -> BlockMask:
    """Look once for the blocks of queries and keys that a mask function hides altogether.

    Parameters
    ----------
    mask_mod : function (batch, head, i, j) -> bool
        As of `fastattn.flex`.
    n_queries, n_keys : int
        The lengths that it will be used with.
    batch, heads : int, default 1
        For how many; 1 is for any number, of a function that does not depend on it.

    Returns
    -------
    BlockMask
        For ``flex(q, k, v, block_mask=...)``, any number of times. It takes a byte for 1024 pairs.

    Raises
    ------
    TypeError, ValueError
        If a number is not a positive integer, or Numba cannot compile the function.
    ModuleNotFoundError
        Without Numba.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> document = np.repeat(np.arange(4), 256)
    >>> def same_document(batch, head, i, j):
    ...     return document[i] == document[j]
    >>> fastattn.block_mask(same_document, 1024, 1024)
    BlockMask(same_document, (1, 1, 1024, 1024), 75% skipped)
    """
    function("mask_mod", mask_mod)
    sizes = [
        count(name, value)
        for name, value in (
            ("batch", batch), ("heads", heads), ("n_queries", n_queries), ("n_keys", n_keys)
        )
    ]  # fmt: skip
    from .backends.numba.blocks import classify_blocks

    return BlockMask(mask_mod, sizes[2], sizes[3], classify_blocks(mask_mod, *sizes))
