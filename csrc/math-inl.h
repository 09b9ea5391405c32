/* Exponentials, tanh, quotients and square roots of vectors, each with its error bound.
 *
 * The coefficients are those of least relative error, by tools/minimax.py; the bounds are checked
 * by tests/backends/exp_tanh_check.c.
 */
#ifndef FASTATTN_MATH_INL_H
#define FASTATTN_MATH_INL_H

#include "simd-inl.h"

#define LOG2_E 1.4426950408889634
#define LN2 0.69314718055994530942

/* WEIGHT_UNIT * 2**t for t <= 0: exactly WEIGHT_UNIT at 0, exactly 0 at -inf, NaN for NaN. For t =
 * x * LOG2_E the relative error is at most 1.6 epsilon * (1 + |x|), in float64 0.9:
 * tests/backends/exp_tanh_check.c. */
INLINE vec weight_of(vec t) {
    vec f = fraction(t);
    const real UNIT = (real)WEIGHT_UNIT;
#ifdef REAL_IS_DOUBLE /* tools/minimax.py: 3.2e-18 */
    vec y = splat(6.263109187474883278e-10 * UNIT);
    y = y * f + 6.559712897579314753e-9 * UNIT;
    y = y * f + 1.025317186450633205e-7 * UNIT;
    y = y * f + 1.320837232734033306e-6 * UNIT;
    y = y * f + 0.00001525317466967267173 * UNIT;
    y = y * f + 0.0001540351232845643857 * UNIT;
    y = y * f + 0.001333355862898311084 * UNIT;
    y = y * f + 0.009618129099561909824 * UNIT;
    y = y * f + 0.05550410866560104622 * UNIT;
    y = y * f + 0.2402265069590633665 * UNIT;
    y = y * f + 0.6931471805599459272 * UNIT;
#else /* tools/minimax.py: 8.2e-8 */
    vec y = splat(0.00186702658517f * UNIT);
    y = y * f + 0.00901724922596f * UNIT;
    y = y * f + 0.055799756893f * UNIT;
    y = y * f + 0.240164492838f * UNIT;
    y = y * f + 0.693151308322f * UNIT;
#endif
    y = y * f + UNIT;
    return scale_by_power(y, t);
}

/* n / d for normal d. The divider of 512 bits takes eight times as long as these steps. */
INLINE vec quotient(vec n, vec d) {
#if defined(__AVX512F__) && !defined(REAL_IS_DOUBLE)
    vec r = _mm512_rcp14_ps(d), y = n * r;
    return (n - d * y) * r + y; /* within 2**-28 before it is rounded */
#else
    return n / d;
#endif
}

/* Adding this rounds to the nearest integer, in the lowest bits. */
#define ROUNDER splat((real)(3ull << (MANTISSA_BITS - 1)))
INLINE vec power_of(vec rounded) { /* 2**n of n + ROUNDER */
    return (vec)(((ivec)rounded + splat_int(EXPONENT_BIAS)) << MANTISSA_BITS);
}

/* 2**f - 1 for |f| <= 1/2. */
INLINE vec power_less_one(vec f) {
#ifdef REAL_IS_DOUBLE /* tools/minimax.py: 1.8e-17 */
    vec y = splat(4.445536079096291314e-10);
    y = y * f + 7.07254999038397057e-9;
    y = y * f + 1.017812125892926574e-7;
    y = y * f + 1.321544278264547651e-6;
    y = y * f + 0.00001525273370140623868;
    y = y * f + 0.0001540353044138512039;
    y = y * f + 0.001333355814653136969;
    y = y * f + 0.009618129107607122348;
    y = y * f + 0.05550410866482123764;
    y = y * f + 0.240226506959100978;
    y = y * f + 0.6931471805599453112;
#else /* tools/minimax.py: 1.1e-8 */
    vec y = splat(0.000154035121869f);
    y = y * f + 0.00133906973649f;
    y = y * f + 0.00961823735112f;
    y = y * f + 0.0555035750476f;
    y = y * f + 0.240226497968f;
    y = y * f + 0.693147187912f;
#endif
    return y * f;
}

/* tanh(x) = -m / (2 + m) with m = exp(-2 |x|) - 1, computed without cancellation: f is within half
 * of 0, so that small x need only the polynomial without its constant term. The error is at
 * most 3.6 ulp, in float64 3.9: tests/backends/exp_tanh_check.c. */
INLINE vec tanh_vec(vec x) {
    const vec saturated = splat(sizeof(real) == 8 ? 20 : 10); /* tanh rounds to 1 from there on */
    vec a = magnitude(x);
    vec t = smaller(saturated, a) * splat((real)-2.8853900817779268);
    vec rounded = t + ROUNDER, power = power_of(rounded);
    vec m = power * power_less_one(t - (rounded - ROUNDER)) + (power - (real)1);
    return with_sign_of(quotient(-m, (real)2 + m), x);
}

/* The square root of x >= 0, within 1 epsilon. The unit for 512 bits takes three times as long as
 * these steps. */
INLINE vec root_of(vec x) {
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
    return _mm512_sqrt_pd(x);
#elif defined(__AVX512F__)
    vec r = _mm512_rsqrt14_ps(larger(x, splat(FLT_MIN))), y = x * r;
    return choose(x == splat(INFINITY), x, (x - y * y) * (r * (real)0.5) + y);
#elif defined(__AVX2__) && defined(REAL_IS_DOUBLE)
    return _mm256_sqrt_pd(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__) && defined(REAL_IS_DOUBLE)
    return _mm_sqrt_pd(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#elif defined(__aarch64__) && defined(REAL_IS_DOUBLE)
    return (vec)vsqrtq_f64((float64x2_t)x);
#elif defined(__aarch64__)
    return (vec)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = (real)sqrt(x[i]);
    return x;
#endif
}

/* exp(2 x) = high + low for |x| <= EXP2X_MOST, where `high` is rounded and `low` is the rest. exp(2
 * x) - 1 is within 2.3 epsilon of itself, and so is the difference of two that are near 1:
 * tests/backends/exp_tanh_check.c. */
#ifdef REAL_IS_DOUBLE
#define EXP2X_MOST 300
#define HALF_LN2_HIGH 0x1.62e42fefa2p-2 /* short: exact times a small integer */
#define HALF_LN2_LOW 0x1.9ef35793c7673p-42
#else
#define EXP2X_MOST 38
#define HALF_LN2_HIGH 0x1.62ep-2
#define HALF_LN2_LOW 0x1.0bfbe8e7bcd5ep-16
#endif
typedef struct {
    vec high, low;
} VecPair;
INLINE VecPair exp_of_twice(vec x) {
    vec rounded = x * (real)2.8853900817779268 + ROUNDER, n = rounded - ROUNDER;
    vec f = ((x - n * (real)HALF_LN2_HIGH) - n * (real)HALF_LN2_LOW) * (real)2.8853900817779268;
    vec power = power_of(rounded), m = power_less_one(f), one_more = m + (real)1;
    return (VecPair){power * one_more, power * (m - (one_more - (real)1))};
}
#endif
