"""The kernel as Python calls it: compiled once, kept on disk, and free of the GIL."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from numba import njit
from numba.core.compiler_lock import global_compiler_lock

from .disk import keep_on_disk
from .dropout import draw_row_keys
from .scores import score_block
from .tile import ATTEND, BLOCK_K, DONE, WEIGH, begin_rows, begin_tile, tile_at
from .values import attend_block, finish, store_weights

__all__ = ["launcher"]


def _digest() -> int:
    """Of the sources here: of these, Numba's disk cache looks at this file alone."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in sources)
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _entry():
    digest = _digest()

    def launch(address, begin, end, scale, score_function, bias, dropout, score_mod, mask_mod):
        """Attend from the queries of the tiles begin <= item < end."""
        digest  # noqa: B018  a closure's variables are part of the key of the disk cache
        t = tile_at(address)
        for item in range(begin, end):
            begin_tile(t, item, scale, mask_mod)
            if dropout is not None:
                draw_row_keys(t, scale)
            step = np.int64(ATTEND)
            while step != DONE:
                if step != WEIGH:
                    begin_rows(t, scale)
                for block in range(t.first // BLOCK_K * BLOCK_K, t.last, BLOCK_K):
                    score_block(t, block, scale, score_function, bias, score_mod, mask_mod)
                    if step == WEIGH:
                        store_weights(t, block, scale)
                    else:
                        attend_block(t, block, scale, dropout)
                step = finish(t, step, scale)

    return launch


def _compiled():
    return njit(nogil=True, error_model="numpy")(_entry())


# A child that is forked while another thread compiles would wait for that thread, which it has not.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

_plain = _compiled()
keep_on_disk(_plain)


def launcher(score_mod, mask_mod):
    """``launch(address, begin, end, scale, score_function, bias, dropout, score_mod, mask_mod)``
    for these, or None: it compiles itself at its first call with numbers of a type, with or without
    a score function, a bias and dropout.
    """
    return _plain if score_mod is None and mask_mod is None else _with(score_mod, mask_mod)


@lru_cache(32)
def _with(score_mod, mask_mod):
    # Not on disk, where a user function would be a new one in each process.
    return _compiled()
