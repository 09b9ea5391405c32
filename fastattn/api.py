"""The public function: words in, arrays out."""

from __future__ import annotations

from .dispatch import select
from .problem import pose

__all__ = ["scaled_dot"]


def scaled_dot(
    q, k, v, *,
    scale=None, softcap=None, bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    return_lse=False, return_weights=False, out=None,
    backend=None, threads=None, precision=None,
):  # fmt: skip
    """Exact softmax attention, ``softmax(scale * q @ k.T) @ v``, in O(S) memory."""
    problem = pose(
        q, k, v, scale, softcap, bias, alibi, sinks,
        causal, window, q_offset, kv_lengths, spans, mask,
        return_lse, return_weights, out, threads, precision,
    )  # fmt: skip
    lse, weights = select(problem, backend).run(problem)
    result = problem.result
    if problem.one_head:
        result = result[0]
        lse = None if lse is None else lse[0]
        weights = None if weights is None else weights[0]
    if out is not None:
        if problem.out is not None:
            out[...] = result
        result = out
    if lse is None and weights is None:
        return result
    return (result, *(x for x in (lse, weights) if x is not None))
