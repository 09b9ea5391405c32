"""Attention under a sparse mask in plain NumPy: an entry of the mask is a tile of one score.

For some rows at a time the keys of all entries are gathered, and what belongs to a row is summed by
``reduceat``: time and memory follow the entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ...core.arguments import in_range
from ...core.backward import Backward
from ...core.bins import no_top_keys
from ...core.dtypes import as_real
from ...core.problem import DOT, Problem
from ...core.row_sums import RowSums
from .score_functions import score_function_gradients, unscaled_scores
from .tiles import Paged, capped_products_of, dropped, sum_in_range

__all__ = ["run", "run_backward", "run_map", "run_top"]

# Entries, or rows, that are looked at together: what is gathered for them takes a MiB or a few.
ENTRIES = 1 << 13
# Numbers of a row that are summed from zero before they join the others, which alone would have
# several times the rounding error of a product.
RUN = 128


class Head(NamedTuple):
    """The operands of one query head of one batch entry."""

    where: tuple[int, ...]  # its index in a result
    kv_where: tuple[int, ...]
    q: np.ndarray  # (queries, head_dim)
    k: np.ndarray | Paged  # (keys, head_dim), or of pages (n_pages, page, head_dim)
    v: np.ndarray | Paged
    k_scales: np.ndarray | Paged | None  # (keys, groups)
    v_scales: np.ndarray | Paged | None
    scale: np.float64
    bias: np.ndarray | None  # (queries, keys)
    relative_bias: np.ndarray | None  # (2 R + 1,)
    slope: Any  # of alibi, or None
    sink: Any
    q_offset: int


class Entries(NamedTuple):
    """Pairs of some queries of a head and the keys that they see, row by row."""

    queries: slice
    rows: np.ndarray  # (entries,), from the first query on, ascending
    keys: np.ndarray  # (entries,)
    biases: list[np.ndarray]  # (entries,), in the order in which they are added


def run(p: Problem, result, lse, row_max, weights) -> None:
    """Fill `result`, and `lse`, `row_max` and `weights` where given; weights hold 0 already."""
    with np.errstate(all="ignore"):
        for h, e in _blocks(p):
            s = _scores(p, h, e)
            w, row_lse = _softmax(p, h, e, s)
            result[h.where][e.queries] = _mean(p, h, e, dropped(p, w, _kept(p, h, e)))
            if lse is not None:
                lse[h.where][e.queries] = row_lse
            if row_max is not None:
                row_max[h.where][e.queries] = _row_max(e, s, -np.inf)
            if weights is not None:
                weights[h.where][e.queries][e.rows, e.keys] = w


def run_backward(b: Backward, found: dict[str, np.ndarray]) -> None:
    """Add to the gradients in `found`, arrays with the axes of the problem."""
    with np.errstate(all="ignore"):
        for h, e in _blocks(b.problem):
            _differentiate(b, h, e, found)


def run_map(p: Problem, found) -> None:
    """Add the weights to the cells of `found`, (batch, heads, rows, columns)."""
    rows, columns = found.shape[-2:]
    with np.errstate(all="ignore"):
        for h, e in _blocks(p):
            w, _ = _softmax(p, h, e, _scores(p, h, e))
            # The inverse of `bin_starts`.
            row = ((e.queries.start + e.rows + 1) * rows - 1) // p.n_queries
            column = ((e.keys.astype(np.int64) + 1) * columns - 1) // p.n_keys
            first = row[0] if len(row) else 0
            cells = np.bincount((row - first) * columns + column, w)
            found[h.where].reshape(-1)[first * columns : first * columns + len(cells)] += cells


def run_top(p: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n)."""
    indices, weights = no_top_keys(p, n)
    with np.errstate(all="ignore"):
        for h, e in _blocks(p):
            s = _scores(p, h, e)
            w, _ = _softmax(p, h, e, s)
            wrong = np.zeros(_length(e.queries), bool)
            wrong[e.rows[np.isnan(w) & (s != np.inf)]] = True  # beside Inf, which weighs Inf / Inf
            s = np.where(np.isnan(s), -np.inf, s)
            order = np.lexsort((-s, e.rows))  # stable: of equal scores the lower index first
            order = order[s[order] > -np.inf]
            rows = e.rows[order]
            place = np.arange(len(rows)) - np.searchsorted(rows, rows)
            order, rows, place = (x[place < n] for x in (order, rows, place))
            own_indices, own_weights = indices[h.where][e.queries], weights[h.where][e.queries]
            own_indices[rows, place], own_weights[rows, place] = e.keys[order], w[order]
            own_indices[wrong], own_weights[wrong] = -1, np.nan
    return indices, weights


