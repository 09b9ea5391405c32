"""The two ways to a Gaussian kernel's scores: by a product, and by squared differences.

``-alpha |q - k|**2 = 2 alpha (q.k - |k|**2 / 2) - alpha |q|**2``: about the mean of the keys, the
first term is a dot product of vectors with one more number, the last a factor of each query.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .attention import solve
from .backends import numpy as numpy_backend
from .chunks import Chunk, Union, entries, runs
from .core.arguments import broadcast_shapes
from .core.backward import Backward
from .core.problem import SQUARED_DISTANCE, Problem, make_problem

__all__ = [
    "Attended", "Call", "Lifted", "difference_gradients", "differences", "extents", "lifted",
    "product", "product_gradients", "run_forward_mode",
]  # fmt: skip


class Call(NamedTuple):
    """A call of `gaussian`, validated."""

    problem: Problem
    sets: tuple[Problem, ...]  # the same for keys that no two of them show, without sinks
    alpha: float
    normalize: bool
    backend: str | None
    centre: np.ndarray  # (batch, kv_heads, 1, head_dim): the mean of the keys that are seen
    reach: np.ndarray  # (batch, kv_heads): the largest size of a number in one of them


class Attended(NamedTuple):
    """The softmax of a chunk, without sinks."""

    out: np.ndarray
    lse: np.ndarray
    row_max: np.ndarray | None
    weights: np.ndarray | None
    inner_lse: np.ndarray  # of the product alone


class Lifted(NamedTuple):
    """Queries or keys less the centre, with one more number, and the squares of their lengths."""

    vectors: np.ndarray
    squares: np.ndarray


def extents(p: Problem, seen) -> tuple[np.ndarray, np.ndarray]:
    """``(centre, reach)`` of a `Call`, of the keys that are `seen` and finite."""
    centre = np.zeros((*p.batch, p.kv_heads, 1, p.head_dim), p.accumulator)
    reach = np.zeros((*p.batch, p.kv_heads), p.accumulator)
    for entry in entries(p):
        total, count = np.zeros((1, 1)), 0
        most = entry.of(reach, "g")
        for x, used in _finite(p, entry, seen):
            total = total + x.sum(axis=-2, keepdims=True, dtype=np.float64)
            count = count + used.sum(axis=-1, dtype=np.int64)[..., None, None]
            for size in (x.max(axis=(-2, -1), initial=0), -x.min(axis=(-2, -1), initial=0)):
                np.maximum(most, size, out=most)
        entry.of(centre, "g..")[...] = total / np.maximum(count, 1)
    return centre, reach


def _finite(p: Problem, entry: Chunk, seen) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(keys, used)`` of each run: 0 where a key is not used, neither seen by all nor finite."""
    for run in runs(p, entry):
        x = run.of(p.k, "gj.")
        finite = np.isfinite(x.sum(axis=-1))  # sooner than to look at each number
        used = run.of(seen, "gj") & (finite if finite.all() else np.isfinite(x).all(axis=-1))
        yield (x if used.all() else np.where(used[..., None], x, 0)), used


def _squares(x):
    return (x * x).sum(axis=-1)


def lifted(call: Call, chunk: Chunk) -> Lifted:
    """The chunk's queries."""
    p = call.problem
    centre = np.repeat(chunk.of(call.centre, "g.."), p.group, axis=-3)
    found = _moved(chunk.of(p.q, "hq."), centre)
    found.vectors[..., -1] = 1
    return found


def _lifted_keys(call: Call, run: Chunk) -> np.ndarray:
    k, squares = _moved(run.of(call.problem.k, "gj."), run.of(call.centre, "g.."))
    far = np.isinf(squares)  # a score of -inf, whatever the query: not Inf - Inf
    if far.any():
        k[far] = 0
    k[..., -1] = -squares / 2
    return k


def _moved(x, centre) -> Lifted:
    shape = broadcast_shapes(x.shape, centre.shape)
    moved = np.empty((*shape[:-1], shape[-1] + 1), centre.dtype)
    vectors = np.subtract(x, centre, out=moved[..., :-1])
    return Lifted(moved, _squares(vectors))


def product(call: Call, chunk: Chunk, queries: Lifted) -> Attended:
    """Attend by the product; `queries` are those of `lifted`."""
    p, found = call.problem, Union(chunk)
    for run in runs(p, chunk):
        k, v = _lifted_keys(call, run), _of_sums(p, run.of(p.v, "gj."))
        for one in call.sets:
            options = run.options(one) | {"scale": 2 * call.alpha}
            stated = make_problem(queries.vectors, k, v, return_lse=True,
                          return_max=p.return_max, return_weights=p.return_weights,
                          **options)  # fmt: skip
            found.add(p, run.keys, *solve(stated, call.backend, None))
    from_centre = call.alpha * queries.squares
    row_max = None if found.row_max is None else found.row_max - from_centre
    return Attended(found.out, found.lse - from_centre, row_max, found.weights, found.lse)


