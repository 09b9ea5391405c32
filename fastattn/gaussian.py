"""Attention by squared distance: the Gaussian kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from .attention import solve
from .chunks import Chunk, Gradients, blocks, entries, fill, runs, singles
from .core.arguments import flag, plain, positive
from .core.backward import Backward
from .core.option_table import refuse
from .core.problem import Problem, make_problem
from .core.signatures import attention
from .core.visible_keys import keys_visible_to_any
from .gaussian_methods import (
    Attended,
    Call,
    difference_gradients,
    differences,
    extents,
    lifted,
    product,
    product_gradients,
    run_forward_mode,
)
from .jvp import has_tangents, pushed_forward, without_weights
from .vjp import differentiated, differentiates, without_out

__all__ = ["gaussian"]

# How large the product's terms may be beside the scores that count.
LIMIT = 4
# Up to so many dimensions, or queries of a key head, differences take no longer.
FEW_DIMS = 16
FEW_QUERIES = 16


@attention
def gaussian(
    q, k, v, *, alpha=1.0, normalize=True, exclude_self=False,
    return_lse=False, return_weights=False, out=None, **options,
):  # fmt: skip
    """Exact attention by distance: the score is ``-alpha * |q_i - k_j|**2``.

    Parameters
    ----------
    q, k, v : array_like, (..., Hq, Sq, D), (..., Hkv, Sk, D) and (..., Hkv, Sk, Dv)
        As of `fastattn.scaled_dot`; in the host's memory.
    alpha : float, default 1.0
        Finite and > 0.
    normalize : bool, default True
        Divide by the sum of the weights, as softmax does: the Nadaraya-Watson kernel smoother. If
        False the weights are ``exp(score)`` as they are, and so is their sum of the values.
    exclude_self : bool, default False
        Hide the key ``j == i + q_offset``, which with as many queries as keys is the query itself.
        With `kv_lengths` it requires `q_offset`.
    return_lse, return_weights, out, **options
        As of `fastattn.scaled_dot`, except ``scale``, ``softcap`` and ``block_table``, and
        ``sinks`` only where `normalize` is True. `bias`, `relative_bias` and `alibi` change the
        score after the distance.

    Returns
    -------
    out : ndarray, (..., Hq, Sq, Dv)
        As of `fastattn.scaled_dot`.
    lse : ndarray, (..., Hq, Sq), if `return_lse`
        Logarithm of the sum of ``exp(score)``, with `normalize` or without.
    weights : ndarray, (..., Hq, Sq, Sk), if `return_weights`
        0 where a key is hidden.

    Raises
    ------
    TypeError, ValueError
        As of `fastattn.scaled_dot`, where an option has no meaning here, and where ``cuda`` is
        named, which multiplies only, and that is not exact enough.

    Notes
    -----
    Differences are squared and summed as they stand, so that neither a place far from the origin
    nor a spread that is large beside ``alpha**-0.5`` costs digits. A product is faster, and taken
    for a batch entry and key head, and some thousands of its queries at a time, if it is as exact:
    ``alpha * |q - c|**2 <= 4 * max(1, -lse)``, with the mean `c` of the keys that are seen, must
    hold for every query: a key that is farther from `c` is far from the query, too, and plain
    rounding of its score is as large. Where the left side is more than 4, there must also be more
    than 16 dimensions and queries. The product is
    ``-alpha |q - k|**2 = 2 alpha (q.k - |k|**2 / 2) - alpha |q|**2`` about `c`: a dot product of
    vectors with one more number, and a factor of each query.

    Half precision is computed in float32. An `alpha` and scores beyond the range of the sums act as
    its end. The smoother is Nadaraya (1964), "On Estimating Regression", and Watson (1964), "Smooth
    Regression Analysis", equation 2.

    Examples
    --------
    >>> import fastattn
    >>> data = [[1, 2], [3, 4], [5, 6]]
    >>> fastattn.gaussian(data, data, data, alpha=0.5, normalize=False).round(3)
    array([[1.055, 2.073],
           [3.11 , 4.147],
           [5.055, 6.073]])
    >>> fastattn.gaussian(data, data, data, alpha=0.5, exclude_self=True).round(3)
    array([[3., 4.],
           [3., 4.],
           [3., 4.]])
    """
    call = _pose(q, k, v, alpha, normalize, exclude_self, options, out=out,
                 return_lse=return_lse, return_weights=return_weights)  # fmt: skip
    return solve(call.problem, call.backend, out, partial(_run, call))


def _pose(q, k, v, alpha, normalize, exclude_self, options, **more) -> Call:
    refuse("gaussian", options)
    alpha = positive("alpha", alpha)
    normalize, exclude_self = flag("normalize", normalize), flag("exclude_self", exclude_self)
    q, k, v = (plain(name, x) for name, x in zip("qkv", (q, k, v), strict=True))
    backend = options.pop("backend", None)
    p = make_problem(q, k, v, **options, **more)
    if p.sinks is not None and not normalize:
        raise ValueError(
            "sinks: expected None with normalize=False, got an array; they only add to the divisor"
        )
    if exclude_self and p.key_range.lengths is not None and options.get("q_offset") is None:
        raise ValueError(
            "q_offset: expected a value with kv_lengths and exclude_self, got None; pass 0 for a "
            "padded batch of whole sequences, kv_lengths - n_queries for a cache"
        )
    # Sinks come last: the product knows a score but for a term of the query.
    spans = _without_self(p) if exclude_self else (p.key_range.spans,)
    sets = tuple(replace(p, key_range=p.key_range._replace(spans=x), sinks=None) for x in spans)
    alpha = min(alpha, float(np.finfo(p.accumulator).max))
    nowhere = np.empty(0)
    return Call(p, sets, alpha, normalize, backend, nowhere, nowhere)


def _without_self(p: Problem):
    """The spans before and after each query's own place on the key axis."""
    spans = p.key_range.spans
    start, stop = (0, p.n_keys) if spans is None else spans
    offset = p.q_offset
    if isinstance(offset, np.ndarray):
        offset = offset[..., None, :]
    place = np.arange(p.n_queries) + offset
    sides = (start, np.minimum(stop, place)), (np.maximum(start, place + 1), stop)
    return [tuple(np.broadcast_to(x, p.rows()) for x in side) for side in sides]


