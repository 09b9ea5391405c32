"""Keys and values scattered over a pool of pages."""

from __future__ import annotations

import numpy as np

GARBAGE = (-7, 10**9)  # entries of a block table that nobody needs


def in_pages(k, v, lengths, page, seed=0):
    """``(k, v, block_table)`` as a pool: the pages in any order, NaN in all that is no key of the
    `lengths`, and table entries beyond them that are no page.
    """
    rng = np.random.default_rng(seed)
    batch, n_keys = len(k), k.shape[2]
    pages = -(-n_keys // page)
    held = [-(-int(n) // page) for n in lengths]
    order = rng.permutation(sum(held) + 2)
    table = rng.choice(GARBAGE, (batch, pages))
    pools = [
        np.full((len(order), x.shape[1], page, x.shape[3]), np.nan).astype(x.dtype) for x in (k, v)
    ]
    for b in range(batch):
        for n in range(held[b]):
            table[b, n], order = order[0], order[1:]
            keys = slice(n * page, min(n * page + page, int(lengths[b])))
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, n], :, : keys.stop - keys.start] = x[b, :, keys]
    return *pools, table
