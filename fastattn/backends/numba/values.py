"""The weighted sums of values: of a block of keys, of all blocks, and the results of rows."""

from __future__ import annotations

from math import inf, log, nan

import numpy as np

from .dropout import drop
from .exponential import WEIGHT_UNIT, weight_of
from .extremes import retry_for
from .key_rows import value_rows
from .memory import (
    ahead,
    columns_to_rows,
    flags,
    ints,
    load,
    load_flags,
    load_unaligned,
    reals,
    store,
)
from .numbers import REAL, finite_most, read, write
from .tile import (
    ANY_VISIBLE,
    ATTEND,
    DONE,
    FULL,
    HAS_OUTPUT,
    MICROPANEL_FIELDS,
    PARTIAL,
    RETRY,
    ROW_NAN,
    SUB_BLOCKS,
    SUB_FIELDS,
    SUB_FIRST,
    SUB_LAST,
    SUB_VECS,
    SUB_VISIBILITY,
    VECS,
    WEIGH,
    in_block,
    inlined,
    matmul,
    row_of,
    sub_block_of,
    subs_of,
    visible_in_block,
)
from .vectors import (
    TILE_VECS,
    VECTOR_BYTES,
    any_lane,
    choose,
    compiled,
    constant,
    lanes,
    larger,
    magnitude,
    multiply_add,
    splat,
    with_sign_of,
)


@inlined
def attend_block(t, begin, scale, dropout):
    """Weigh the scores of the block and add its values to the rows' totals."""
    for p in range(t.micropanels):
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        if micropanel[ANY_VISIBLE]:
            update_row_max(t, p, scale)
            clear(t, p, t.block_total if micropanel[HAS_OUTPUT] else t.total, scale)
    for sub_block in range(SUB_BLOCKS):
        first, last = sub_block_of(begin, sub_block, t.first, t.last)
        v, v_row, v_dim = value_rows(t, first, last, scale)
        for p in range(t.micropanels):
            micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
            total = t.block_total if micropanel[HAS_OUTPUT] else t.total
            for n in range(micropanel[VECS]):
                sub = ahead(subs_of(t, p, sub_block), n * SUB_FIELDS)
                if sub[SUB_VECS] > 0:
                    at = v + (sub[SUB_FIRST] - first) * v_row
                    attend(t, p, n, sub, begin, at, v_row, v_dim, reals(total, scale), scale,
                           dropout)  # fmt: skip
    for p in range(t.micropanels):
        micropanel = ints(t.micropanel + 8 * MICROPANEL_FIELDS * p)
        if micropanel[ANY_VISIBLE]:
            add_block(t, p, micropanel[VECS], micropanel[HAS_OUTPUT], scale)
            micropanel[HAS_OUTPUT] = 1


@compiled
def attend(t, p, n, sub, begin, v, v_row, v_dim, total, scale, dropout):
    """Weigh the scores of a sub and add its values to the total."""
    size, lane = TILE_VECS * lanes(scale), n * lanes(scale)
    vecs, key = sub[SUB_VECS], sub[SUB_FIRST]
    keys = sub[SUB_LAST] - key
    weights = ahead(in_block(t.scores, scale, p, key - begin), lane)
    visible = ahead(visible_in_block(t, scale, p, key - begin), lane)
    total = ahead(total, p * size * t.value_dim + lane)
    weigh(t, p * size + lane, vecs, keys, weights, scale)
    if dropout is not None:
        drop(t, p * size + lane, vecs, keys, key, weights, scale)
    if t.unit != 1:
        shrink(vecs, keys, weights, constant(t.unit, scale))
    if sub[SUB_VISIBILITY] == PARTIAL and not all_finite(t, v, v_row, v_dim, keys, scale):
        masked_matmul(t, vecs, v, v_row, v_dim, keys, visible, weights, total, scale)
    else:
        matmul(vecs, v, v_dim, v_row, t.value_dim, keys, keys, weights, total, np.int64(1))


@compiled
def clear(t, p, total, scale):
    """Zero the micropanel's sums of values: some of its vectors may see no key."""
    size = TILE_VECS * lanes(scale)
    column = ahead(reals(total, scale), p * size * t.value_dim)
    for x in range(size * t.value_dim):
        column[x] = constant(0.0, scale)


