"""The definition: softmax attention written out as in a textbook, in float64, on the full grid.

Every other backend is held to this one. It is never optimised; it makes several arrays of
queries x keys, so it is for short sequences and for reading.
"""

from __future__ import annotations

import math

import numpy as np

from .problem import Problem

name = "reference"


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`: never."""
    return None


def run(problem: Problem):
    """Fill ``problem.result``; return ``(lse, weights)``, None for what was not asked for."""
    out, lse, weights = attend(problem)
    problem.result[...] = out.astype(problem.dtype)
    return (
        lse.astype(problem.accumulator) if problem.return_lse else None,
        weights.astype(problem.dtype) if problem.return_weights else None,
    )


def plan(problem: Problem) -> dict[str, str]:
    """What would run, for `fastattn.explain`."""
    return {"kernel": "the definition in float64, on the full grid"}


def attend(problem: Problem, real=np.float64):
    """``(out, lse, weights)`` in the precision `real` (`numpy.longdouble` to judge float64).

    Implements fastattn's definition: ``weights = exp(score - lse)`` over the keys that a query
    sees and ``out = weights @ v`` (Vaswani et al. 2017, "Attention Is All You Need", eq. 1),
    with the extensions that `fastattn.scaled_dot` documents.
    """
    with np.errstate(all="ignore"):
        s = scores(problem, real)
        seen = visible(problem)
        if problem.score_mod is not None:
            seen &= s != -np.inf
        weights, lse = softmax(s, seen, problem.sinks)
        v = per_query_head(problem.v.astype(real), problem)
        # A weight of 0 on an unseen key must not meet a NaN in v: leave the key out of the sum.
        if np.isfinite(v).all():
            out = weights @ v
        else:
            terms = np.where(seen[..., None], weights[..., None] * v[..., None, :, :], 0)
            out = terms.sum(axis=-2)
    return out, lse, weights


def scores(p: Problem, real=np.float64) -> np.ndarray:
    """``s[i, j]`` of every query and key: (batch, heads, queries, keys)."""
    q = np.broadcast_to(p.q.astype(real), p.rows(p.head_dim))
    k = per_query_head(p.k.astype(real), p)
    s = real(p.scale) * (q @ k.swapaxes(-1, -2))
    if p.softcap is not None:
        s = p.softcap * np.tanh(s / p.softcap)
    if p.bias is not None:
        s = s + p.bias.astype(real)
    if p.alibi is not None:
        i, j = positions(p)
        s = s - p.alibi.astype(real)[:, None, None] * np.abs(i - j)
    if p.score_mod is not None:
        s = on_grid(p, p.score_mod, s.astype(np.float64)).astype(real)
    return s


def visible(p: Problem) -> np.ndarray:
    """``seen[i, j]``: may query `i` see key `j`? bool, (batch, heads, queries, keys)."""
    i, j = positions(p)
    left, right = p.window
    seen = np.ones((*p.rows(), p.n_keys), bool)
    if p.mask is not None:
        seen &= p.mask
    if p.causal:
        seen &= j <= i
    if left is not None:
        seen &= i - left <= j
    if right is not None:
        seen &= j <= i + right
    if p.kv_lengths is not None:
        seen &= j < p.kv_lengths[..., None, None, None]
    if p.spans is not None:
        start, stop = p.spans
        seen &= (start[..., None] <= j) & (j < stop[..., None])
    if p.bias is not None:
        seen &= p.bias != -np.inf
    if p.mask_mod is not None:
        seen &= on_grid(p, p.mask_mod).astype(bool)
    return seen


def softmax(s, seen, sinks=None):
    """``(weights, lse)`` over the seen keys and, where given, one sink without a value per head.

    A shift of the scores by their maximum keeps the exponentials in range and cancels out.
    """
    s = np.where(seen, s, -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sinks = sinks.astype(s.dtype)[:, None, None]
        top = np.maximum(top, sinks)
    shift = np.where(np.isfinite(top), top, 0)
    total = np.exp(s - shift).sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - shift)
    lse = shift + np.log(total)
    weights = np.where(seen, np.exp(s - lse), 0)
    return weights, lse[..., 0]


def positions(p: Problem):
    """``i``, the place of each query on the key axis, and ``j``, that of each key."""
    offset = p.q_offset
    if isinstance(offset, np.ndarray):
        offset = offset[..., None, None, None]
    return np.arange(p.n_queries)[:, None] + offset, np.arange(p.n_keys)


def on_grid(p: Problem, function, *first) -> np.ndarray:
    """``function(*first, batch, head, i, j)`` everywhere: (batch, heads, queries, keys)."""
    shape = (*p.rows(), p.n_keys)
    batch, *rest = np.indices((math.prod(p.batch), *shape[-3:]))
    function = getattr(function, "py_func", function)
    grid = np.frompyfunc(function, 4 + len(first), 1)
    values = grid(*(x.reshape(batch.shape) for x in first), batch, *rest)
    return values.astype(np.float64).reshape(shape)


def per_query_head(x, p: Problem) -> np.ndarray:
    """Keys or values with the head that each query head reads: ``h // group``."""
    x = np.broadcast_to(x, (*p.batch, p.kv_heads, *x.shape[-2:]))
    return x[..., np.arange(p.heads) // p.group, :, :]
