"""The scores of a block of keys: the product, the options, and what is hidden."""

from __future__ import annotations

from math import inf

import numpy as np

from .extremes import far_scores, find_nans
from .key_rows import key_rows
from .memory import ahead, flags, ints, load, load_flags, reals, store
from .score_functions import score_keys
from .score_options import add_bias, call_score_mod, cap, hides_all, load_bias, subtract_alibi
from .tile import (
    ANY_VISIBLE,
    BLOCK_D,
    BLOCK_D_ONE_VECTOR,
    FAR_SCORES,
    FIRST,
    FULL,
    LAST,
    MICROPANEL_FIELDS,
    PARTIAL,
    ROW_VISIBLE,
    SUB_BLOCKS,
    SUB_FIELDS,
    SUB_FIRST,
    SUB_LAST,
    SUB_VECS,
    SUB_VISIBILITY,
    VECS,
    in_block,
    inlined,
    matmul,
    sub_block_of,
    subs_of,
    visible_in_block,
)
from .vectors import (
    TILE_VECS,
    any_lane,
    choose,
    compiled,
    constant,
    lanes,
    larger,
    multiply_add,
    splat,
)
from .visibility import split_by_visibility


@inlined
def score_block(t, begin, scale, score_function, bias, score_mod, mask_mod):
    """The scores of the block of keys that begins at `begin`, -inf where hidden."""
    size = TILE_VECS * lanes(scale)
    for i in range(t.micropanels * size):
        reals(t.top, scale)[i] = -inf
    for p in range(t.micropanels):
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        micropanel[ANY_VISIBLE] = 0
    for sub_block in range(SUB_BLOCKS):
        first, last = sub_block_of(begin, sub_block, t.first, t.last)
        k, k_row, k_dim = key_rows(t, first, last, scale)
        for p in range(t.micropanels):
            micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
            key, stop = sub_block_of(begin, sub_block, micropanel[FIRST], micropanel[LAST])
            split_by_visibility(t, p, sub_block, key, stop - key, begin, scale, mask_mod)
            for n in range(micropanel[VECS]):
                sub = ahead(subs_of(t, p, sub_block), n * SUB_FIELDS)
                if sub[SUB_VECS] > 0:
                    at = k + (sub[SUB_FIRST] - first) * k_row
                    score(
                        t,
                        p,
                        n,
                        sub,
                        begin,
                        at,
                        k_row,
                        k_dim,
                        scale,
                        score_function,
                        bias,
                        score_mod,
                    )
                    micropanel[ANY_VISIBLE] |= sub[SUB_VECS]


