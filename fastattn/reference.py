"""The definition: softmax attention and its gradients written out as in a textbook, in float64, on
the full grid.

Every other backend is held to this one. It is never optimised; it makes several arrays of
queries x keys, so it is for short sequences and for reading.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .core.arguments import in_range
from .core.backward import Backward
from .core.bins import bin_starts, no_top_keys
from .core.dtypes import as_real
from .core.problem import Problem
from .core.sparse_mask import SparseMask

name = "reference"


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve `problem`: never."""
    return None


def run(problem: Problem, result):
    """Fill `result`; return ``(lse, row_max, weights)``, None for what was not asked for."""
    out, lse, weights = attend(problem)
    with np.errstate(all="ignore"):
        result[...] = out.astype(problem.dtype)
        return (
            lse.astype(problem.accumulator) if problem.return_lse else None,
            row_max(problem).astype(problem.accumulator) if problem.return_max else None,
            weights.astype(problem.dtype) if problem.return_weights else None,
        )


def unsupported_backward(problem: Problem) -> str | None:
    """Why this backend cannot compute the gradients of `problem`, or None."""
    if problem.score_mod is not None and problem.score_grad is None:
        return "score_mod has no score_grad"
    return None


def run_backward(backward: Backward) -> dict[str, np.ndarray]:
    """The gradients of `backward` by the names of their arguments."""
    return gradients(backward)


def describe(problem: Problem) -> dict[str, str]:
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
        is_visible = visible(problem)
        if problem.score_mod is not None:
            is_visible &= s != -np.inf
        weights, lse = softmax(s, is_visible, problem.sinks)
        v = per_query_head(values(problem, real), problem)
        # A mean of the largest numbers may be rounded up.
        out = drawn_in(
            weighted_sum(dropped(weights, problem), is_visible, v),
            np.isfinite(v).all(axis=-2)[..., None, :],
            problem.accumulator,
        )
    return out, lse, weights


def row_max(p: Problem, real=np.float64) -> np.ndarray:
    """The largest score of each query among the keys that it sees, (batch, heads, queries)."""
    with np.errstate(all="ignore"):
        s, is_visible = scores(p, real), visible(p)
        if p.score_mod is not None:
            is_visible &= s != -np.inf
        return np.where(is_visible, s, -np.inf).max(axis=-1, initial=-np.inf)


def run_map(problem: Problem, rows: int, columns: int) -> np.ndarray:
    """The weights summed over cells, float64 (batch, heads, rows, columns)."""
    p = problem
    _, _, weights = attend(p)
    if weights.size == 0:
        return np.zeros((*p.batch, p.heads, rows, columns))
    with np.errstate(all="ignore"):
        of_rows = np.add.reduceat(weights, bin_starts(p.n_queries, rows), axis=-2)
        return np.add.reduceat(of_rows, bin_starts(p.n_keys, columns), axis=-1)


