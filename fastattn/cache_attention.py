"""What `KVCache.attend` does: a problem whose keys are the pages that a cache holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .attention import prepare, solve
from .core.arguments import integers
from .core.dtypes import float_dtype, widest
from .core.options import span_sides
from .core.output import destination
from .core.page_pool import PAGE
from .core.pages import Held
from .core.problem import Problem, make_problem
from .core.sequences import Sequences, Snapshot
from .core.token_layout import TokenLayout
from .core.visibility import key_range
from .merge import merge, share
from .plans import keep_plan, plan_key, plans, run_plan

__all__ = ["attend"]

# Options of arrays with an axis of all keys, those that a cache has by now.
_BY_KEYS = {"bias", "mask", "return_weights"}


def attend(
    sequences: Sequences, state: Snapshot, layout: TokenLayout, q, counts, causal, backend, out,
    options: dict,
):  # fmt: skip
    """The results of the queries `q` at the end of each sequence; `counts` of them, if given."""
    n, storage = q.shape[2], layout.storage
    own = float_dtype("q", q)
    wide = widest({own, storage.dtype}) if storage.widens else own
    narrows = wide is not own
    k, v, *scales = state.views
    n_keys, key = state.longest, None
    if counts is not None:
        options["q_offset"] = state.lengths - counts
        options["spans"] = _spans_of_rows(counts, n, options.get("spans"))
    elif sequences.window is out is None and not narrows and options.keys().isdisjoint(_BY_KEYS):
        # With as many keys as the pages have room for, a plan serves until they are full.
        n_keys = -(-n_keys // PAGE) * PAGE
        arrays = (q, k, v, state.table, state.lengths, state.lengths - n, *scales)
        key = plan_key(arrays, (n_keys, causal, backend, *options.items()))
        plan = plans.get(key)
        if plan:
            return run_plan(plan, arrays, options.get("threads"))
        options["kv_lengths"], options["q_offset"] = arrays[4:6]
    if state.ragged:
        options["kv_lengths"] = state.lengths
        options.setdefault("q_offset", state.lengths - n)
    held = Held(state.table, n_keys, *layout.dims, tuple(scales), storage.widens)
    p = make_problem(
        q.astype(wide) if narrows else q, k, v, causal=causal, held=held,
        out=None if narrows else out, **options,
    )  # fmt: skip
    if narrows and out is not None:
        destination(out, p.rows(p.value_dim), own, False, (q,))
    to = None if narrows else out
    if sequences.window is None:
        results = solve(p, backend, to)
    else:
        results = _through_window(sequences, sequences.window, state, p, counts, backend, to)
    results = results if isinstance(results, tuple) else (results,)
    if narrows:
        results = _narrowed(results, p, own, out)
    if key is not None:
        keep_plan(key, prepare, p, backend, True)
    if counts is not None and p.sinks is not None:
        _clear_rows(results, counts, n)
    return results if len(results) > 1 else results[0]


def _through_window(
    sequences: Sequences, window: int, state: Snapshot, p: Problem, counts, backend, out
):
    """The results where each query sees a window of the keys, and the first ones of the cache."""
    r = p.key_range
    counts = np.minimum(p.n_queries, state.lengths) if counts is None else counts
    first = state.lengths - counts - window + 1  # that each sequence's first query sees
    _check_held(sequences, state, counts, first)
    if sequences.keep_first == 0:
        left = window - 1 if r.left is None else min(r.left, window - 1)
        through = key_range(p.n_queries, p.n_keys, r.offset, True, (left, None), r.lengths, r.spans)
        return solve(replace(p, key_range=through), backend, out)

    # A query among the first sees these and no others.
    kept = min(sequences.keep_first, p.n_keys)
    offset = np.reshape(r.offset, (-1, 1, 1)) if isinstance(r.offset, np.ndarray) else r.offset
    position = offset + np.arange(p.n_queries)[None, None]
    among = position < kept
    before = np.where(among, 0, position - window + 1)
    near = _within(p, before, np.where(among, kept, position + 1))
    stop = np.clip(before, 0, kept)
    if not stop.any():
        return solve(near, backend, out)
    near = replace(near, return_lse=True, out=None)
    far = replace(_within(p, 0, stop), sinks=None, return_lse=True, out=None)
    return _joined(p, solve(near, backend, None), solve(far, backend, None), out)


def _within(p: Problem, start, stop) -> Problem:
    """`p` with no keys but ``start <= j < stop``."""
    r, start = p.key_range, np.asarray(start)
    if r.spans is not None:
        start, stop = np.maximum(start, r.spans[0]), np.minimum(stop, r.spans[1])
    start, stop = (np.clip(np.broadcast_to(x, p.rows()), 0, p.n_keys) for x in (start, stop))
    return replace(p, key_range=r._replace(spans=(start, stop)))


def _check_held(sequences: Sequences, state: Snapshot, counts, first) -> None:
    for b in np.flatnonzero(counts):
        _, *rest = sequences.held(state, int(b))
        if rest and first[b] < rest[0][0]:
            raise ValueError(
                f"q: expected at most the {state.last[b]} queries of the last append to sequence "
                f"{b}, as older keys are given back, got {counts[b]}"
            )


def _joined(p: Problem, near: tuple, far: tuple, out):
    """The results of `p` from those of two sets of keys."""
    result, lse = merge(near[:2], far[:2])
    if out is not None:
        out[:] = result
        result = out
    joined = [result, *([lse] if p.return_lse else [])]
    if p.return_max:
        joined.append(np.maximum(near[2], far[2]))
    if p.return_weights:
        with np.errstate(all="ignore"):
            shares = (share(x[1], lse)[..., None].astype(p.dtype) for x in (near, far))
            joined.append(sum(x[-1] * part for x, part in zip((near, far), shares, strict=True)))
    return tuple(joined)


def _narrowed(results: tuple, p: Problem, dtype, out) -> tuple:
    """Results of `p` in the dtype of the queries, and sums in the one that goes with it."""
    sums = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        cast = [x.astype(dtype if x.ndim > 3 else sums) for x in results]
    if out is not None:
        out[:] = cast[0]
        cast[0] = out
    return tuple(cast)


def _live_rows(counts, n) -> np.ndarray:
    """Which rows are queries, (batch, 1, n)."""
    return np.arange(n) < counts[:, None, None]


def _spans_of_rows(counts, n, spans):
    """Spans in which the rows that are no queries see nothing, and the others what they did."""
    live = _live_rows(counts, n)
    if spans is None:
        return 0, np.where(live, np.iinfo(np.int64).max, 0)
    start, stop = span_sides(spans)
    stop = integers("spans", stop)
    return start, np.where(live, stop, 0)


def _clear_rows(results: tuple, counts, n) -> None:
    """A row that is no query gets nothing of its sink either."""
    dead = ~_live_rows(counts, n)
    np.copyto(results[0], 0, where=dead[..., None])
    for x in results[1:]:
        if x.ndim == 3:  # of sums; weights are 0
            np.copyto(x, -np.inf, where=dead)