@compiled
def score(t, p, n, sub, begin, k, k_row, k_dim, scale, score_function, bias, score_mod):
    """The scores of the sub of micropanel `p` that begins at vector `n`.

    A bias or a function may hide some of its keys, or all, which leaves it no vectors.
    """
    size, lane = TILE_VECS * lanes(scale), n * lanes(scale)
    vecs, visibility, row = sub[SUB_VECS], sub[SUB_VISIBILITY], p * size + lane
    key, keys = sub[SUB_FIRST], sub[SUB_LAST] - sub[SUB_FIRST]
    scores = ahead(in_block(t.scores, scale, p, key - begin), lane)
    visible = ahead(visible_in_block(t, scale, p, key - begin), lane)
    biases = reals(t.bias_tile, scale)
    if bias is not None:
        load_bias(t, bias, row, key, vecs, keys, biases, scale)
        if hides_all(biases, vecs, keys, scale):
            sub[SUB_VECS] = 0
            return
    queries = ahead(reals(t.queries, scale), p * size * t.head_dim + lane)
    if score_function is not None:
        score_keys(t, score_function, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    else:
        block = block_d(vecs, t.head_dim)
        matmul(vecs, k, k_row, k_dim, keys, t.head_dim, block, queries, scores, np.int64(0))
        if t.retry == FAR_SCORES:
            far_scores(t, row, vecs, k, k_row, k_dim, keys, queries, scores, scale)
    if bias is not None:
        visibility = exclude(biases, vecs, keys, visible, visibility, scale)
    special = ahead(reals(t.special, scale), row)
    if t.softcap > 0 or score_mod is not None:  # which may make a number of what is not finite
        find_special(vecs, keys, visible, visibility, scores, special, scale)
    if t.softcap > 0:
        cap(t.softcap, vecs, keys, scores, scale)
    if bias is not None:
        add_bias(biases, vecs, keys, scores, scale)
    if t.alibi != 0:
        subtract_alibi(t, row, key, vecs, keys, scores, scale)
    if score_mod is not None:
        call_score_mod(t, row, key, vecs, keys, scores, scale, score_mod)
        visibility = exclude(scores, vecs, keys, visible, visibility, scale)
    row_state, tops = ahead(flags(t.row_state), row), ahead(reals(t.top, scale), row)
    if visibility == PARTIAL:
        for j in range(keys):
            for i in range(vecs * lanes(scale)):
                row_state[i] |= visible[j * size + i]
        hide(vecs, keys, visible, scores, special, scale)
        take_max(vecs, keys, scores, tops, None, scale)
    else:
        for i in range(vecs * lanes(scale)):
            row_state[i] |= ROW_VISIBLE
        take_max(vecs, keys, scores, tops, special, scale)
    if t.retry != 0:
        find_nans(vecs, keys, scores, row_state, scale)
    sub[SUB_VISIBILITY] = visibility


@compiled
def block_d(vecs, head_dim):
    """Head dims of a sum that begins at zero; runs of sqrt(head_dim) have the least error."""
    block = BLOCK_D_ONE_VECTOR if vecs == 1 else BLOCK_D
    while block * block < head_dim:
        block *= 2
    return block


@compiled
def exclude(values, vecs, keys, visible, visibility, scale):
    """Hide the keys whose value is -inf. Returns the visibility of the sub."""
    size = TILE_VECS * lanes(scale)
    lowest = splat(constant(-inf, scale))
    found = lowest < lowest
    for j in range(keys):
        for n in range(vecs):
            found = found | (load(ahead(values, j * size + n * lanes(scale))) == lowest)
    if not any_lane(found):
        return visibility
    for j in range(keys):
        for x in range(j * size, j * size + vecs * lanes(scale)):
            visible[x] = (visibility == FULL or visible[x] != 0) & (values[x] != -inf)
    return PARTIAL


@compiled
def find_special(vecs, keys, visible, visibility, scores, special, scale):
    """Make `special` NaN where a row sees a score that is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(special, n))
        for j in range(keys):
            s = load(ahead(scores, j * size + n))
            if visibility == PARTIAL:
                s = choose(load_flags(ahead(visible, j * size + n), s), s, zero)
            some = multiply_add(s, zero, some)
        store(ahead(special, n), some)


@compiled
def hide(vecs, keys, visible, scores, special, scale):
    """Make hidden scores -inf, and `special` NaN where a row sees one that is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    nothing = splat(constant(-inf, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        some = load(ahead(special, n))
        for j in range(keys):
            at = ahead(scores, j * size + n)
            s = load(at)
            shown = load_flags(ahead(visible, j * size + n), s)
            some = multiply_add(choose(shown, s, zero), zero, some)
            store(at, choose(shown, s, nothing))
        store(ahead(special, n), some)


@compiled
def take_max(vecs, keys, scores, tops, special, scale):
    """The maximum, and, unless `special` is None, NaN there where a score is not finite."""
    size, zero = TILE_VECS * lanes(scale), splat(constant(0.0, scale))
    for n in range(0, vecs * lanes(scale), lanes(scale)):
        top, some = load(ahead(tops, n)), zero
        column = ahead(scores, n)
        # In pairs of pairs, or the latency of one chain would be the time of the loop.
        for j in range(0, keys, 4):
            a, b = load(ahead(column, j * size)), load(ahead(column, min(j + 1, keys - 1) * size))
            c = load(ahead(column, min(j + 2, keys - 1) * size))
            d = load(ahead(column, min(j + 3, keys - 1) * size))
            top = larger(larger(larger(a, b), larger(c, d)), top)
            if special is not None:
                some = some + ((a * zero + b * zero) + (c * zero + d * zero))
        store(ahead(tops, n), top)
        if special is not None:
            store(ahead(special, n), load(ahead(special, n)) + some)