def _run(call: Call, p: Problem, result, kept: _Kept | None = None):
    """Fill `result` and return what a backend's `run` does; keep what gradients need."""

    def results():
        for chunk, by_product, found in _attended(call):
            if kept is not None:
                kept.add(chunk, by_product, found)
            total, share = _shares(call, chunk, found.lse)
            out, weights = _scaled(found.out, share), _scaled(found.weights, share)
            yield chunk, (out, total, found.row_max, weights)

    with np.errstate(all="ignore"):
        seen = functools.reduce(np.logical_or, map(keys_visible_to_any, call.sets))
        centre, reach = extents(p, seen)
        call = call._replace(centre=centre, reach=reach)
        if kept is not None:
            kept.call = call
        return fill(p, result, results())


def _attended(call: Call) -> Iterator[tuple[Chunk, bool, Attended]]:
    """``(chunk, by_product, found)`` of each block."""
    p = call.problem
    for entry in entries(p):
        for chunk in blocks(p, entry):
            yield from _attend(call, chunk)


def _attend(call: Call, chunk: Chunk) -> Iterator[tuple[Chunk, bool, Attended]]:
    """Attend by the product where the rule allows it, by differences elsewhere."""
    p = call.problem
    queries = lifted(call, chunk)
    sizes = _sizes(call, chunk, queries.squares)
    tried = _tried(call, chunk, sizes)
    if tried.all():
        found = product(call, chunk, queries)
        tried = _exact(p, sizes, found.lse)
        if tried.all():
            yield chunk, True, found
            return
    if not tried.any():
        yield chunk, False, differences(call, chunk)
        return
    for single in singles(p, chunk):
        yield from _attend(call, single)


