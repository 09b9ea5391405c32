"""Second derivatives in plain NumPy: how gradients change along tangents, in O(S) memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...core.problem import Problem
from ...core.row_sums import sink_weights
from .backward import add, add_along_diagonals, new_gradients
from .score_functions import where_visible
from .tangents import along_problem, push_block_forward, score_tangents
from .tiles import (
    Heads,
    capped_products,
    distances,
    dropped,
    kept,
    key_blocks,
    keys_of,
    product,
    query_blocks,
    scores,
    values_of,
)

__all__ = ["run_second_order"]


def run_second_order(
    problem: Problem, tangents: Mapping[str, np.ndarray], grad_out, grad_lse
) -> dict[str, np.ndarray]:
    """The tangents, along `tangents` as in `run_forward_mode`, of the gradients that `problem`, of
    dot products under a dense mask, asks for, by name as in `run_backward`. `grad_out` and
    `grad_lse`, with the axes of the problem, stay.

    With the Hessian ``H`` of ``sum(grad_out * out) + sum(grad_lse * lse)`` it is its product with
    the tangents, so it serves in reverse mode, too: ``H`` is symmetric.
    """
    p = problem
    found = new_gradients(p)
    along = along_problem(p, tangents)
    moving = frozenset(tangents)
    with np.errstate(all="ignore"):
        blocks = zip(query_blocks(p), query_blocks(along), strict=True)
        for (h, queries), (a, _) in blocks:
            of_out, of_lse = (_grouped(p, h, queries, x) for x in (grad_out, grad_lse))
            _differentiate(p, h, a, moving, queries, of_out, of_lse, found)
    return found


def _grouped(p: Problem, h: Heads, queries: slice, x) -> np.ndarray:
    """Some rows of an array with the axes of a result, (kv_heads, group, queries, ...)."""
    x = x[h.where][:, queries]
    return x.reshape(*h.shape, *x.shape[1:]).astype(p.accumulator)


def _differentiate(
    p: Problem, h: Heads, a: Heads, moving, queries: slice, grad_out, grad_lse, found
) -> None:
    """Add what one block of queries contributes. ``dx`` is the tangent of ``x``, ``gx`` its
    gradient and ``dgx`` the tangent of that.
    """
    real = p.accumulator
    r = push_block_forward(p, h, a, moving, queries)
    q, scale = h.q[:, :, queries].astype(real), h.scale.astype(real)
    dq = a.q[:, :, queries].astype(real) if "q" in moving else np.zeros_like(q)
    d_scale = a.scale.astype(real) if "scale" in moving else real.type(0)
    scaled, d_scaled = scale * q, scale * dq + d_scale * q
    delta = (grad_out * r.out).sum(axis=-1) - grad_lse
    d_delta = (grad_out * r.d_out).sum(axis=-1)
    dgq = np.zeros_like(q)
    for keys in key_blocks(p, h, queries):
        k, v = keys_of(p, h, keys), values_of(p, h, keys)
        dk = keys_of(p, a, keys) if "k" in moving else None
        products = capped_products(p, h, scaled, keys, queries)
        s, seen = scores(p, h, products, queries, keys)
        seen_by = None if seen is None else np.broadcast_to(seen, s.shape).swapaxes(-1, -2)
        keep = kept(p, h, queries, keys)
        w = where_visible(seen, np.exp(s - r.shift[..., None]) / r.total[..., None])
        d_products = d_scaled @ k.swapaxes(-1, -2)
        if dk is not None:
            d_products += scaled @ dk.swapaxes(-1, -2)
        ds = score_tangents(p, a, products, d_products, queries, keys)
        dw = where_visible(seen, w * (ds - r.d_lse[..., None]))
        gw = dropped(p, grad_out @ v.swapaxes(-1, -2), keep) - delta[..., None]
        gs, dgs = w * gw, dw * gw - w * d_delta[..., None]
        if "v" in moving:
            dgs += w * dropped(p, grad_out @ values_of(p, a, keys).swapaxes(-1, -2), keep)
        gs, dgs = where_visible(seen, gs), where_visible(seen, dgs)
        if "bias" in found:
            add(found["bias"], (*h.where, queries, keys), dgs)
        if "relative_bias" in found:
            add_along_diagonals(found["relative_bias"][h.where[-1]], h, queries, keys, dgs)
        if "alibi" in found:
            far = distances(h, queries, keys)
            found["alibi"][h.where[-1]] -= (dgs * far).sum(axis=(-1, -2), dtype=np.float64).ravel()
        if p.softcap is not None:
            ratio = products / real.type(p.softcap)
            slope = 1 - ratio**2
            dgs = dgs * slope - gs * (2 / real.type(p.softcap)) * ratio * slope * d_products
            gs, dgs = where_visible(seen, gs * slope), where_visible(seen, dgs)
        if "scale" in found:
            unscaled = q @ k.swapaxes(-1, -2)
            d_unscaled = dq @ k.swapaxes(-1, -2)
            if dk is not None:
                d_unscaled += q @ dk.swapaxes(-1, -2)
            change = where_visible(seen, dgs * unscaled + gs * d_unscaled)
            found["scale"][h.where[-1]] += change.sum(axis=(-1, -2), dtype=np.float64).ravel()
        dgq += scale * product(dgs, seen, k) + d_scale * product(gs, seen, k)
        if dk is not None:
            dgq += scale * product(gs, seen, dk)
        dgs, gs, dw = (x.swapaxes(-1, -2) for x in (dgs, gs, dropped(p, dw, keep)))
        dgk = product(dgs, seen_by, scaled) + product(gs, seen_by, d_scaled)
        dgv = product(dw, seen_by, grad_out)
        for name, x in (("k", dgk), ("v", dgv)):
            add(found[name], (*h.kv_where, keys, slice(None)), x.sum(axis=1, keepdims=True))
    add(found["q"], (*h.where, queries, slice(None)), dgq)
    if "sinks" in found:
        sink = sink_weights(h.sinks, np.exp(h.sinks - r.shift) / r.total)
        d_sink = sink * ((0 if a.sinks is None else a.sinks) - r.d_lse)
        change = d_sink * delta + sink * d_delta
        found["sinks"][h.where[-1]] -= where_visible(sink != 0, change).sum(axis=-1).ravel()
