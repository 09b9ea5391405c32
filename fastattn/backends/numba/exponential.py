"""exp and tanh of vectors and scalars, without branches, so that LLVM vectorises their callers."""

from __future__ import annotations

from math import inf

from numba import njit

from .vectors import (
    choose,
    compiled,
    constant,
    magnitude,
    multiply_add,
    per_type,
    polynomial,
    to_exponent,
    with_sign_of,
)

__all__ = ["WEIGHT_UNIT", "exp", "tanh", "weight_of"]

# The weight of a row's largest score. A power of 2, so that nothing is rounded, and large, because
# sums of small weights would be subnormal and take a hundred times as long.
WEIGHT_UNIT = 2.0**24
LOG2_UNIT = 24.0

log2e = per_type(1.4426950216293335, 1.4426950408889634)
log2e_rest = per_type(1.925963033500e-08, 2.0355273740931033e-17)
exponent_of_1 = per_type(1.5 * 2**23 + 127, 1.5 * 2**52 + 1023)  # see `to_exponent`
least_normal = per_type(-87.33654475, -708.396418532264)  # exp is subnormal below
least = per_type(-104.0, -746.0)  # exp rounds to 0 below
most = per_type(89.0, 710.0)  # exp overflows above
saturated = per_type(10.0, 20.0)  # tanh rounds to 1 from there on


@compiled
def split(x, log2_unit):
    """``(power, m)`` with 2**log2_unit * exp(x) = power * (1 + m), |m| < 1/2, `power` one of 2 and
    within the normal numbers.
    """
    one = exponent_of_1(x) + log2_unit
    shifted = multiply_add(x, log2e(x), one)  # rounds to the nearest integer
    n = shifted - one
    f = multiply_add(x, log2e(x), -n)
    f = multiply_add(x, log2e_rest(x), f)
    return to_exponent(shifted), f * polynomial(f)


@compiled
def weight_of(x):
    """WEIGHT_UNIT * exp(x) for x <= 0: exactly WEIGHT_UNIT at 0, exactly 0 at -inf and where exp
    is subnormal, NaN for NaN.
    """
    power, m = split(x, constant(LOG2_UNIT, x))
    return choose(x < least_normal(x), constant(0.0, x), multiply_add(power, m, power))


@njit(error_model="numpy")
def exp(x):
    """e**x of a float32 or float64 within 2 ulp."""
    # Neither the power of 2 of the largest results nor that of the smallest is a normal number:
    # the exponent is moved by 64, and back by a product that rounds.
    large = x > constant(0.0, x)
    power, m = split(x, choose(large, constant(-64.0, x), constant(64.0, x)))
    unit = choose(large, constant(2.0**64, x), constant(2.0**-64, x))
    value = choose(x < least(x), constant(0.0, x), multiply_add(power, m, power) * unit)
    return choose(x > most(x), constant(inf, x), value)


@njit(error_model="numpy")
def tanh(x):
    """The hyperbolic tangent of a float32 or float64 within 4 ulp."""
    a = magnitude(x)
    a = choose(a > saturated(x), saturated(x), a)
    power, m = split(constant(-2.0, x) * a, constant(0.0, x))
    # exp(-2a) - 1 without cancellation: power is 1 for small a.
    less_one = multiply_add(power, m, power - constant(1.0, x))
    return with_sign_of(-less_one / (constant(2.0, x) + less_one), x)