def differences(call: Call, chunk: Chunk, value_dim: int | None = None) -> Attended:
    """Attend by differences, to values of the first `value_dim` dimensions."""
    p, found = call.problem, Union(chunk)
    q = _of_sums(p, chunk.of(p.q, "hq."))
    for run in runs(p, chunk):
        k, v = (_of_sums(p, run.of(x, "gj.")) for x in (p.k, p.v[..., :value_dim]))
        for one in call.sets:
            options = run.options(one) | {"scale": -call.alpha}
            stated = make_problem(q, k, v, score_function=SQUARED_DISTANCE, return_lse=True,
                          return_max=p.return_max, return_weights=p.return_weights,
                          **options)  # fmt: skip
            found.add(p, run.keys, *solve(stated, call.backend, None))
    return Attended(found.out, found.lse, found.row_max, found.weights, found.lse)


def _of_sums(p: Problem, x):
    return x.astype(p.accumulator, copy=False)


def product_gradients(call: Call, b: Backward, run: Chunk, queries: Lifted) -> Iterator[dict]:
    """The gradients by name, of one set of keys after another, of the chunk `run`. `b` is about the
    softmax, of whose lse the distance of a query from the centre is a chunk.
    """
    p, grad_lse = call.problem, b.grad_lse
    assert grad_lse is not None
    q, k, v = queries.vectors, _lifted_keys(call, run), _of_sums(p, run.of(p.v, "gj."))
    for one in call.sets:
        options = run.options(one) | {"scale": 2 * call.alpha}
        found = run.gradients(b, q, k, v, options, call.backend)
        dq, dk = found["q"], found["k"]
        found["q"], last = dq[..., :-1], dk[..., -1:]
        found["k"] = dk[..., :-1] - np.where(last == 0, 0, last * k[..., :-1])
        yield found
    if run.keys.start == 0:
        outward = 2 * call.alpha * grad_lse[..., None]
        yield {"q": -np.where(outward == 0, 0, outward * q[..., :-1])}


def difference_gradients(call: Call, b: Backward, run: Chunk) -> Iterator[dict]:
    """Likewise."""
    p = call.problem
    q = _of_sums(p, run.of(p.q, "hq."))
    k, v = (_of_sums(p, run.of(x, "gj.")) for x in (p.k, p.v))
    for one in call.sets:
        options = run.options(one) | {"scale": -call.alpha}
        yield run.gradients(b, q, k, v, options, call.backend, SQUARED_DISTANCE)


def run_forward_mode(call: Call, p: Problem, tangents) -> tuple[np.ndarray, np.ndarray]:
    """``(tangent of out, tangent of lse)`` along `tangents`, by the names of their operands: by
    differences, of one set of keys after another.
    """
    with np.errstate(all="ignore"):
        found = [_with_tangents(call, one, tangents) for one in call.sets]
        total = functools.reduce(np.logaddexp, (lse for _, lse, _, _ in found))
        if p.sinks is not None:
            total = np.logaddexp(total, p.sinks.astype(total.dtype)[:, None])
        shares = [_ratio(lse, total) for _, lse, _, _ in found]
        d_total = sum(share * d_lse for share, (_, _, _, d_lse) in zip(shares, found, strict=True))
        d_out = np.zeros((), p.accumulator)
        for share, (out, lse, own, d_lse) in zip(shares, found, strict=True):
            if call.normalize:
                factor, rise = share, d_lse - d_total
            else:
                factor, rise = np.exp(lse), d_lse
            d_out = d_out + factor[..., None] * (own + rise[..., None] * out)
        return d_out.astype(p.dtype, copy=False), d_total


def _with_tangents(call: Call, one: Problem, tangents):
    """``(out, lse, tangent of out, tangent of lse)`` of the softmax over one set of keys."""
    stated = replace(
        one, scale=-call.alpha, score_function=SQUARED_DISTANCE, return_lse=True,
        one_head=False, dtype=one.accumulator,
    )  # fmt: skip
    out, lse = solve(stated, call.backend, None)
    return out, lse, *numpy_backend.run_forward_mode(stated, tangents)


def _ratio(lse, total):
    return np.where(lse == -np.inf, 0, np.exp(lse - total))