def _blocks(p: Problem) -> Iterator[tuple[Head, Entries]]:
    """Every query with all entries of its row, and with the operands of its head."""
    intervals = p.key_range.bounds()
    for batch in np.ndindex(p.batch):
        starts = p.mask.starts[p.mask.pattern_of(batch)]
        for head in range(p.heads):
            h, interval = _head(p, batch, head), None
            if intervals is not None:
                interval = tuple(np.broadcast_to(x, p.rows())[h.where] for x in intervals)
            first = 0
            while first < p.n_queries:
                last = int(np.searchsorted(starts, starts[first] + ENTRIES, "right")) - 1
                last = min(max(last, first + 1), first + ENTRIES, p.n_queries)
                yield h, _entries(p, h, slice(first, last), interval)
                first = last


def _head(p: Problem, batch: tuple[int, ...], head: int) -> Head:
    where, kv_where = (*batch, head), (*batch, head // p.group)

    def of(x, index, heads):
        return None if x is None else np.broadcast_to(x, (*p.batch, heads, *x.shape[-2:]))[index]

    def of_keys(x):
        if x is None or p.block_table is None:
            return of(x, kv_where, p.kv_heads)
        pool = np.broadcast_to(x, (len(x), p.kv_heads, *x.shape[2:]))
        return Paged(pool[:, kv_where[-1]], p.block_table[batch if len(p.block_table) > 1 else 0])

    return Head(
        where, kv_where,
        of(p.q, where, p.heads), of_keys(p.k), of_keys(p.v), of_keys(p.k_scales),
        of_keys(p.v_scales), np.float64(p.scale if isinstance(p.scale, float) else p.scale[head]),
        of(p.bias, where, p.heads), None if p.relative_bias is None else p.relative_bias[head],
        None if p.alibi is None else p.accumulator.type(p.alibi[head]),
        None if p.sinks is None else p.accumulator.type(p.sinks[head]),
        p.q_offset if isinstance(p.q_offset, int) else int(p.q_offset[batch][0]),
    )  # fmt: skip


def _entries(p: Problem, h: Head, queries: slice, interval) -> Entries:
    """What is seen of some rows: biases of -inf leave entries out."""
    rows, keys = p.mask.entries(p.mask.pattern_of(h.where[:-1]), queries, interval)
    e = Entries(queries, rows, keys, [])
    if h.bias is not None:
        e.biases.append(h.bias[queries.start + rows, keys])
    if h.relative_bias is not None:
        e.biases.append(h.relative_bias[_distance_index(h, e)])
    seen = np.all([bias != -np.inf for bias in e.biases], axis=0)
    if seen.all():
        return e
    return Entries(queries, rows[seen], keys[seen], [bias[seen] for bias in e.biases])


def _pieces(e: Entries) -> Iterator[slice]:
    """So many entries at a time as are gathered together."""
    for first in range(0, len(e.keys), ENTRIES):
        yield slice(first, first + ENTRIES)


def _keys(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    keys = e.keys[piece]
    return as_real(_gathered(h.k, keys), _gathered(h.k_scales, keys), p.accumulator, p.head_dim)


def _values(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    keys = e.keys[piece]
    return as_real(_gathered(h.v, keys), _gathered(h.v_scales, keys), p.accumulator, p.value_dim)


def _gathered(x: np.ndarray | Paged | None, keys):
    if isinstance(x, Paged):
        return x.pool[x.pages[keys // x.pool.shape[1]], keys % x.pool.shape[1]]
    return None if x is None else x[keys]


def _queries(p: Problem, h: Head, e: Entries, piece: slice) -> np.ndarray:
    return h.q[e.queries][e.rows[piece]].astype(p.accumulator)


def _capped_products(p: Problem, h: Head, e: Entries) -> np.ndarray:
    """The scores before anything is added: (entries,)."""
    s = np.empty(len(e.keys), p.accumulator)
    for piece in _pieces(e):
        q, k = _queries(p, h, e, piece)[:, None], _keys(p, h, e, piece)[:, None]
        scaled = q * h.scale.astype(p.accumulator) if p.score_function is DOT else q
        s[piece] = capped_products_of(p, h.scale, scaled, k, q)[:, 0, 0]
    return s


def _unscaled(p: Problem, h: Head, e: Entries) -> np.ndarray:
    """What the scale of each score multiplies: (entries,)."""
    found = np.empty(len(e.keys), p.accumulator)
    for piece in _pieces(e):
        q, k = _queries(p, h, e, piece), _keys(p, h, e, piece)
        if p.score_function is DOT:
            found[piece] = (q * k).sum(axis=-1)
        else:
            found[piece] = unscaled_scores(p.score_function, q[:, None], k[:, None])[:, 0, 0]
    return found


def _distance_index(h: Head, e: Entries) -> np.ndarray:
    """Where the distance of each key stands in the relative bias."""
    assert h.relative_bias is not None
    reach = len(h.relative_bias) // 2
    return np.clip(e.keys - (e.rows + (e.queries.start + h.q_offset)), -reach, reach) + reach


def _kept(p: Problem, h: Head, e: Entries) -> np.ndarray | None:
    """Which weights dropout keeps; None without it."""
    if p.dropout is None:
        return None
    *batch, head = h.where
    entry = np.ravel_multi_index(batch, p.batch) if batch else 0
    return p.dropout.kept_of(entry, head, e.queries.start + e.rows, e.keys)


def _distances(h: Head, e: Entries) -> np.ndarray:
    return np.abs(e.rows + (e.queries.start + h.q_offset) - e.keys)


def _scores(p: Problem, h: Head, e: Entries) -> np.ndarray:
    return _added(p, h, e, _capped_products(p, h, e))


def _added(p: Problem, h: Head, e: Entries, products) -> np.ndarray:
    """The scores of `products`: with the biases, then alibi."""
    real, s = p.accumulator.type, products
    for bias in e.biases:
        bias = in_range(bias, real).astype(real)
        s = sum_in_range(s + bias, s, bias)
    if h.slope is not None:
        s = sum_in_range(s - h.slope * _distances(h, e).astype(real), s, h.slope)
    return s


def _length(side: slice) -> int:
    return side.stop - side.start


def _row_tops(p: Problem, h: Head, e: Entries, s) -> np.ndarray:
    """What scores are taken relative to: the largest of each row or its sink, 0 where is none."""
    top = _row_max(e, s, -np.inf if h.sink is None else h.sink)
    return np.where(top == -np.inf, p.accumulator.type(0), top)


def _row_max(e: Entries, s, initial) -> np.ndarray:
    """The largest number of each row, at least `initial`."""
    top = np.full(_length(e.queries), initial, s.dtype)
    starts = np.flatnonzero(np.diff(e.rows, prepend=-1))
    if len(starts):
        rows = e.rows[starts]
        top[rows] = np.maximum(top[rows], np.maximum.reduceat(s, starts))
    return top


def _softmax(p: Problem, h: Head, e: Entries, s) -> tuple[np.ndarray, np.ndarray]:
    """``(weights, lse)`` of the entries and of the rows."""
    shift, total = _shift_and_total(p, h, e, s)
    return np.exp(s - shift[e.rows]) / total[e.rows], shift + np.log(total)


def _shift_and_total(p: Problem, h: Head, e: Entries, s) -> tuple[np.ndarray, np.ndarray]:
    """The weights are ``exp(s - shift) / total``."""
    shift = _row_tops(p, h, e, s)
    total = _summed(e.rows, np.exp(s - shift[e.rows]), len(shift))
    if h.sink is not None:
        total += np.exp(h.sink - shift)
    # Inf beside which others weigh nothing.
    return shift, np.where(shift == np.inf, p.accumulator.type(1), total)


def _mean(p: Problem, h: Head, e: Entries, w) -> np.ndarray:
    """The sum of the values by their weights, which add up to 1 at most."""
    out = np.zeros((_length(e.queries), p.value_dim), p.accumulator)
    for piece in _pieces(e):
        v = _values(p, h, e, piece)
        _add_sums(out, e.rows[piece], w[piece, None] * v)
    lost = np.isinf(out)
    if lost.any():  # the mean of the largest numbers may be rounded up
        infinite = np.zeros(out.shape, bool)
        for piece in _pieces(e):
            rows, columns = np.nonzero(~np.isfinite(_values(p, h, e, piece)))
            infinite[e.rows[piece][rows], columns] = True
        most = np.finfo(out.dtype).max
        out = np.where(lost & ~infinite & np.isfinite(out).any(), np.clip(out, -most, most), out)
    return out


def _summed(places, x, n: int) -> np.ndarray:
    """`x` summed by its places, which ascend: (n, ...)."""
    total = np.zeros((n, *x.shape[1:]), x.dtype)
    _add_sums(total, places, x)
    return total


def _add_sums(total, places, x) -> None:
    """Add `x` to `total` at its places, which ascend."""
    starts = np.flatnonzero(np.diff(places, prepend=-1))
    while len(starts) < len(x):
        # Runs of at most so many rows each, then runs of their sums.
        at = np.arange(len(x)) - np.repeat(starts, np.diff(starts, append=len(x)))
        runs = np.flatnonzero(at % RUN == 0)
        x, places = np.add.reduceat(x, runs, axis=0), places[runs]
        starts = np.flatnonzero(np.diff(places, prepend=-1))
    total[places] += x


def _add_scattered(total, places, x) -> None:
    """Add `x` to `total` at its places, in any order."""
    order = np.argsort(places, kind="stable")
    _add_sums(total, places[order], x[order])


def _differentiate(b: Backward, h: Head, e: Entries, found: dict[str, np.ndarray]) -> None:
    """Add what one block of queries contributes to every gradient."""
    p, real = b.problem, b.problem.accumulator
    grad_out = b.grad_out[h.where][e.queries].astype(real)
    lse = b.lse[h.where][e.queries]
    mean = (grad_out * b.out[h.where][e.queries].astype(real)).sum(axis=-1)
    from_lse = np.zeros((), real) if b.grad_lse is None else b.grad_lse[h.where][e.queries]
    delta = mean - from_lse
    products = _capped_products(p, h, e)
    s = _added(p, h, e, products)
    shift, total = _settled(b, h, e, s, lse)
    w = np.exp(s - shift[e.rows]) / total[e.rows]
    along = np.empty_like(w)
    for piece in _pieces(e):
        along[piece] = (grad_out[e.rows[piece]] * _values(p, h, e, piece)).sum(axis=-1)
    kept = _kept(p, h, e)
    grad_s = w * (dropped(p, along, kept) - delta[e.rows])
    used = dropped(p, w, kept)
    sink = np.zeros(())
    if h.sink is not None:
        sink = np.where(h.sink == -np.inf, 0, np.exp(h.sink - shift) / total)
    head = h.where[-1]
    if "sinks" in found:
        found["sinks"][head] -= (sink * delta).sum()

    def of_factor(factor):
        """The gradient of what `factor` multiplies in each score."""
        sums = _row_sums(factor, e, w, grad_s)
        return sums.settled(mean, from_lse, sink, b.tolerance(shift))[1].sum()

    slope = 1 if p.softcap is None else 1 - (products / real.type(p.softcap)) ** 2
    if "scale" in found:
        found["scale"][head] += of_factor(_unscaled(p, h, e) * slope)
    if "relative_bias" in found:
        own = found["relative_bias"][head]
        own += np.bincount(_distance_index(h, e), grad_s, len(own))
    if "alibi" in found:
        found["alibi"][head] -= of_factor(_distances(h, e))
    if "bias" in found:
        _add_to_bias(_broadcast_view(found["bias"], h.where), e, grad_s)
    grad_s = grad_s * slope
    grad_q = np.zeros((_length(e.queries), p.head_dim), real)
    of_keys = {x: _broadcast_view(found[x], h.kv_where) for x in "kv" if x in found}
    for piece in _pieces(e):
        rows, keys = e.rows[piece], e.keys[piece]
        more_q, more_k, more_w = _of_products(p, h, e, piece, grad_s[piece] * h.scale.astype(real))
        _add_sums(grad_q, rows, more_q)
        if of_keys:
            _add_scattered(of_keys["k"], keys, more_k)
            _add_scattered(of_keys["v"], keys, used[piece, None] * grad_out[rows])
        if "w" in found:
            found["w"] += more_w
    _broadcast_view(found["q"], h.where)[e.queries] += grad_q


def _of_products(p: Problem, h: Head, e: Entries, piece: slice, grad):
    """``(grad_q, grad_k, grad_w)`` of each entry, from the gradient of its product."""
    q, k = _queries(p, h, e, piece), _keys(p, h, e, piece)
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
        own_shift, own_total = _shift_and_total(b.problem, h, e, s)
        coarse &= b.replaces(own_shift + np.log(own_total.astype(np.float64)), lse)
        shift, total = np.where(coarse, own_shift, lse), np.where(coarse, own_total, total)
    return shift, total


def _row_sums(factor, e: Entries, w, grad_s) -> RowSums:
    """In float64."""
    n = _length(e.queries)
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
