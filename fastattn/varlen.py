"""Attention within each sequence of a packed batch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .attention import solve
from .core.arguments import flag, integers, plain
from .core.option_table import check
from .core.options import dropout_start, window_sides
from .core.output import destination, empty_like
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .documents import document_lengths
from .jvp import has_tangents, pushed_forward, tangents_of
from .vjp import differentiated, differentiates, without_out

__all__ = ["varlen"]


@attention
def varlen(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *, lengths=None, lengths_k=None,
    causal=False, window=None, q_offset=None, out=None, backend=None, **options,
):  # fmt: skip
    """Exact softmax attention within each of the sequences that are packed end to end.

    Parameters
    ----------
    q : array_like, (total_q, Hq, D)
    k : array_like, (total_k, Hkv, D)
    v : array_like, (total_k, Hkv, Dv)
        The sequences one after another, without padding; otherwise as of `fastattn.scaled_dot`. In
        the host's memory.
    cu_seqlens_q : array_like of int, (sequences + 1,)
        Where each sequence begins and the last one ends: from 0 to total_q, never falling. Empty
        sequences are fine.
    cu_seqlens_k : array_like of int, (sequences + 1,), optional
        The same for keys and values; `cu_seqlens_q` by default.
    lengths, lengths_k : array_like of int, (sequences,), optional
        The lengths of the sequences, in place of the cumulative ones.
    causal, window : optional
        As of `fastattn.scaled_dot`, within each sequence.
    q_offset : int or array_like of int, (sequences,), optional
        The position of a sequence's first query among its keys. By default the last query sees the
        last key: the number of keys less that of queries.
    out : ndarray, (total_q, Hq, Dv), optional
        Filled and returned.
    backend, **options
        As of `fastattn.scaled_dot`: scale, softcap, relative_bias, alibi, sinks, dropout and what
        concerns how it is computed and returned. Distances of `relative_bias` and `alibi` are
        counted within each sequence; dropout counts queries and keys as they are packed.

    Returns
    -------
    out : ndarray, (total_q, Hq, Dv)
    lse : ndarray, (Hq, total_q), if ``return_lse=True``

    Raises
    ------
    TypeError, ValueError
        Before any work; the message begins with the argument's name. The options `bias`, `mask`,
        `spans`, `kv_lengths`, `block_table` and `return_weights` are a TypeError.

    See Also
    --------
    document_spans : The same as `spans` of `scaled_dot`, for arrays with an axis of heads first.

    Notes
    -----
    The signature is that of ``flash_attn_varlen_func``, which likewise aligns a causal mask with
    the last query and the last key. With `fastattn.vjp`, ``cu_seqlens_q`` and ``cu_seqlens_k`` are
    options or positional; a positional one has None for its gradient.

    Examples
    --------
    Three sequences of 3, 1 and 4 tokens:

    >>> import numpy as np
    >>> import fastattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 2, 16), np.float32)
    >>> out, lse = fastattn.varlen(q, k, v, [0, 3, 4, 8], causal=True, return_lse=True)
    >>> out.shape, lse.shape
    ((8, 2, 16), (2, 8))
    >>> bool(np.array_equal(out[3], v[3]))  # a sequence of one token sees itself
    True
    """
    packed = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
    calls = _calls(packed, causal, window, q_offset, options)
    if len(calls) == 1:
        target = None if out is None else _heads_first(out)
        results = solve(_problem(packed, calls[0], options, out=target), backend, target)
    else:
        problems = [_problem(packed, call, options) for call in calls]
        results = _solve_each(packed, calls, problems, backend)
        if out is not None:
            target = _heads_first(out)
            shape, dtype = packed.result_shape, problems[0].dtype
            destination(target, shape, dtype, False, (packed.q, packed.k, packed.v))
            target[...] = results[0] if isinstance(results, tuple) else results
    return _tokens_first(results, out)


class _Packed(NamedTuple):
    """Checked arrays, heads first, and where the sequences are in them."""

    q: np.ndarray  # (Hq, total_q, D)
    k: np.ndarray  # (Hkv, total_k, D)
    v: np.ndarray  # (Hkv, total_k, Dv)
    cu_q: np.ndarray  # (sequences + 1,), int64
    cu_k: np.ndarray

    @property
    def result_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:2], self.v.shape[-1])


class _Call(NamedTuple):
    """Neighbouring sequences that one problem can hold: their positions agree."""

    queries: slice
    keys: slice
    q_offset: int
    spans: tuple[np.ndarray, np.ndarray]  # (queries,), counted from the first of `keys`


def _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k) -> _Packed:
    arrays = {name: plain(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    for name, x in arrays.items():
        if x.ndim != 3:
            raise ValueError(f"{name}: expected 3 axes, (tokens, heads, dim), got {x.ndim}")
    total_q, total_k = len(arrays["q"]), len(arrays["k"])
    cu_q = _cumulative("cu_seqlens_q", cu_seqlens_q, "lengths", lengths, total_q)
    if cu_q is None:
        raise TypeError("cu_seqlens_q: expected where the sequences begin, or lengths=, got None")
    cu_k = _cumulative("cu_seqlens_k", cu_seqlens_k, "lengths_k", lengths_k, total_k)
    if cu_k is None:
        if total_k != total_q:
            raise ValueError(
                f"k: expected {total_q} tokens as in q without cu_seqlens_k, got {total_k}"
            )
        cu_k = cu_q
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seqlens_k: expected {cu_q.size} entries as in cu_seqlens_q, "
                         f"got {cu_k.size}")  # fmt: skip
    heads_first = {name: x.swapaxes(0, 1) for name, x in arrays.items()}
    return _Packed(**heads_first, cu_q=cu_q, cu_k=cu_k)


def _cumulative(name, cumulative, lengths_name, lengths, total) -> np.ndarray | None:
    """Where sequences begin and the last one ends, from either way to say it."""
    if lengths is not None:
        if cumulative is not None:
            raise TypeError(f"{lengths_name}: expected None beside {name}, got both")
        name, ends = lengths_name, np.cumsum(document_lengths(lengths_name, lengths))
        cumulative = np.concatenate([[0], ends])
    elif cumulative is None:
        return None
    else:
        cumulative = integers(name, cumulative)
        if cumulative.ndim != 1 or not cumulative.size:
            raise ValueError(f"{name}: expected shape (sequences + 1,), got {cumulative.shape}")
        if cumulative[0] != 0:
            raise ValueError(f"{name}: expected 0 first, got {cumulative[0]}")
        if (np.diff(cumulative) < 0).any():
            raise ValueError(f"{name}: expected entries that never fall, got {cumulative}")
    if cumulative[-1] != total:
        raise ValueError(f"{name}: expected {total} tokens in all, got {cumulative[-1]}")
    return cumulative


def _calls(packed: _Packed, causal, window, q_offset, options) -> list[_Call]:
    """The fewest calls: one, but where a score depends on positions that do not agree."""
    check("varlen", options)
    cu_q, cu_k = packed.cu_q, packed.cu_k
    n_queries, n_keys = np.diff(cu_q), np.diff(cu_k)
    offset = _offsets(q_offset, n_keys - n_queries)
    start, stop = _spans(packed, offset, flag("causal", causal), window)
    # The position of the first query less that of the first key, both counted in the packed arrays.
    shift = offset - cu_q[:-1] + cu_k[:-1]
    firsts = np.zeros(1, np.int64)
    if any(options.get(name) is not None for name in ("alibi", "relative_bias")):
        some = np.flatnonzero((n_queries > 0) & (n_keys > 0))
        changes = some[1:][np.diff(shift[some]) != 0]
        firsts = np.concatenate([firsts, changes])
        shift = shift if not some.size else np.where(n_queries * n_keys > 0, shift, shift[some[0]])
    calls = []
    for first, last in zip(firsts, [*firsts[1:], len(n_queries)], strict=True):
        queries, keys = slice(cu_q[first], cu_q[last]), slice(cu_k[first], cu_k[last])
        used = np.flatnonzero((n_queries[first:last] > 0) & (n_keys[first:last] > 0))
        at = int(shift[first + used[0]]) if used.size else 0
        spans = start[queries] - keys.start, stop[queries] - keys.start
        calls.append(_Call(queries, keys, at + int(queries.start - keys.start), spans))
    return calls


def _offsets(q_offset, default) -> np.ndarray:
    if q_offset is None:
        return default
    offset = integers("q_offset", q_offset)
    if offset.ndim > 1 or offset.shape not in ((), default.shape):
        raise ValueError(f"q_offset: expected an int or shape {default.shape}, got {offset.shape}")
    return np.broadcast_to(offset, default.shape)


def _spans(packed: _Packed, offset, causal: bool, window) -> tuple[np.ndarray, np.ndarray]:
    """``(start, stop)`` of each query in the packed keys."""
    n_queries = np.diff(packed.cu_q)

    def of_queries(x):
        return np.repeat(x, n_queries)

    begin, n_keys = of_queries(packed.cu_k[:-1]), of_queries(np.diff(packed.cu_k))
    left, right = (None, None) if window is None else window_sides(window)
    right = 0 if causal else right
    start, stop = np.zeros_like(n_keys), n_keys
    if left is not None or right is not None:
        position = np.arange(len(begin)) + of_queries(offset - packed.cu_q[:-1])
        if left is not None:
            start = np.clip(position - left, 0, n_keys)
        if right is not None:
            stop = np.clip(position + (right + 1), start, n_keys)
    return begin + start, begin + stop


def _problem(packed: _Packed, call: _Call, options, **more) -> Problem:
    q, (k, v) = packed.q[:, call.queries], (x[:, call.keys] for x in (packed.k, packed.v))
    if options.get("dropout") is not None:
        b, h, i, j = dropout_start(options.get("dropout_offset"))
        start = b, h, i + call.queries.start, j + call.keys.start
        options = options | {"dropout_offset": start}
    return make_problem(q, k, v, q_offset=call.q_offset, spans=call.spans, **options, **more)


def _heads_first(out):
    return out.swapaxes(0, 1) if isinstance(out, np.ndarray) and out.ndim == 3 else out


def _tokens_first(results, out=None):
    """The results with the axes of q, and `out` as the caller knows it."""
    if not isinstance(results, tuple):
        return results.swapaxes(0, 1) if out is None else out
    return (_tokens_first(results[0], out), *results[1:])


def _solve_each(packed: _Packed, calls, problems, backend):
    """The results of several problems, put together along the queries."""
    out = empty_like(packed.q, packed.result_shape, problems[0].dtype)
    rest = []
    for call, problem in zip(calls, problems, strict=True):
        target = out[:, call.queries]
        results = solve(replace(problem, out=target), backend, target)
        rest.append(results[1:] if isinstance(results, tuple) else ())
    joined = [np.concatenate(parts, axis=1) for parts in zip(*rest, strict=True)]
    return (out, *joined) if joined else out


@differentiates(varlen)
def _varlen(
    q, k, v, *positional, wrt, cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, lengths_k=None,
    causal=False, window=None, q_offset=None, backend=None, return_lse=False, **options,
):  # fmt: skip
    without_out(options)
    if positional:
        cu_seqlens_q, cu_seqlens_k = (*positional, cu_seqlens_k)[:2]
    packed = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
    calls = _calls(packed, causal, window, q_offset, options)
    problems = [
        _problem(packed, call, options, gradients=True, wrt=wrt, return_lse=True) for call in calls
    ]
    pairs = [differentiated(problem, backend, return_lse) for problem in problems]
    results = _concatenated([results for results, _ in pairs])

    def pullback(grad_out, grad_lse=None):
        grad_out = plain("grad_out", grad_out).swapaxes(0, 1)
        pairs_of = zip(packed[:3], problems[0].gradients[:3], strict=True)
        totals = [np.zeros(x.shape, gradient.dtype) for x, gradient in pairs_of]
        options = [0 for _ in wrt]
        for call, (_, back) in zip(calls, pairs, strict=True):
            part = None if grad_lse is None else plain("grad_lse", grad_lse)[:, call.queries]
            found = back(grad_out[:, call.queries], part)
            sides = (call.queries, call.keys, call.keys)
            for total, x, side in zip(totals, found[:3], sides, strict=True):
                total[:, side] = x
            options = [total + x for total, x in zip(options, found[3:], strict=True)]
        arrays = (x.swapaxes(0, 1) for x in totals)
        return (*arrays, *(None for _ in positional), *options)

    return _tokens_first(results), pullback


def _concatenated(results):
    if not isinstance(results[0], tuple):
        return results[0] if len(results) == 1 else np.concatenate(results, axis=1)
    return tuple(map(_concatenated, zip(*results, strict=True)))


@has_tangents(varlen)
def _varlen_tangents(
    arrays, tangents, *, cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, lengths_k=None,
    causal=False, window=None, q_offset=None, **options,
):  # fmt: skip
    packed = _packed(*arrays, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k)
    tangents = [None if t is None else t.swapaxes(0, 1) for t in tangents]
    found = []
    for call in _calls(packed, causal, window, q_offset, options):
        sides = (call.queries, call.keys, call.keys)
        arrays = [x[:, side] for x, side in zip(packed[:3], sides, strict=True)]
        p, backend, return_lse = tangents_of(
            arrays, dict(options), q_offset=call.q_offset, spans=call.spans
        )
        moved = [None if t is None else t[:, s] for t, s in zip(tangents, sides, strict=True)]
        found.append(pushed_forward(p, moved, backend, return_lse))
    return tuple(_tokens_first(_concatenated(each)) for each in zip(*found, strict=True))
