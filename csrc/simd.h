/* Vectors of one width per instruction set, and the few operations on them that C lacks.
 *
 * Everything that depends on the instruction set stands here, so that a kernel has one body. A
 * vector is the compiler's own type (GCC and Clang vector extensions): + - * < & work on it.
 * `real` is float, or double with -DREAL_IS_DOUBLE.
 */
#ifndef FASTATTN_SIMD_H
#define FASTATTN_SIMD_H

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* TILE_ROWS x TILE_VECS accumulators, TILE_VECS operands and one broadcast value fill the register
 * file of 32 or 16 vectors. */
#if defined(__AVX512F__)
#define VEC_BYTES 64
#define TILE_ROWS 8
#define TILE_VECS 3
#elif defined(__AVX2__)
#define VEC_BYTES 32
#define TILE_ROWS 6
#define TILE_VECS 2
#elif defined(__aarch64__)
#define VEC_BYTES 16
#define TILE_ROWS 8
#define TILE_VECS 3
#else
#define VEC_BYTES 16
#define TILE_ROWS 6
#define TILE_VECS 2
#endif

/* LANES is written out because the preprocessor chooses by it. */
#ifdef REAL_IS_DOUBLE
typedef double real;
typedef int64_t lane_int;
#if VEC_BYTES == 64
#define LANES 8
#elif VEC_BYTES == 32
#define LANES 4
#else
#define LANES 2
#endif
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#else
typedef float real;
typedef int32_t lane_int;
#if VEC_BYTES == 64
#define LANES 16
#elif VEC_BYTES == 32
#define LANES 8
#else
#define LANES 4
#endif
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#endif

typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real loose_vec __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real))));
typedef lane_int ivec __attribute__((vector_size(VEC_BYTES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE ivec splat_int(lane_int x) { return x - (ivec){0}; }
INLINE vec load(const real *p) { return *(const vec *)p; }
INLINE void store(real *p, vec x) { *(vec *)p = x; }
INLINE vec load_unaligned(const real *p) { return *(const loose_vec *)p; }
INLINE void store_unaligned(real *p, vec x) { *(loose_vec *)p = x; }
INLINE vec choose(ivec condition, vec yes, vec no) {
    return (vec)(((ivec)yes & condition) | ((ivec)no & ~condition));
}

/* Keep the compiler from knowing a value. */
#if defined(__x86_64__)
#define HIDE_VALUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define HIDE_VALUE(x) __asm__ volatile("" : "+w"(x))
#else
#define HIDE_VALUE(x) __asm__ volatile("" : "+m"(x))
#endif

/* The larger of two; `b` where one is a NaN. */
INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
    return _mm512_max_pd(a, b);
#elif defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__) && defined(REAL_IS_DOUBLE)
    return _mm256_max_pd(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__) && defined(REAL_IS_DOUBLE)
    return _mm_max_pd(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return choose(a > b, a, b);
#endif
}

/* x - floor(x) and 2**floor(x) * y, for x <= 0 or a NaN. At x = -inf: 0 and 0. */
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
INLINE vec fraction(vec x) { return _mm512_reduce_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vec scale_by_power(vec y, vec x) { return _mm512_scalef_pd(y, x); }
#elif defined(__AVX512F__)
INLINE vec fraction(vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
INLINE vec scale_by_power(vec y, vec x) { return _mm512_scalef_ps(y, x); }
#else
INLINE vec floor_vec(vec x) {
#if defined(__AVX2__) && defined(REAL_IS_DOUBLE)
    return _mm256_floor_pd(x);
#elif defined(__AVX2__)
    return _mm256_floor_ps(x);
#elif defined(__aarch64__) && defined(REAL_IS_DOUBLE)
    return (vec)vrndmq_f64((float64x2_t)x);
#elif defined(__aarch64__)
    return (vec)vrndmq_f32((float32x4_t)x);
#else
    /* Adding 1.5 * 2**mantissa rounds to the nearest integer. */
    const vec magic = splat((real)(3ull << (MANTISSA_BITS - 1)));
    vec nearest = (x + magic) - magic;
    return nearest - choose(nearest > x, splat(1), splat(0));
#endif
}
/* The exponent field reaches down to -EXPONENT_BIAS, where it stands for 0. */
INLINE vec above_floor(vec x) { return larger(splat(-EXPONENT_BIAS), x); }
INLINE vec fraction(vec x) {
    x = above_floor(x);
    return x - floor_vec(x);
}
INLINE vec scale_by_power(vec y, vec x) {
    vec n = floor_vec(above_floor(x));
    /* n + bias lands in the lowest bits of the sum, whence it is shifted to the exponent. */
    vec sum = n + splat((real)((1ull << MANTISSA_BITS) + EXPONENT_BIAS));
    return y * (vec)((ivec)sum << MANTISSA_BITS);
}
#endif

/* The lower and the upper halves of a and b, element by element in turn. */
#define LOW2 0, 2
#define HIGH2 1, 3
#define LOW4 0, 4, 1, 5
#define HIGH4 2, 6, 3, 7
#define LOW8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH8 4, 12, 5, 13, 6, 14, 7, 15
#define LOW16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#if defined(__clang__)
INLINE vec zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, JOIN(LOW, LANES)); }
INLINE vec zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, JOIN(HIGH, LANES)); }
#else
INLINE vec zip_low(vec a, vec b) { return __builtin_shuffle(a, b, (ivec){JOIN(LOW, LANES)}); }
INLINE vec zip_high(vec a, vec b) { return __builtin_shuffle(a, b, (ivec){JOIN(HIGH, LANES)}); }
#endif

/* Rows to columns: log2(LANES) rounds in which row i is zipped with row i + LANES / 2. */
INLINE void transpose(vec rows[LANES]) {
    vec zipped[LANES];
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            zipped[2 * i] = zip_low(rows[i], rows[i + LANES / 2]);
            zipped[2 * i + 1] = zip_high(rows[i], rows[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = zipped[i];
    }
}

/* exp(x) for x <= 0: exactly 1 at 0, exactly 0 at -inf, NaN for NaN. */
INLINE vec exp_negative(vec x) {
    vec t = x * splat((real)1.4426950408889634);
    vec f = fraction(t);
#ifdef REAL_IS_DOUBLE /* csrc/minimax.py: 3.2e-18 */
    vec y = splat(6.263467031152498622e-10);
    y = y * f + 6.559528845952509289e-9;
    y = y * f + 1.025321254557100257e-7;
    y = y * f + 1.320836727474474409e-6;
    y = y * f + 0.00001525317505669423401;
    y = y * f + 0.0001540351230957138382;
    y = y * f + 0.001333355862956859117;
    y = y * f + 0.009618129099550759617;
    y = y * f + 0.05550410866560225728;
    y = y * f + 0.2402265069590633018;
    y = y * f + 0.6931471805599459284;
#else /* csrc/minimax.py: 8.2e-8 */
    vec y = splat(0.00186712997944f);
    y = y * f + 0.00901703052832f;
    y = y * f + 0.0557999129466f;
    y = y * f + 0.240164450201f;
    y = y * f + 0.6931513118f;
#endif
    y = y * f + (real)1;
    return scale_by_power(y, t);
}
#endif