def _tried(call: Call, chunk: Chunk, sizes) -> np.ndarray:
    """For which batch entries and key heads may the product do? (batch, kv_heads)."""
    p, (first, last) = call.problem, (chunk.queries.start, chunk.queries.stop)
    small = _exact(p, sizes, np.zeros(1))
    if call.backend == "cuda":  # which knows no differences, and says so where they are needed
        return np.ones_like(small)
    if small.all() or p.head_dim <= FEW_DIMS or p.group * (last - first) <= FEW_QUERIES:
        return small
    some = slice((first + last) // 2, min((first + last) // 2 + FEW_QUERIES, last))
    sample = differences(call, chunk._replace(queries=some), value_dim=1)
    return small | _exact(p, sizes[..., some.start - first : some.stop - first], sample.lse)


def _sizes(call: Call, chunk: Chunk, squares) -> np.ndarray:
    """The largest terms of the product for each query, 0 of one that is not finite."""
    p = call.problem
    sizes = call.alpha * squares
    if not np.isfinite(sizes).all():
        sizes = np.where(np.isfinite(chunk.of(p.q, "hq.")).all(axis=-1), sizes, 0)
    # Where the product might leave the range for some key, it is never exact.
    most = np.finfo(p.accumulator).max / (64 * p.head_dim * max(call.alpha, 1))
    reach = np.repeat(chunk.of(call.reach, "g"), p.group, axis=-1)[..., None]
    return np.where(reach**2 <= most, sizes, np.inf)


def _exact(p: Problem, sizes, lse) -> np.ndarray:
    """Where does the rule hold for all queries of a key head? (batch, kv_heads)."""
    # A row that sees nothing, or a NaN, is exact in any way; one that may overflow in none.
    exact = ~(sizes > LIMIT * np.maximum(1, -lse)) & ~(sizes > np.finfo(sizes.dtype).max / 16)
    of_key_head = exact.shape[-2] * exact.shape[-1] // max(1, p.kv_heads)
    return exact.reshape(*exact.shape[:-2], p.kv_heads, of_key_head).all(axis=-1)


def _shares(call: Call, chunk: Chunk, lse):
    """``(total, share)``: the lse with sinks, and by what the softmax is to be multiplied, None for
    1.
    """
    p = call.problem
    if not call.normalize:
        return lse, np.exp(lse)
    if p.sinks is None:
        return lse, None
    total = np.logaddexp(lse, p.sinks[chunk.heads].astype(lse.dtype)[:, None])
    return total, np.where(lse == -np.inf, 0, np.exp(lse - total))


def _scaled(x, share):
    return x if x is None or share is None else x * share[..., None].astype(x.dtype, copy=False)


class _Kept:
    """What the gradients need of the forward pass: the softmax without sinks, whose `out` is None
    where it is the result.
    """

    def __init__(self, p: Problem, normalize: bool):
        self.call: Call
        self.chunks: list[tuple[Chunk, bool]] = []
        same = normalize and p.sinks is None and p.dtype == p.accumulator
        self.out = None if same else np.empty(p.rows(p.value_dim), p.accumulator)
        self.lse = np.empty(p.rows(), p.accumulator)
        self.inner_lse = np.empty(p.rows(), p.accumulator)

    def add(self, chunk: Chunk, by_product: bool, found: Attended) -> None:
        self.chunks.append((chunk, by_product))
        if self.out is not None:
            chunk.of(self.out, "hq.")[...] = found.out
        chunk.of(self.lse, "hq")[...] = found.lse
        chunk.of(self.inner_lse, "hq")[...] = found.inner_lse


@differentiates(gaussian)
def _gaussian(
    q, k, v, *, wrt, alpha=1.0, normalize=True, exclude_self=False, return_lse=False, **options
):
    without_out(options)
    call = _pose(q, k, v, alpha, normalize, exclude_self, options,
                 return_lse=True, gradients=True, wrt=wrt)  # fmt: skip
    p = call.problem
    kept = _Kept(p, call.normalize)
    return differentiated(
        p, call.backend, return_lse, partial(_run, call, kept=kept), partial(_gradients, kept)
    )


def _gradients(kept: _Kept, b: Backward) -> dict[str, np.ndarray]:
    """``out = softmax * share``, so both it and its lse have gradients."""
    p, sums = b.problem, Gradients(b.problem)
    with np.errstate(all="ignore"):
        for chunk, by_product in kept.chunks:
            inner, of_sinks = _inner(kept, b, chunk)
            if "sinks" in sums.found:
                sums.add(chunk, {"sinks": of_sinks})
            queries = lifted(kept.call, chunk) if by_product else None
            for run in runs(p, chunk):
                if queries is not None:
                    found = product_gradients(kept.call, inner, run, queries)
                else:
                    found = difference_gradients(kept.call, inner, run)
                for gradients in found:
                    sums.add(run, gradients)
    return sums.found


def _inner(kept: _Kept, b: Backward, chunk: Chunk):
    """The backward problem of a chunk's softmax, and the gradient of sinks."""
    call, p = kept.call, b.problem
    y = chunk.of(b.out if kept.out is None else kept.out, "hq.")
    lse = chunk.of(kept.lse, "hq")
    _, share = _shares(call, chunk, lse)
    share = np.ones_like(lse) if share is None else share
    from_lse = np.zeros_like(lse) if b.grad_lse is None else chunk.of(b.grad_lse, "hq")
    grad_y = chunk.of(b.grad_out, "hq.").astype(p.accumulator, copy=False)
    along = (grad_y * y).sum(axis=-1) * share
    grad = along * (1 - share) + from_lse * share if call.normalize else along + from_lse
    grad = np.where(lse == -np.inf, 0, grad)
    of_sinks = ((1 - share) * (from_lse - along)).sum(axis=(*range(len(p.batch)), -1))
    inner = b._replace(
        out=y, lse=chunk.of(kept.inner_lse, "hq"), grad_out=grad_y * share[..., None], grad_lse=grad
    )
    return inner, of_sinks


@has_tangents(gaussian)
def _gaussian_tangents(
    arrays, tangents, *,
    alpha=1.0, normalize=True, exclude_self=False, return_lse=False, **options,
):  # fmt: skip
    without_out(options)
    without_weights(options)
    call = _pose(*arrays, alpha, normalize, exclude_self, options, return_lse=True)
    return pushed_forward(
        call.problem, tangents, call.backend, flag("return_lse", return_lse),
        partial(_run, call), partial(run_forward_mode, call),
    )  # fmt: skip
