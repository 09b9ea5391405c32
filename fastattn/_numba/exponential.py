"""exp and tanh of vectors and of scalars, without branches, so that LLVM vectorises their callers."""

from __future__ import annotations

from numba import njit

from .vectors import (
    choose,
    constant,
    magnitude,
    multiply_add,
    nearest,
    per_type,
    polynomial,
    power_of_two,
    with_sign_of,
)

__all__ = ["WEIGHT_UNIT", "exp", "tanh", "weight_of"]

# The weight of a row's largest score. A power of 2, so that nothing is rounded, and large, because
# sums of small weights would be subnormal and take a hundred times as long.
WEIGHT_UNIT = 2.0**24

log2e = per_type(1.4426950216293335, 1.4426950408889634)
log2e_rest = per_type(1.925963033500e-08, 2.0355273740931033e-17)
least = per_type(-87.33654475055310898657, -708.396418532264106)  # exp is subnormal below
most = per_type(88.72283935546875, 709.782712893384)  # and overflows above
saturated = per_type(10.0, 20.0)  # tanh rounds to 1 from there on


@njit(error_model="numpy")
def weight_of(x):
    """WEIGHT_UNIT * exp(x) for x <= 0: exactly WEIGHT_UNIT at 0, exactly 0 at -inf and where exp
    is subnormal, NaN for NaN.
    """
    n, m = _split(x)
    power = power_of_two(n + constant(24.0, x))
    return choose(x < least(x), constant(0.0, x), multiply_add(power, m, power))


@njit(error_model="numpy")
def exp(x):
    """e**x of a float32 or float64 within 2 ulp; 0 where the result would be subnormal."""
    n, m = _split(x)
    half = nearest(n * constant(0.5, x))  # 2**n may be one more than the largest number
    power = power_of_two(half)
    value = multiply_add(power, m, power) * power_of_two(n - half)
    value = choose(x > most(x), constant(_INFINITY, x), value)
    return choose(x < least(x), constant(0.0, x), value)


@njit(error_model="numpy")
def tanh(x):
    """The hyperbolic tangent of a float32 or float64 within 4 ulp."""
    a = magnitude(x)
    a = choose(a > saturated(x), saturated(x), a)
    n, m = _split(constant(-2.0, x) * a)
    power = power_of_two(n)
    # exp(-2a) - 1 without cancellation: n is 0 for small a, and power - 1 exact.
    less_one = multiply_add(power, m, power - constant(1.0, x))
    return with_sign_of(less_one / (constant(2.0, x) + less_one), x)


_INFINITY = float("inf")


@njit(error_model="numpy")
def _split(x):
    """``(n, m)`` with exp(x) = 2**n * (1 + m), n an integer and |m| < 1/2."""
    n = nearest(x * log2e(x))
    f = multiply_add(x, log2e(x), -n)
    f = multiply_add(x, log2e_rest(x), f)
    return n, f * polynomial(f)