@compiled
def update_row_max(t, p, scale):
    """Update the maximum of the rows, and find the factor that rescales older weights."""
    size = TILE_VECS * lanes(scale)
    one, zero = splat(constant(1.0, scale)), splat(constant(0.0, scale))
    nothing = splat(constant(-inf, scale))
    unit = splat(constant(1 / WEIGHT_UNIT, scale))
    for n in range(TILE_VECS):
        at = p * size + n * lanes(scale)
        top, row_max = ahead(reals(t.top, scale), at), ahead(reals(t.row_max, scale), at)
        most = ahead(reals(t.max_score, scale), at)
        store(most, larger(load(most), load(top)))
        before = load(row_max)
        now = larger(before, load(top))
        store(row_max, now)
        # A row that has seen no key has a maximum of -inf; any finite one will do.
        shift = choose(now == nothing, zero, now)
        store(top, shift)
        # An unchanged maximum may be an infinite sink.
        rescale = choose(before == now, one, weight_of(before - shift) * unit)
        store(ahead(reals(t.rescale, scale), at), rescale)
        store(ahead(reals(t.block_sum, scale), at), zero)


@compiled
def weigh(t, row, vecs, keys, scores, scale):
    """Scores to weights relative to the maximum. Subtracting before scaling by log2(e) keeps the
    largest weight exact and every finite score from overflowing.
    """
    size = TILE_VECS * lanes(scale)
    for n in range(vecs):
        at = row + n * lanes(scale)
        top, total = (
            load(ahead(reals(t.top, scale), at)),
            load(ahead(reals(t.block_sum, scale), at)),
        )
        for j in range(keys):
            s = ahead(scores, j * size + n * lanes(scale))
            weight = weight_of(load(s) - top)
            store(s, weight)
            total = total + weight
        store(ahead(reals(t.block_sum, scale), at), total)


@compiled
def shrink(vecs, keys, weights, unit):
    size = TILE_VECS * lanes(unit)
    for j in range(keys):
        for n in range(vecs):
            at = ahead(weights, j * size + n * lanes(unit))
            store(at, load(at) * splat(unit))


@compiled
def all_finite(t, v, v_row, v_dim, keys, scale):
    """Is each value of these keys finite? x - x is a NaN where x is not."""
    zero, done, rest = splat(constant(0.0, scale)), 0, False
    special = zero < zero
    if v_dim * lanes(scale) == VECTOR_BYTES:
        done = t.value_dim // lanes(scale) * lanes(scale)
    for j in range(keys):
        row = v + j * v_row
        for d in range(0, done, lanes(scale)):
            x = load_unaligned(reals(row + d * v_dim, scale))
            special = special | (x - x != zero)
        for d in range(done, t.value_dim):
            x = reals(row + d * v_dim, scale)[0]
            rest |= x - x != 0
    return not (rest or any_lane(special))


@compiled
def masked_matmul(t, vecs, v, v_row, v_dim, keys, visible, weights, total, scale):
    """The second matmul if a hidden value is NaN or Inf: 0 * NaN is NaN, so hidden keys are left
    out of each lane.
    """
    size = TILE_VECS * lanes(scale)
    for d in range(t.value_dim):
        out = ahead(total, d * size)
        for i in range(vecs * lanes(scale)):
            value = out[i]
            for j in range(keys):
                if visible[j * size + i]:
                    x = reals(v + j * v_row + d * v_dim, scale)[0]
                    value = multiply_add(x, weights[j * size + i], value)
            out[i] = value


@compiled
def add_block(t, p, vecs, has_output, scale):
    """Add the block's sums to the rows'."""
    size = TILE_VECS * lanes(scale)
    for n in range(vecs):
        at = p * size + n * lanes(scale)
        rescale = load(ahead(reals(t.rescale, scale), at))
        row_sum = ahead(reals(t.row_sum, scale), at)
        store(row_sum, load(row_sum) * rescale + load(ahead(reals(t.block_sum, scale), at)))
        if has_output:  # or the block's total is the total already
            at = p * size * t.value_dim + n * lanes(scale)
            total, block = reals(t.total, scale), reals(t.block_total, scale)
            for d in range(at, at + t.value_dim * size, size):
                sums = load(ahead(total, d)) * rescale + load(ahead(block, d))
                store(ahead(total, d), sums)


@compiled
def finish(t, step, scale):
    """Store the rows' results. Returns the next step."""
    if step == WEIGH:
        return DONE
    if step == ATTEND:
        t.retry = retry_for(t, scale)
    store_rows(t, step, scale)
    if step == ATTEND and t.retry != 0:
        t.unit = 0.5 / WEIGHT_UNIT
        for bit in range(64):
            t.unit *= 0.5 if t.n_keys >> bit else 1.0
        return RETRY
    return WEIGH if t.weights != 0 else DONE


