"""What results are measured against, and how near they must come.

`fastattn.reference` is the oracle; `brute_force` is a second reading of the contract, in plain
Python, that the reference itself is held to.
"""

from __future__ import annotations

import importlib
import math

import numpy as np

from fastattn import reference
from fastattn.core.problem import Problem, make_problem
from helpers.remembered import remembered


def brute_force(
    q, k, v, *, scale=None, softcap=None, bias=None, relative_bias=None, alibi=None, sinks=None,
    causal=False, window=None, q_offset=None, kv_lengths=None, spans=None, mask=None,
    dropout=None,
):  # fmt: skip
    """``(out, lse, weights)`` key by key, straight from the contract; finite inputs only."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q, k, v = (x[None] if x.ndim == 2 else x for x in (q, k, v))
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    kv_heads = max(k.shape[-3], v.shape[-3])
    heads = kv_heads if q.shape[-3] == 1 else q.shape[-3]
    n_queries, head_dim = q.shape[-2:]
    n_keys, value_dim = v.shape[-2:]
    rows = (*batch, heads, n_queries)

    def at(x, shape, index):
        return np.broadcast_to(x, shape)[index]

    left, right = window if isinstance(window, tuple) else (window, window)
    scale = np.broadcast_to(1 / math.sqrt(head_dim) if scale is None else scale, heads)
    reach = 0 if relative_bias is None else np.shape(relative_bias)[1] // 2
    out, lse, weights = np.zeros((*rows, value_dim)), np.zeros(rows), np.zeros((*rows, n_keys))
    for *b, h, i in np.ndindex(rows):
        b, kv_index = tuple(b), (*b, h // (heads // kv_heads))
        offset = n_keys - n_queries if q_offset is None else int(at(q_offset, batch, b))
        row, s = (*b, h, i), {}
        for j in range(n_keys):
            index, place = (*row, j), i + offset
            if mask is not None and not at(mask, (*rows, n_keys), index):
                continue
            if causal and not j <= place:
                continue
            if left is not None and not place - left <= j:
                continue
            if right is not None and not j <= place + right:
                continue
            if kv_lengths is not None and not j < at(kv_lengths, batch, b):
                continue
            if spans is not None and not at(spans[0], rows, row) <= j < at(spans[1], rows, row):
                continue
            if bias is not None and at(bias, (*rows, n_keys), index) == -np.inf:
                continue
            distance = min(max(j - place, -reach), reach) + reach
            if relative_bias is not None and relative_bias[h][distance] == -np.inf:
                continue
            q_i = at(q, (*batch, heads, n_queries, head_dim), row)
            k_j = at(k, (*batch, kv_heads, n_keys, head_dim), (*kv_index, j))
            s[j] = scale[h] * math.fsum(float(x) * float(y) for x, y in zip(q_i, k_j, strict=True))
            if softcap is not None:
                s[j] = softcap * math.tanh(s[j] / softcap)
            if bias is not None:
                s[j] += float(at(bias, (*rows, n_keys), index))
            if relative_bias is not None:
                s[j] += float(relative_bias[h][distance])
            if alibi is not None:
                s[j] -= alibi[h] * abs(place - j)
        terms = [*s.values()] + ([] if sinks is None else [float(sinks[h])])
        if not terms:
            lse[row] = -np.inf
            continue
        top = max(terms)
        lse[row] = top + math.log(math.fsum(math.exp(t - top) for t in terms))
        for j in s:
            weights[*row, j] = math.exp(s[j] - lse[row])
            v_j = at(v, (*batch, kv_heads, n_keys, value_dim), (*kv_index, j))
            rate, seed = (0, 0) if dropout is None else dropout
            entry = int(np.ravel_multi_index(b, batch)) if b else 0
            if not is_dropped(rate, seed, entry, h, i, j):
                out[row] += weights[*row, j] / (1 - rate) * v_j
    return out, lse, weights


def is_dropped(rate: float, seed: int, b: int, h: int, i: int, j: int) -> bool:
    """Does dropout take that weight? In Python's integers, as `scaled_dot` documents it."""

    def words(x):
        return x & 0xFFFFFFFF, x >> 32

    key = philox((*words(b), *words(h)), words(seed))[:2]
    word = philox((*words(j // 8), *words(i)), key)[j % 8 // 2]
    number = word if j % 2 == 0 else (word << 16 | word >> 16) & 0xFFFFFFFF
    return number < round(rate * 2**32)


def philox(counter, key, rounds=7):
    """Philox4x32 as in Salmon et al. (2011), section 3.3."""
    (l0, r0, l1, r1), (k0, k1) = counter, key
    for n in range(rounds):
        m0, m1 = 0xD2511F53 * l0, 0xCD9E8D57 * l1
        bump0, bump1 = (k0 + n * 0x9E3779B9) % 2**32, (k1 + n * 0xBB67AE85) % 2**32
        l0, r0 = m1 >> 32 ^ r0 ^ bump0, m1 % 2**32
        l1, r1 = m0 >> 32 ^ r1 ^ bump1, m0 % 2**32
    return l0, r0, l1, r1


definition = remembered(reference.attend)


def judging_dtype(p: Problem):
    """In which the definition is more exact than any result of `p`."""
    return np.longdouble if p.accumulator == np.float64 else np.float64


@remembered
def plain_numpy(p: Problem, dtype):
    """``(out, lse, weights, row_max)`` as a NumPy user would write it, every step in `dtype`.

    Non-finite inputs count as 0: an error is taken only where the exact result is finite.
    """
    real = np.dtype(dtype)
    largest = finfo(real).max

    def cast(x):
        x = np.asarray(x, np.float64 if x.dtype.itemsize < 8 else None)
        return np.clip(np.where(np.isfinite(x), x, 0), -largest, largest).astype(real)

    with np.errstate(all="ignore"):
        seen = reference.visible(p)
        q = np.broadcast_to(cast(p.q), p.rows(p.head_dim))
        k, v = (reference.per_query_head(cast(x), p) for x in (p.k, p.v))
        scale = np.asarray(p.scale).astype(real)[..., None, None]
        s = plain_measure(p, q, k).astype(real) * scale
        if p.softcap is not None:
            s = real.type(p.softcap) * np.tanh(s / real.type(p.softcap))
        if p.bias is not None:
            s = s + cast(p.bias)
        if p.relative_bias is not None:
            s = s + cast(p.relative_bias)[reference.distance_index(p)]
        if p.alibi is not None:
            i, j = reference.positions(p)
            s = s - p.alibi.astype(real)[:, None, None] * np.abs(i - j).astype(real)
        s = np.where(seen, s, np.asarray(-np.inf, real))
        top = row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
        if p.sinks is not None:
            sinks = p.sinks.astype(real)[:, None, None]
            top = np.maximum(top, sinks)
        shift = np.where(np.isfinite(top), top, np.zeros((), real))
        weights = np.exp(s - shift)
        total = weights.sum(axis=-1, keepdims=True)
        if p.sinks is not None:
            total = total + np.exp(sinks - shift)
        weights = weights / np.where(total == 0, np.ones((), real), total)
        out = (reference.dropped(weights, p).astype(real) @ v).astype(real)
        return out, (shift + np.log(total))[..., 0], weights, row_max[..., 0]


def plain_measure(p: Problem, q, k):
    """How queries and keys compare, in the dtype of `q`, with an axis for the dimensions."""
    if p.score_function.name == "dot":
        return q @ k.swapaxes(-1, -2)
    q, k = q[..., :, None, :], k[..., None, :, :]
    if p.score_function.name == "distance":
        return np.sqrt(((q - k) ** 2).sum(axis=-1))
    if p.score_function.name == "squared distance":
        return ((q - k) ** 2).sum(axis=-1)
    return (np.tanh(q + k) * p.score_function.weights.astype(q.dtype)).sum(axis=-1)


# ----------------------------------------------------------------------------------- judgement


def finfo(dtype):
    """`numpy.finfo`, for bfloat16 too."""
    if np.dtype(dtype).name == "bfloat16":
        return importlib.import_module("ml_dtypes").finfo(dtype)
    return np.finfo(dtype)


def ulp(value, dtype) -> float:
    """The distance from `value` to the next number of `dtype`, or from the last but one."""
    real = np.dtype(dtype).type
    last_but_one = np.nextafter(real(finfo(dtype).max), real(0))
    return float(np.spacing(np.minimum(real(abs(float(value))), last_but_one)))


def rms(error) -> float:
    return float(np.sqrt(np.mean(np.square(error)))) if error.size else 0.0


def assert_exact_enough(got, exact, plain, dtype, what="out"):
    """Promise 1 for one array: NaN and Inf where the definition has them, and elsewhere a root
    mean square error of at most twice that of plain NumPy plus 2 ulp of the largest result.
    """
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, {exact.shape} wanted"
    assert got.dtype == dtype, f"{what}: {got.dtype}, {dtype} wanted"
    real = exact.dtype.type
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(
        got.astype(real)[~finite], exact[~finite], err_msg=f"{what}: non-finite results"
    )
    if not finite.any():
        return
    error = got.astype(real)[finite] - exact[finite]
    plain_error = plain.astype(real)[finite] - exact[finite]
    plain_error = plain_error[np.isfinite(plain_error)]
    allowed = 2 * rms(plain_error) + 2 * ulp(np.abs(exact[finite]).max(), dtype)
    assert rms(error) <= allowed, (  # a NaN fails too
        f"{what}: rms error {rms(error):.3g}, at most {allowed:.3g} wanted; largest "
        f"{np.abs(error).max():.3g} of {error.size}"
    )


def assert_solves(results, p: Problem):
    """The results of `fastattn.scaled_dot`, in its order of return, solve `p` (promise 1)."""
    results = results if isinstance(results, tuple) else (results,)
    exact = definition(p, judging_dtype(p))
    plain, plain_sums = (plain_numpy(p, dtype) for dtype in (p.dtype, p.accumulator))
    wanted = [("out", exact[0], plain[0], p.dtype)]
    if p.return_lse:  # kept in the accumulator's dtype, so measured in that
        wanted.append(("lse", exact[1], plain_sums[1], p.accumulator))
    if p.return_max:
        largest = reference.row_max(p, exact[0].dtype.type)
        wanted.append(("row_max", largest, plain_sums[3], p.accumulator))
    if p.return_weights:
        wanted.append(("weights", exact[2], plain[2], p.dtype))
    assert len(results) == len(wanted)
    for got, (what, truth, yardstick, dtype) in zip(results, wanted, strict=True):
        if p.one_head:
            truth, yardstick = truth[0], yardstick[0]
        assert_exact_enough(got, truth, yardstick, dtype, what)


def check(target, q, k, v, *, return_lse=True, **opts):
    """Attend on `target`, hold the results to the contract and return them."""
    results = target.attend(q, k, v, return_lse=return_lse, **opts)
    for name in ("out", "threads"):
        opts.pop(name, None)
    assert_solves(results, make_problem(q, k, v, return_lse=return_lse, **opts))
    return results


def same_bits(a, b) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
