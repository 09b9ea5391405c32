"""Gradients under a sparse mask in plain NumPy."""

from __future__ import annotations

import numpy as np

from ...core.backward import Backward
from ...core.problem import DOT, Problem
from ...core.row_sums import RowSums, sink_weights
from .score_functions import score_function_gradients
from .sparse_entries import (
    Entries,
    Head,
    add_sums,
    added,
    capped_products,
    distance_index,
    distances,
    entry_blocks,
    kept_of,
    keys_of,
    length,
    pieces,
    queries_of,
    shift_and_total,
    unscaled,
    values_of,
)
from .tiles import dropped

__all__ = ["run_backward"]


def run_backward(b: Backward, found: dict[str, np.ndarray]) -> None:
    """Add to the gradients in `found`, arrays with the axes of the problem."""
    with np.errstate(all="ignore"):
        for h, e in entry_blocks(b.problem):
            _differentiate(b, h, e, found)


def _add_scattered(total, places, x) -> None:
    """Add `x` to `total` at its places, in any order."""
    order = np.argsort(places, kind="stable")
    add_sums(total, places[order], x[order])


def _differentiate(b: Backward, h: Head, e: Entries, found: dict[str, np.ndarray]) -> None:
    """Add what one block of queries contributes to every gradient."""
    p, real = b.problem, b.problem.accumulator
    grad_out = b.grad_out[h.where][e.queries].astype(real)
    lse = b.lse[h.where][e.queries]
    mean = (grad_out * b.out[h.where][e.queries].astype(real)).sum(axis=-1)
    from_lse = np.zeros((), real) if b.grad_lse is None else b.grad_lse[h.where][e.queries]
    delta = mean - from_lse
    products = capped_products(p, h, e)
    s = added(p, h, e, products)
    shift, total = _settled(b, h, e, s, lse)
    w = np.exp(s - shift[e.rows]) / total[e.rows]
    along = np.empty_like(w)
    for piece in pieces(e):
        along[piece] = (grad_out[e.rows[piece]] * values_of(p, h, e, piece)).sum(axis=-1)
    kept = kept_of(p, h, e)
    grad_s = w * (dropped(p, along, kept) - delta[e.rows])
    used = dropped(p, w, kept)
    sink = np.zeros(())
    if h.sink is not None:
        sink = sink_weights(h.sink, np.exp(h.sink - shift) / total)
    head = h.where[-1]
    if "sinks" in found:
        found["sinks"][head] -= (sink * delta).sum()

    def of_factor(factor):
        """The gradient of what `factor` multiplies in each score."""
        sums = _row_sums(factor, e, w, grad_s)
        return sums.settled(mean, from_lse, sink, b.tolerance(shift))[1].sum()

    slope = 1 if p.softcap is None else 1 - (products / real.type(p.softcap)) ** 2
    if "scale" in found:
        found["scale"][head] += of_factor(unscaled(p, h, e) * slope)
    if "relative_bias" in found:
        own = found["relative_bias"][head]
        own += np.bincount(distance_index(h, e), grad_s, len(own))
    if "alibi" in found:
        found["alibi"][head] -= of_factor(distances(h, e))
    if "bias" in found:
        _add_to_bias(_broadcast_view(found["bias"], h.where), e, grad_s)
    grad_s = grad_s * slope
    grad_q = np.zeros((length(e.queries), p.head_dim), real)
    of_keys = {x: _broadcast_view(found[x], h.kv_where) for x in "kv" if x in found}
    for piece in pieces(e):
        rows, keys = e.rows[piece], e.keys[piece]
        more_q, more_k, more_w = _of_products(p, h, e, piece, grad_s[piece] * h.scale.astype(real))
        add_sums(grad_q, rows, more_q)
        if of_keys:
            _add_scattered(of_keys["k"], keys, more_k)
            _add_scattered(of_keys["v"], keys, used[piece, None] * grad_out[rows])
        if "w" in found:
            found["w"] += more_w
    _broadcast_view(found["q"], h.where)[e.queries] += grad_q


def _of_products(p: Problem, h: Head, e: Entries, piece: slice, grad):
    """``(grad_q, grad_k, grad_w)`` of each entry, from the gradient of its product."""
    q, k = queries_of(p, h, e, piece), keys_of(p, h, e, piece)
    if p.score_function is DOT:
        return grad[:, None] * k, grad[:, None] * q, None
    more_q, more_k, more_w = score_function_gradients(
        p.score_function, q[:, None], k[:, None], None, grad[:, None, None]
    )
    return more_q[:, 0], more_k[:, 0], more_w


def _settled(b: Backward, h: Head, e: Entries, s, lse) -> tuple[np.ndarray, np.ndarray]:
    """``(shift, total)`` of the weights, which a coarse lse is too coarse for."""
    shift, total = lse, np.ones_like(lse)
    coarse = np.isfinite(lse) & (np.abs(lse) > b.coarse())
    if coarse.any():
        own_shift, own_total = shift_and_total(b.problem, h, e, s)
        coarse &= b.replaces(own_shift + np.log(own_total.astype(np.float64)), lse)
        shift, total = np.where(coarse, own_shift, lse), np.where(coarse, own_total, total)
    return shift, total


def _row_sums(factor, e: Entries, w, grad_s) -> RowSums:
    """In float64."""
    n = length(e.queries)
    w, grad_s = w.astype(np.float64), grad_s.astype(np.float64)
    terms = w, grad_s, w * factor, grad_s * factor
    return RowSums(*(np.bincount(e.rows, x, minlength=n) for x in terms))


def _broadcast_view(x, where: tuple[int, ...]) -> np.ndarray:
    """The entry of `x` at an index of the problem's; axes of length 1 broadcast."""
    shape = x.shape[: len(where)]
    return x[tuple(0 if n == 1 else i for n, i in zip(shape, where, strict=True))]


def _add_to_bias(view, e: Entries, grad_s) -> None:
    """Add to a view of (queries or 1, keys or 1); what broadcasts is summed in float64."""
    row = e.rows + e.queries.start if len(view) > 1 else np.zeros_like(e.rows)
    column = e.keys if view.shape[1] > 1 else np.zeros_like(e.keys)
    if view.shape[0] > 1 and view.shape[1] > 1:
        view[row, column] += grad_s
    else:
        place = row + column
        view += np.bincount(place, grad_s, minlength=view.size).reshape(view.shape)