@compiled
def store_rows(t, step, scale):
    """Write the rows' results."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    tops, sums = reals(t.row_max, scale), reals(t.row_sum, scale)
    for p in range(t.micropanels):
        for n in range(0, size, width):
            divide(t, p, n, scale)
        columns = ahead(reals(t.total, scale), p * size * t.value_dim)
        if step == ATTEND:
            store_micropanel(t, p, columns, scale)
        else:
            overwrite_special_rows(t, p, columns, scale)
    for i in range(t.rows if t.lse != 0 else 0):
        # log(NaN) where the top is Inf: Inf - Inf was weighed
        top = np.float64(tops[i])
        lse = top if top == inf else top + log(np.float64(sums[i]) / WEIGHT_UNIT)
        if flags(t.row_state)[i] & ROW_NAN:
            lse = nan
        reals(row_of(t, t.lse, t.lse_row, i), scale)[0] = lse
    for i in range(t.rows if t.max_result != 0 else 0):
        most = reals(t.max_score, scale)[i]
        most = constant(nan, scale) if flags(t.row_state)[i] & ROW_NAN else most
        reals(row_of(t, t.max_result, t.max_result_row, i), scale)[0] = most


@compiled
def divide(t, p, n, scale):
    """Weighted sums to means; 0 where a row sees no key, whatever is in its column."""
    size, most = TILE_VECS * lanes(scale), splat(finite_most(scale))
    zero, keep = splat(constant(0.0, scale)), splat(constant(t.keep_factor, scale))
    sums = load(ahead(reals(t.row_sum, scale), p * size + n)) * splat(constant(t.unit, scale))
    # A sum of 0 with a visible key: all scores are -inf, 0 / 0 as the formula says.
    share = choose(sums == zero, splat(constant(nan, scale)), keep / sums)
    row_state = load_flags(ahead(flags(t.row_state), p * size + n), sums)
    column = ahead(reals(t.total, scale), p * size * t.value_dim + n)
    for d in range(t.value_dim):
        at = ahead(column, d * size)
        total = load(at)
        mean = total * share
        if t.retry != 0:  # a mean of the largest numbers may be rounded up
            over = (magnitude(total) <= most) & (magnitude(mean) > most)
            mean = choose(over, with_sign_of(most, mean), mean)
        store(at, choose(row_state, mean, zero))


@compiled
def store_micropanel(t, p, columns, scale):
    """out = columns[d][lane]."""
    size, width = TILE_VECS * lanes(scale), lanes(scale)
    rows, done = ints(t.words), 0
    for i in range(size):
        rows[i] = row_of(t, t.out, t.out_row, p * size + i)
    if t.out_format == REAL and t.out_dim * width == VECTOR_BYTES and t.rows >= (p + 1) * size:
        done = t.value_dim // width * width
        for n in range(0, size, width):
            for d in range(0, done, width):
                columns_to_rows(ahead(rows, n), d * t.out_dim, ahead(columns, d * size + n))
    for i in range(min(size, t.rows - p * size)):
        for d in range(done, t.value_dim):
            write(rows[i] + d * t.out_dim, t.out_format, columns[d * size + i])


@compiled
def overwrite_special_rows(t, p, columns, scale):
    """Store special rows again, and results that are not finite."""
    size = TILE_VECS * lanes(scale)
    for i in range(min(size, t.rows - p * size)):
        row = row_of(t, t.out, t.out_row, p * size + i)
        special = reals(t.special, scale)[p * size + i] != 0
        for d in range(t.value_dim):
            at = row + d * t.out_dim
            if t.out_format == REAL:
                out = np.float64(reals(at, scale)[0])
            else:
                out = read(at, t.out_format, False)
            if special or out - out != 0:
                write(at, t.out_format, columns[d * size + i])


@compiled
def store_weights(t, begin, scale):
    """The weights of a block, from its scores and the rows' sums; hidden ones are 0 already."""
    size = TILE_VECS * lanes(scale)
    tops, sums = reals(t.row_max, scale), reals(t.row_sum, scale)
    for i in range(t.rows):
        p, lane = i // size, i % size
        top = constant(0.0, scale) if tops[i] == -inf else tops[i]
        # Beside an infinite score others weigh 0, though the sum is not a number.
        total = constant(1.0, scale) if tops[i] == inf else sums[i]
        total = constant(nan, scale) if flags(t.row_state)[i] & ROW_NAN else total
        target = row_of(t, t.weights, t.weights_row, i)
        for sub_block in range(SUB_BLOCKS):
            sub = subs_of(t, p, sub_block)
            if sub[SUB_VECS] <= 1:
                sub = ahead(sub, lane // lanes(scale) * SUB_FIELDS)
            if sub[SUB_VECS] == 0:
                continue
            key = sub[SUB_FIRST]
            scores = ahead(in_block(t.scores, scale, p, key - begin), lane)
            visible = ahead(visible_in_block(t, scale, p, key - begin), lane)
            for j in range(sub[SUB_LAST] - key):
                if sub[SUB_VISIBILITY] == FULL or visible[j * size]:
                    weight = weight_of(scores[j * size] - top) / total
                    write(target + (key + j) * t.weights_dim, t.out_format, weight)
