"""How evenly the work of a call falls on many threads. It computes nothing, so any machine will do.

    python benchmarks/balance.py [--threads 64] [--tile QUERIES MICROPANEL]

The compiled kernels hand out tiles of queries in an order of their own, each to the thread that is
free first. Here a tile takes as long as it has scores, in whole sub-blocks of keys, and `PACKING`
for each key that is packed for it. What is printed is how much longer the last thread takes than
the mean. The tile is that of this machine for float32; AMX's is 384 queries in micropanels of 32.
"""

import argparse
import heapq
from typing import Any

import numpy as np

import fastattn
from fastattn import _kernels
from fastattn.core.problem import Problem, make_problem

PACKING = 4  # queries: widening or packing a key takes about as long as scoring that many
SUB_BLOCK = _kernels.tile_sizes()["SUB_BLOCK_K"]


def cases() -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """``(batch, heads, queries, dims)`` and options, by what they try."""
    lengths = np.random.default_rng(0).integers(100, 4097, 32)
    packed = np.random.default_rng(1).integers(16, 1025, 32)
    return {
        "every key": ((4, 16, 4096, 64), {}),
        "causal": ((4, 16, 4096, 64), {"causal": True}),
        "causal, one short sequence": ((1, 8, 4096, 64), {"causal": True}),
        "causal, one long sequence": ((1, 32, 16384, 64), {"causal": True}),
        "window of 1024": ((1, 32, 16384, 64), {"causal": True, "window": (1023, 0)}),
        "ragged batch": ((32, 16, 4096, 64), {"kv_lengths": lengths, "q_offset": 0}),
        "ragged batch, causal": (
            (32, 16, 4096, 64), {"causal": True, "kv_lengths": lengths, "q_offset": 0}
        ),
        "packed documents": (
            (1, 32, int(packed.sum()), 64), {"spans": fastattn.document_spans(packed, causal=True)}
        ),
    }  # fmt: skip


def works(p: Problem, block_q: int, mr: int) -> np.ndarray:
    """The work of each tile, in the order in which the kernels hand them out."""
    start, stop = p.key_range.bounds() or (np.zeros((1, 1), int), np.full((1, 1), p.n_keys))
    rows = (*p.batch, p.heads, p.n_queries)
    start, stop = (np.broadcast_to(x, rows).reshape(-1, p.n_queries) for x in (start, stop))
    # Of each micropanel, then of each tile, the keys from the first to the last that are visible.
    # (Heads that share a key head would be rows of one tile: the cases above have none.)
    empty = stop <= start
    first = np.where(empty, p.n_keys, start) // SUB_BLOCK * SUB_BLOCK
    last = -(-np.where(empty, 0, stop) // SUB_BLOCK) * SUB_BLOCK
    panels, tiles = np.arange(0, p.n_queries, mr), np.arange(0, p.n_queries, block_q)
    scored = np.maximum(_last(last, panels) - _first(first, panels), 0) * mr
    work = np.add.reduceat(scored, tiles // mr, axis=1)
    work = work + PACKING * np.maximum(_last(last, tiles) - _first(first, tiles), 0)
    order = p.key_range.longest_first(p.batch)
    by_entry = work.reshape(-1, p.heads, len(tiles))
    by_entry = by_entry if order is None else by_entry[order]
    return by_entry[..., ::-1].ravel()  # of a head the last queries first


def _first(keys, edges):
    return np.minimum.reduceat(keys, edges, axis=1)


def _last(keys, edges):
    return np.maximum.reduceat(keys, edges, axis=1)


def share_out(work: np.ndarray, threads: int) -> np.ndarray:
    """What each thread gets, if the one that is free first takes the next item."""
    busy = [0] * threads
    for item in work.tolist():
        heapq.heapreplace(busy, busy[0] + item)
    return np.array(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument(
        "--tile", type=int, nargs=2, default=_kernels.tile_size("f", 1 << 20, 64, 64, True)[:2]
    )
    given = parser.parse_args()
    print(f"{given.threads} threads, tiles of {given.tile[0]} queries")
    print(f"{'case':<27}{'(batch, heads, queries, dims)':<31}{'tiles':>7}  last thread")
    for name, (shape, options) in cases().items():
        q = np.broadcast_to(np.float32(0), shape)
        work = works(make_problem(q, q, q, **options), *given.tile)
        busy = share_out(work, given.threads)
        print(f"{name:<27}{shape!s:<31}{len(work):>7}  {busy.max() / busy.mean() - 1:+.1%}")


if __name__ == "__main__":
    main()
