"""Gradients and tangents of `fastattn.flex`: the NumPy backend's tiles, with the user's functions
compiled by Numba and called for the scores of a tile.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np
from numba import njit

from ...core.backward import Backward
from ...core.block_mask import BLOCK_KEYS, BLOCK_QUERIES, NONE
from ...core.problem import Problem
from ..numpy import backward as numpy_backward
from ..numpy import tangents as numpy_tangents
from .hooks import as_score, mask_function, score_function

__all__ = ["run_backward", "run_forward_mode"]


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments."""
    return numpy_backward.run_backward(backward, partial(TileFunctions, backward.problem))


def run_forward_mode(problem: Problem, tangents) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)`` along `tangents`, by the names of their operands."""
    functions = partial(TileFunctions, problem)
    return numpy_tangents.run_forward_mode(problem, tangents, functions=functions)


class TileFunctions:
    """The functions of a call, for some heads of one batch entry.

    ``where`` is the index of the heads in a result, (*batch, heads).
    """

    def __init__(self, p: Problem, where: tuple):
        size = p.accumulator.itemsize
        score_mod, mask_mod = score_function(p.score_mod, size), mask_function(p.mask_mod)
        grad = p.score_mod and score_function(p.score_grad, size, "score_grad")
        self.batch = int(np.ravel_multi_index(where[:-1], p.batch)) if p.batch else 0
        self.head = where[-1].start
        self.modify_all = partial(_kernels(score_mod, mask_mod, None)[0], score_mod, mask_mod)
        self.slopes_of = grad and partial(_kernels(None, None, grad)[1], grad)
        self.blocks = None  # (heads, blocks of queries, blocks of keys)
        if p.block_mask is not None:
            blocks = p.block_mask.blocks
            own = blocks[self.batch if blocks.shape[0] > 1 else 0]
            self.blocks = own[where[-1] if blocks.shape[1] > 1 else slice(0, 1)]

    def visible_keys(self, queries: slice, keys: slice) -> slice:
        """The keys from the first to the last block that the block mask leaves of these queries."""
        if self.blocks is None:
            return keys
        rows = slice(queries.start // BLOCK_QUERIES, -(-queries.stop // BLOCK_QUERIES))
        first = keys.start // BLOCK_KEYS
        columns = self.blocks[:, rows, first : -(-keys.stop // BLOCK_KEYS)] != NONE
        left = np.flatnonzero(columns.any(axis=(0, 1)))
        if not len(left):
            return slice(keys.start, keys.start)
        begin, end = (first + left[[0, -1]] + [0, 1]) * BLOCK_KEYS
        return slice(max(int(begin), keys.start), min(int(end), keys.stop))

    def modified(self, s, visible, queries: slice, keys: slice) -> tuple[np.ndarray, np.ndarray]:
        """``(s, visible)`` of a tile, (kv_heads, group, queries, keys), after the functions."""
        flat = s.reshape(-1, *s.shape[2:]).copy()
        visible = (
            np.ones(s.shape, bool) if visible is None else np.broadcast_to(visible, s.shape).copy()
        )
        first = self.batch, self.head, queries.start, keys.start
        self.modify_all(flat, visible.reshape(flat.shape), *first)
        return flat.reshape(s.shape), visible

    def before(self, grad, s, visible, queries: slice, keys: slice) -> np.ndarray:
        """The gradient of the scores `s` of a tile, from that of what the functions made of
        them.
        """
        if self.slopes_of is None:
            return grad
        grad, s = (x.reshape(-1, *x.shape[2:]).copy() for x in (grad, s))
        first = self.batch, self.head, queries.start, keys.start
        self.slopes_of(grad, s, visible.reshape(grad.shape), *first)
        return grad.reshape(visible.shape)


@lru_cache(32)
def _kernels(score_mod, mask_mod, grad):
    """The loops over a tile, compiled for these functions."""
    compiled = njit(nogil=True, error_model="numpy")
    return compiled(_modify), compiled(_multiply)


def _modify(score_mod, mask_mod, s, visible, batch, head, query, key):
    heads, rows, columns = s.shape
    for h in range(heads):
        for i in range(rows):
            for j in range(columns):
                if not visible[h, i, j]:
                    continue
                if mask_mod is not None:
                    visible[h, i, j] = mask_mod(batch, head + h, query + i, key + j)
                if score_mod is not None:
                    x = score_mod(s[h, i, j], batch, head + h, query + i, key + j)
                    s[h, i, j] = as_score(x, s[h, i, j])
                    if s[h, i, j] == -math.inf:
                        visible[h, i, j] = False
                if not visible[h, i, j]:
                    s[h, i, j] = -math.inf


def _multiply(score_grad, grad, s, visible, batch, head, query, key):
    heads, rows, columns = s.shape
    for h in range(heads):
        for i in range(rows):
            for j in range(columns):
                if visible[h, i, j]:
                    grad[h, i, j] *= score_grad(s[h, i, j], batch, head + h, query + i, key + j)