def run_top(problem: Problem, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices and weights of each query's strongest keys, (batch, heads, queries, n).

    They are ranked by their scores, which tell more keys apart than weights do.
    """
    p = problem
    indices, strongest = no_top_keys(p, n)
    _, _, weights = attend(p)
    kept = slice(min(n, p.n_keys))
    with np.errstate(all="ignore"):
        s = np.where(visible(p), scores(p), -np.inf)
        order = np.argsort(-s, axis=-1, kind="stable")[..., kept]
        some = np.take_along_axis(s, order, axis=-1) > -np.inf
    # Beside an infinite score, which weighs Inf / Inf, others weigh 0; any other NaN is the row's.
    wrong = (np.isnan(weights) & (s != np.inf)).any(axis=-1)
    indices[..., kept] = np.where(some, order, -1)
    strongest[..., kept] = np.where(some, np.take_along_axis(weights, order, axis=-1), 0)
    indices[wrong], strongest[wrong] = -1, np.nan
    return indices, strongest


def gradients(b: Backward, real=np.float64) -> dict[str, np.ndarray]:
    """The gradient of each argument that is wanted, in the precision `real`.

    With ``w = exp(s - lse)`` and ``out = w @ v``, the gradient of the scores is
    ``w * (grad_out @ v.T - delta)``, where ``delta = (grad_out * out).sum(-1) - grad_lse`` (Dao et
    al. 2022, "FlashAttention", appendix B.2). Each gradient is that of the array broadcast to every
    query head or, for k and v, to every key head: the caller sums over axes that broadcast.
    """
    p = b.problem
    with np.errstate(all="ignore"):
        q = np.broadcast_to(p.q.astype(real), p.rows(p.head_dim))
        k, v = (per_query_head(x(p, real), p) for x in (keys, values))
        grad_out, lse = b.grad_out.astype(real), b.lse.astype(real)
        is_visible, capped = visible(p), capped_products(p, real)
        s = scores(p, real, capped)
        if p.score_mod is not None:
            is_visible &= s != -np.inf
        weights, sink_weights = recomputed(s, is_visible, lse, b)
        delta = (grad_out * b.out.astype(real)).sum(axis=-1)
        if b.grad_lse is not None:
            delta = delta - b.grad_lse.astype(real)

        grad_weights = dropped(grad_out @ v.swapaxes(-1, -2), p)
        grad_s = np.where(is_visible, weights * (grad_weights - delta[..., None]), 0)
        if p.score_mod is not None:
            plain = scores(replace(p, score_mod=None), real, capped)
            slopes = on_grid(p, p.score_grad, plain.astype(np.float64))
            grad_s = np.where(is_visible, grad_s * slopes, 0)
        slope = 1.0 if p.softcap is None else 1 - (capped / p.softcap) ** 2
        grad_scaled = np.where(is_visible, grad_s * slope, 0)
        grad_similarity = np.where(is_visible, scale_of(p, real) * grad_scaled, 0)

        visible_to, used = is_visible.swapaxes(-1, -2), dropped(weights, p)
        found = {
            **score_function_gradients(p, q, k, is_visible, grad_similarity),
            "v": per_key_head(weighted_sum(used.swapaxes(-1, -2), visible_to, grad_out), p),
            "bias": grad_s,
        }
        leading = tuple(range(len(p.batch)))
        of_heads = (*leading, -2, -1)
        if b.wants("scale"):
            terms = np.where(is_visible, grad_scaled * similarity(p, q, k), 0)
            found["scale"] = terms.sum(axis=of_heads)
        if p.relative_bias is not None and b.wants("relative_bias"):
            found["relative_bias"] = np.zeros(p.relative_bias.shape, np.longdouble)
            np.add.at(found["relative_bias"], distance_index(p), grad_s)
        if b.wants("alibi"):
            i, j = positions(p)
            found["alibi"] = -(grad_s * np.abs(i - j)).sum(axis=of_heads)
        if b.wants("sinks"):
            found["sinks"] = -(sink_weights * delta).sum(axis=-1).sum(axis=leading)
    return found


def scores(p: Problem, real=np.float64, products=None) -> np.ndarray:
    """``s[i, j]`` of every query and key: (batch, heads, queries, keys).

    What is kept after each step is within the range of sums, unless it was made of Inf or NaN.
    """
    s = capped_products(p, real) if products is None else products
    if p.bias is not None:
        bias = in_range(p.bias, p.accumulator).astype(real)
        s = drawn_in(s + bias, np.isfinite(s) & np.isfinite(bias), p.accumulator)
    if p.relative_bias is not None:
        bias = p.relative_bias.astype(real)[distance_index(p)]
        s = drawn_in(s + bias, np.isfinite(s) & np.isfinite(bias), p.accumulator)
    if p.alibi is not None:
        i, j = positions(p)
        slope = p.alibi.astype(real)[:, None, None]
        far = slope * np.abs(i - j)
        s = drawn_in(s - far, np.isfinite(s) & np.isfinite(slope), p.accumulator)
    if p.score_mod is not None:
        s = on_grid(p, p.score_mod, s.astype(np.float64)).astype(real)
        s = drawn_in(s, np.isfinite(s), p.accumulator)
    return s


def drawn_in(x, finite, dtype) -> np.ndarray:
    """`x` within the range of `dtype` wherever `finite`."""
    most = np.finfo(dtype).max
    return np.where(finite, np.clip(x, -most, most), x)


def capped_products(p: Problem, real=np.float64) -> np.ndarray:
    """The score before anything is added: the scaled score function, softly capped."""
    q = np.broadcast_to(p.q.astype(real), p.rows(p.head_dim))
    k = per_query_head(keys(p, real), p)
    products = similarity(p, q, k)
    scale = scale_of(p, real)
    s = scale * products
    finite = np.isfinite(q).all(axis=-1)[..., None] & np.isfinite(k).all(axis=-1)[..., None, :]
    lost = finite & ~np.isfinite(products)
    if lost.any():  # on the way to a score that may be in range
        s = np.where(lost, scaled_far_products(p, q, k, real), s)
    s = drawn_in(s, finite & np.isfinite(scale), p.accumulator)
    return s if p.softcap is None else p.softcap * np.tanh(s / p.softcap)


def scaled_far_products(p: Problem, q, k, real) -> np.ndarray:
    """The scaled score function of vectors whose sums leave the range of `real`."""
    scale = scale_of(p, real)
    unit = real(2.0) ** (np.finfo(real).maxexp // 2 + 32)
    if p.score_function.name == "dot":
        return scale * similarity(p, q / unit, k / unit) * unit * unit
    if p.score_function.name == "distance":
        return scale * similarity(p, q / unit, k / unit) * unit
    weights = p.score_function.weights.astype(real) / unit
    return scale * (np.tanh(q[..., :, None, :] + k[..., None, :, :]) @ weights) * unit


def scale_of(p: Problem, real) -> np.ndarray:
    """The scale of each score: (heads, 1, 1), or (1, 1) if it is one number."""
    return np.asarray(p.scale, real)[..., None, None]


def similarity(p: Problem, q, k) -> np.ndarray:
    """How each query compares with each key: ``q . k``, ``|q - k|``, its square or
    ``w . tanh(q + k)``.
    """
    if p.score_function.name == "dot":
        return q @ k.swapaxes(-1, -2)
    q, k = q[..., :, None, :], k[..., None, :, :]
    if p.score_function.name == "distance":
        return np.sqrt(((q - k) ** 2).sum(axis=-1))
    if p.score_function.name == "squared distance":
        squares, finite = ((q - k) ** 2).sum(axis=-1), np.isfinite(q) & np.isfinite(k)
        return np.where(finite.all(axis=-1), np.fmin(squares, np.finfo(q.dtype).max), squares)
    return np.tanh(q + k) @ p.score_function.weights.astype(q.dtype)


def score_function_gradients(p: Problem, q, k, is_visible, grad) -> dict[str, np.ndarray]:
    """The gradients of the arguments of `similarity` from that of its result."""
    if p.score_function.name == "dot":
        visible_to = is_visible.swapaxes(-1, -2)
        grad_q = weighted_sum(grad, is_visible, k)
        grad_k = weighted_sum(grad.swapaxes(-1, -2), visible_to, q)
        return {"q": grad_q, "k": per_key_head(grad_k, p)}
    q, k, is_visible = q[..., :, None, :], k[..., None, :, :], is_visible[..., None]
    if p.score_function.name.endswith("distance"):
        away = q - k
        terms = 2 * grad[..., None] * away
        if p.score_function.name == "distance":
            length = np.sqrt((away**2).sum(axis=-1, keepdims=True))
            terms = np.where(length != 0, terms / (2 * length), 0)
        terms = np.where(is_visible, terms, 0)
        return {"q": terms.sum(axis=-2), "k": per_key_head(-terms.sum(axis=-3), p)}
    tanh = np.where(is_visible, np.tanh(q + k), 0)
    terms = np.where(
        is_visible, grad[..., None] * p.score_function.weights.astype(q.dtype) * (1 - tanh**2), 0
    )
    return {
        "q": terms.sum(axis=-2),
        "k": per_key_head(terms.sum(axis=-3), p),
        "w": (grad[..., None] * tanh).sum(axis=tuple(range(grad.ndim))),
    }


def visible(p: Problem) -> np.ndarray:
    """``visible[i, j]``: may query `i` see key `j`? bool, (batch, heads, queries, keys)."""
    i, j = positions(p)
    r = p.key_range
    is_visible = np.ones((*p.rows(), p.n_keys), bool)
    if p.mask is not None:
        is_visible &= p.mask.dense() if isinstance(p.mask, SparseMask) else p.mask
    if r.left is not None:
        is_visible &= i - r.left <= j
    if r.right is not None:
        is_visible &= j <= i + r.right
    if r.lengths is not None:
        is_visible &= j < r.lengths[..., None, None, None]
    if r.spans is not None:
        start, stop = r.spans
        is_visible &= (start[..., None] <= j) & (j < stop[..., None])
    if p.bias is not None:
        is_visible &= p.bias != -np.inf
    if p.relative_bias is not None:
        is_visible &= p.relative_bias[distance_index(p)] != -np.inf
    if p.mask_mod is not None:
        is_visible &= on_grid(p, p.mask_mod).astype(bool)
    return is_visible


def softmax(s, is_visible, sinks=None):
    """``(weights, lse)`` over the visible keys and, where given, a sink per head, without a value.

    A shift of the scores by their maximum keeps the exponentials in range and cancels out.
    A score of Inf weighs Inf - Inf, which is NaN, and the others nothing beside it.
    """
    s = np.where(is_visible, s, -np.inf)
    top = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sinks = sinks.astype(s.dtype)[:, None, None]
        top = np.maximum(top, sinks)
    shift = np.where(top == -np.inf, 0, top)
    powers = np.exp(s - shift)
    total = powers.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - shift)
    total = np.where(shift == np.inf, 1, total)
    # Exact where the lse is too large to hold log(total).
    weights = np.where(is_visible, powers / total, 0)
    return weights, (shift + np.log(total))[..., 0]


def recomputed(s, is_visible, lse, b: Backward):
    """``(weights, sink_weights)`` of a row whose `lse` is known; it may be that of more keys.

    Where an lse is so large that its rounding shows in the weights, and is that of these keys, the
    softmax is computed again.
    """
    p = b.problem
    weights = np.where(is_visible, np.exp(s - lse[..., None]), 0)
    own_weights, own_lse = softmax(s, is_visible, p.sinks)
    far = np.isfinite(lse) & (np.abs(lse) > b.coarse()) & b.replaces(own_lse, lse)
    weights = np.where(far[..., None], own_weights, weights)
    if p.sinks is None:
        return weights, None
    sinks = np.broadcast_to(p.sinks.astype(s.dtype)[:, None], lse.shape)
    of_sinks = np.exp(sinks - np.where(far, own_lse, lse))
    return weights, np.where(np.isinf(sinks), sinks > 0, of_sinks)  # all of it, or nothing


def dropped(x, p: Problem) -> np.ndarray:
    """`x`, (batch, heads, queries, keys), after dropout."""
    if p.dropout is None:
        return x
    entries = np.arange(math.prod(p.batch)).reshape(*p.batch, 1, 1)
    heads, queries = np.arange(p.heads)[:, None], np.arange(p.n_queries)
    kept = p.dropout.kept(entries, heads, queries, slice(0, p.n_keys))
    return np.where(kept, x / (1 - p.dropout.rate), 0)


def weighted_sum(weights, is_visible, x):
    """``weights @ x``. A weight of 0 on a hidden row of x must not meet a NaN there: such rows are
    left out of the sum.
    """
    if np.isfinite(x).all():
        return weights @ x
    return np.where(is_visible[..., None], weights[..., None] * x[..., None, :, :], 0).sum(axis=-2)


def positions(p: Problem):
    """``i``, the place of each query on the key axis, and ``j``, that of each key."""
    offset = p.q_offset
    if isinstance(offset, np.ndarray):
        offset = offset[..., None, :, None]
    return np.arange(p.n_queries)[:, None] + offset, np.arange(p.n_keys)


def distance_index(p: Problem):
    """Where in the relative bias each query finds what is added to the score of each key."""
    assert p.relative_bias is not None
    i, j = positions(p)
    reach = p.relative_bias.shape[-1] // 2
    distance = np.clip(j - i, -reach, reach) + reach
    heads = np.arange(p.heads)[:, None, None]
    return heads, np.broadcast_to(distance, (*p.rows(), p.n_keys))


def on_grid(p: Problem, function, *first) -> np.ndarray:
    """``function(*first, batch, head, i, j)`` everywhere: (batch, heads, queries, keys)."""
    shape = (*p.rows(), p.n_keys)
    batch, *rest = np.indices((math.prod(p.batch), *shape[-3:]))
    function = getattr(function, "py_func", function)
    grid = np.frompyfunc(function, 4 + len(first), 1)
    values = grid(*(x.reshape(batch.shape) for x in first), batch, *rest)
    return values.astype(np.float64).reshape(shape)


def keys(p: Problem, real) -> np.ndarray:
    """As numbers of the precision `real`, (batch, kv_heads, keys, head_dim)."""
    return as_real(in_order(p.k, p), in_order(p.k_scales, p), real, p.head_dim)


def values(p: Problem, real) -> np.ndarray:
    return as_real(in_order(p.v, p), in_order(p.v_scales, p), real, p.value_dim)


def in_order(x, p: Problem):
    """The rows of a pool of pages in the order of the keys, (batch, kv_heads, keys, ...)."""
    if p.block_table is None or x is None:
        return x
    if len(x) == 0:  # without a page that an entry could be of
        return np.zeros((1, x.shape[1], p.n_keys, *x.shape[3:]), x.dtype)
    pages = x[p.block_table].swapaxes(1, 2)
    rows = pages.reshape(*pages.shape[:2], pages.shape[2] * pages.shape[3], *x.shape[3:])
    return rows[:, :, : p.n_keys]


def per_query_head(x, p: Problem) -> np.ndarray:
    """Keys or values with the head that each query head reads: ``h // group``."""
    x = np.broadcast_to(x, (*p.batch, p.kv_heads, *x.shape[-2:]))
    return x[..., np.arange(p.heads) // p.group, :, :]


def per_key_head(x, p: Problem) -> np.ndarray:
    """The sum over the query heads that read each head of the keys."""
    return x.reshape(*p.batch, p.kv_heads, p.group, *x.shape[-2:]).sum(axis=-3)
