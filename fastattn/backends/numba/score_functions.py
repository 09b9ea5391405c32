"""Scores that are no products: distances, and sums of tanh.

As in ``csrc/distances-inl.h``, sums of CHUNK_DIMS dimensions join a running sum, which alone would
have
several times NumPy's rounding error. Four keys at a time hide each other's latency.
"""

from __future__ import annotations

from math import inf

from .exponential import tanh
from .memory import ahead, load, reals, store
from .numbers import bounded, finite_most, is_finite
from .vectors import (
    TILE_VECS,
    any_lane,
    choose,
    compiled,
    constant,
    lanes,
    larger,
    multiply_add,
    per_type,
    splat,
    square_root,
)

__all__ = ["NUMBER", "score_keys"]

DISTANCE, ADDITIVE, SQUARED_DISTANCE = 1, 2, 3
NUMBER = {
    "dot": None,
    "distance": DISTANCE,
    "additive": ADDITIVE,
    "squared distance": SQUARED_DISTANCE,
}
CHUNK_DIMS = 16

# Differences of numbers are multiplied by these before they are squared, where their squares would
# overflow, or be summed to less than this, where subnormal ones have lost digits.
shrink, grow = per_type(2.0**-66, 2.0**-520), per_type(2.0**100, 2.0**600)
least_square = per_type(2.0**-100, 2.0**-960)


@compiled
def score_keys(t, score_function, vecs, k, k_row, k_dim, keys, queries, scores, scale):
    """scores[key][lane] of queries[d][lane]."""
    size = TILE_VECS * lanes(scale)
    for j in range(0, keys, 4):
        for n in range(0, vecs * lanes(scale), lanes(scale)):
            four = ahead(scores, j * size + n)
            at, column = k + j * k_row, ahead(queries, n)
            score_four_keys(t, score_function, at, k_row, k_dim, keys - j, column, four, scale)


@compiled
def score_four_keys(t, score_function, k, k_row, k_dim, keys, column, scores, scale):
    """Of the next four keys, or as many as there are, and one vector of queries."""
    size = TILE_VECS * lanes(scale)
    zero, weights = splat(constant(0.0, scale)), reals(t.additive_weights, scale)
    second, third, fourth = min(1, keys - 1), min(2, keys - 1), min(3, keys - 1)
    all_a, all_b, all_c, all_d = zero, zero, zero, zero
    for first in range(0, t.head_dim, CHUNK_DIMS):
        a, b, c, d = zero, zero, zero, zero
        for dim in range(first, min(first + CHUNK_DIMS, t.head_dim)):
            q, at = load(ahead(column, dim * size)), k + dim * k_dim
            x = splat(reals(at, scale)[0])
            y = splat(reals(at + second * k_row, scale)[0])
            z = splat(reals(at + third * k_row, scale)[0])
            u = splat(reals(at + fourth * k_row, scale)[0])
            if score_function != ADDITIVE:
                x, y, z, u = q - x, q - y, q - z, q - u
                a, b = multiply_add(x, x, a), multiply_add(y, y, b)
                c, d = multiply_add(z, z, c), multiply_add(u, u, d)
            else:
                weight = splat(weights[dim])
                a, b = multiply_add(weight, tanh(q + x), a), multiply_add(weight, tanh(q + y), b)
                c, d = multiply_add(weight, tanh(q + z), c), multiply_add(weight, tanh(q + u), d)
        all_a, all_b, all_c, all_d = all_a + a, all_b + b, all_c + c, all_d + d
    if score_function == SQUARED_DISTANCE:
        all_a = negated_square(t, all_a, k, k_dim, column, scale)
        all_b = negated_square(t, all_b, k + second * k_row, k_dim, column, scale)
        all_c = negated_square(t, all_c, k + third * k_row, k_dim, column, scale)
        all_d = negated_square(t, all_d, k + fourth * k_row, k_dim, column, scale)
    elif score_function == DISTANCE:
        all_a = root(t, all_a, k, k_dim, column, scale)
        all_b = root(t, all_b, k + second * k_row, k_dim, column, scale)
        all_c = root(t, all_c, k + third * k_row, k_dim, column, scale)
        all_d = root(t, all_d, k + fourth * k_row, k_dim, column, scale)
    else:
        factor = splat(constant(t.function_scale, scale))
        all_a = bounded(all_a * factor, is_finite(all_a, scale), scale)
        all_b = bounded(all_b * factor, is_finite(all_b, scale), scale)
        all_c = bounded(all_c * factor, is_finite(all_c, scale), scale)
        all_d = bounded(all_d * factor, is_finite(all_d, scale), scale)
    store(ahead(scores, fourth * size), all_d)
    store(ahead(scores, third * size), all_c)
    store(ahead(scores, second * size), all_b)
    store(scores, all_a)


@compiled
def root(t, square, k, k_dim, column, scale):
    """The scores of one key from squared distances, which are summed again where they overflow or
    lose digits.
    """
    factor = splat(constant(t.function_scale, scale))
    score = bounded(square_root(square) * factor, is_finite(square, scale), scale)
    odd = (square == splat(constant(inf, scale))) | (square < splat(least_square(scale)))
    return rescaled_root(t, square, odd, score, k, k_dim, column, scale) if any_lane(odd) else score


@compiled
def rescaled_root(t, square, odd, score, k, k_dim, column, scale):
    size, factor = TILE_VECS * lanes(scale), splat(constant(t.function_scale, scale))
    small, large = splat(shrink(scale)), splat(grow(scale))
    far, total = square > splat(least_square(scale)), splat(constant(0.0, scale))
    for dim in range(t.head_dim):
        q, x = load(ahead(column, dim * size)), splat(reals(k + dim * k_dim, scale)[0])
        x = choose(far, q * small - x * small, (q - x) * large)  # what is near differs exactly
        total = multiply_add(x, x, total)
    length = square_root(total) * factor / choose(far, small, large)
    return choose(odd, bounded(length, is_finite(total, scale), scale), score)


@compiled
def negated_square(t, square, k, k_dim, column, scale):
    """The scores of one key from squared distances: what leaves the range is its end, but -Inf of
    what the inputs make infinite.
    """
    infinite = splat(constant(inf, scale))
    score = larger(splat(-finite_most(scale)), square * splat(constant(t.function_scale, scale)))
    far = square == infinite
    if any_lane(far):
        far = shrunk(t, k, k_dim, column, scale) == infinite
        score = choose(far, splat(constant(-inf, scale)), score)
    return score


@compiled
def shrunk(t, k, k_dim, column, scale):
    """The squared distances of vectors `shrink` times as long."""
    small, total = splat(shrink(scale)), splat(constant(0.0, scale))
    for dim in range(t.head_dim):
        x = splat(reals(k + dim * k_dim, scale)[0])
        x = load(ahead(column, dim * TILE_VECS * lanes(scale))) * small - x * small
        total = multiply_add(x, x, total)
    return total
