"""Attention within each sequence of a packed batch."""

from __future__ import annotations

import numpy as np

from .attention import solve
from .core.arguments import integers, plain, shaped
from .core.option_table import check
from .core.packing import Packing
from .core.problem import make_problem
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
    q, k, v : array_like, (total_q, Hq, D), (total_k, Hkv, D) and (total_k, Hkv, Dv)
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
        The widest dtype of `q`, `k` and `v`, in the memory order of `q`.
    lse : ndarray, (Hq, total_q), if ``return_lse=True``
        As of `fastattn.scaled_dot`.
    row_max : ndarray, (Hq, total_q), if ``return_max=True``
        Likewise.

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
    the last query and the last key. With the ``cython`` backend and without dropout, the results of
    a sequence, and its gradients of `q`, `k` and `v`, are those of a call of its own, bit for bit.
    With `fastattn.vjp`, ``cu_seqlens_q`` and ``cu_seqlens_k`` are options or positional; a
    positional one has None for its gradient.

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
    check("varlen", options)
    arrays, sequences = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, q_offset)
    target = _heads_first(out)
    problem = make_problem(
        *arrays, causal=causal, window=window, packing=sequences, out=target, **options
    )
    return _tokens_first(solve(problem, backend, target), out)


def _packed(
    q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, q_offset
) -> tuple[tuple[np.ndarray, ...], Packing]:
    """The arrays, heads first, and where the sequences are in them."""
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
    offset = _offsets(q_offset, np.diff(cu_k) - np.diff(cu_q))
    return tuple(x.swapaxes(0, 1) for x in arrays.values()), Packing(cu_q, cu_k, offset)


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


def _offsets(q_offset, default) -> np.ndarray:
    if q_offset is None:
        return default
    offset = integers("q_offset", q_offset)
    if offset.ndim > 1 or offset.shape not in ((), default.shape):
        raise ValueError(f"q_offset: expected an int or shape {default.shape}, got {offset.shape}")
    return np.broadcast_to(offset, default.shape)


def _heads_first(out):
    return out.swapaxes(0, 1) if isinstance(out, np.ndarray) and out.ndim == 3 else out


def _tokens_first(results, out=None):
    """The results with the axes of q, and `out` as the caller knows it."""
    if not isinstance(results, tuple):
        return results.swapaxes(0, 1) if out is None else out
    return (_tokens_first(results[0], out), *results[1:])


@differentiates(varlen, 3, 5)
def _varlen(
    q, k, v, *positional, wrt, cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, lengths_k=None,
    causal=False, window=None, q_offset=None, backend=None, return_lse=False, **options,
):  # fmt: skip
    without_out(options)
    if positional:
        cu_seqlens_q, cu_seqlens_k = (*positional, cu_seqlens_k)[:2]
    check("varlen", options)
    arrays, sequences = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, q_offset)
    problem = make_problem(
        *arrays, causal=causal, window=window, packing=sequences, gradients=True, wrt=wrt,
        return_lse=True, **options,
    )  # fmt: skip
    results, back = differentiated(problem, backend, return_lse)

    def pullback(grad_out, grad_lse=None):
        grad_out = shaped("grad_out", grad_out, out.shape)
        found = back(grad_out.swapaxes(0, 1), grad_lse)
        arrays = (x.swapaxes(0, 1) for x in found[:3])
        return (*arrays, *(None for _ in positional), *found[3:])

    results = _tokens_first(results)
    out = results[0] if isinstance(results, tuple) else results
    return results, pullback


@has_tangents(varlen)
def _varlen_tangents(
    arrays, tangents, *, cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, lengths_k=None,
    causal=False, window=None, q_offset=None, backend=None, **options,
):  # fmt: skip
    check("varlen", options)
    arrays, sequences = _packed(*arrays, cu_seqlens_q, cu_seqlens_k, lengths, lengths_k, q_offset)
    p, _, return_lse = tangents_of(arrays, options, causal=causal, window=window, packing=sequences)
    moved = [None if t is None else t.swapaxes(0, 1) for t in tangents]
    return tuple(map(_tokens_first, pushed_forward(p, moved, backend, return_lse)))
