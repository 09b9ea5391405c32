/* Vectors of one width per instruction set, and the few operations on them that C lacks.
 *
 * Everything that depends on the instruction set is here, so that each kernel has one body. A
 * vector is the compiler's own type (GCC and Clang vector extensions): + - * < & work on it. `real`
 * is float, or double with -DREAL_IS_DOUBLE. */
#ifndef FASTATTN_SIMD_INL_H
#define FASTATTN_SIMD_INL_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#include "tile.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* LANES is written out because the preprocessor compares it. */
#ifdef REAL_IS_DOUBLE
typedef double real;
typedef int64_t lane_int;
typedef uint64_t lane_uint;
#if VEC_BYTES == 64
#define LANES 8
#elif VEC_BYTES == 32
#define LANES 4
#else
#define LANES 2
#endif
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define REAL_MAX DBL_MAX
#else
typedef float real;
typedef int32_t lane_int;
typedef uint32_t lane_uint;
#if VEC_BYTES == 64
#define LANES 16
#elif VEC_BYTES == 32
#define LANES 8
#else
#define LANES 4
#endif
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define REAL_MAX FLT_MAX
#endif
#define MR (MR_VECS * LANES) /* the queries that one register tile holds */

typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real loose_vec __attribute__((vector_size(VEC_BYTES), aligned(1)));
typedef lane_int ivec __attribute__((vector_size(VEC_BYTES)));
typedef lane_uint uvec __attribute__((vector_size(VEC_BYTES)));

#define LANE_BITS ((int)sizeof(lane_int) * 8)
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

INLINE ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
INLINE int fewer(ptrdiff_t left, int most) { return left < most ? (int)left : most; }

INLINE vec splat(real x) { return x - (vec){0}; }
INLINE ivec splat_int(lane_int x) { return x - (ivec){0}; }
INLINE ivec shift_up(ivec x, int bits) { return (ivec)((uvec)x << bits); }
INLINE vec load(const real *p) { return *(const vec *)p; }
INLINE void store(real *p, vec x) { *(vec *)p = x; }
INLINE vec load_unaligned(const real *p) { return *(const loose_vec *)p; }
INLINE void store_unaligned(real *p, vec x) { *(loose_vec *)p = x; }

/* The first n of LANES numbers, n < LANES, then 0. Reads no more than these. */
INLINE vec load_first(const real *p, ptrdiff_t n) {
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
#elif defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    ivec lane, wanted;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    wanted = lane < splat_int((lane_int)n);
#ifdef REAL_IS_DOUBLE
    return _mm256_maskload_pd(p, (__m256i)wanted);
#else
    return _mm256_maskload_ps(p, (__m256i)wanted);
#endif
#else
    vec x = {0};
    __builtin_memcpy(&x, p, (size_t)n * sizeof *p);
    return x;
#endif
}

typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2)));
typedef uint8_t ubyte_lanes __attribute__((vector_size(LANES)));
typedef int8_t byte_lanes __attribute__((vector_size(LANES)));

#ifdef REAL_IS_DOUBLE
typedef float float_lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t float_bits __attribute__((vector_size(LANES * 4)));
typedef int32_t int_lanes __attribute__((vector_size(LANES * 4)));
INLINE vec load_floats(const char *p) {
    float_lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, vec);
}
INLINE vec load_bfloats(const char *p) {
    half_lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector((float_lanes)(__builtin_convertvector(x, float_bits) << 16),
                                   vec);
}
INLINE vec load_bytes(const char *p) {
    byte_lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, int_lanes), vec);
}
#if defined(__AVX512F__) || defined(__F16C__)
#define HAS_HALF
INLINE vec load_halves(const char *p) {
#if defined(__AVX512F__)
    __m256i x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_cvtph_ps(x)));
#else
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
#endif
}
#elif defined(__aarch64__)
#define HAS_HALF
INLINE vec load_halves(const char *p) {
    float16x4_t x = vdup_n_f16(0);
    __builtin_memcpy(&x, p, 2 * LANES);
    return (vec)vcvt_f64_f32(vget_low_f32(vcvt_f32_f16(x)));
}
#endif
#else
typedef double double_lanes __attribute__((vector_size(VEC_BYTES)));
typedef int64_t double_bits __attribute__((vector_size(VEC_BYTES)));
typedef float half_vec __attribute__((vector_size(VEC_BYTES / 2)));
INLINE int as_int(const char *p) {
    int x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
INLINE vec load_bfloats(const char *p) {
#if defined(__AVX512F__) /* GCC converts by halves */
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vec)_mm512_slli_epi32(x, 16);
#else
    half_lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return (vec)(__builtin_convertvector(x, uvec) << 16);
#endif
}
/* To nearest, ties to even; the hardware's own instruction would flush subnormals. */
INLINE void store_bfloats(char *p, vec x) {
    uvec bits = (uvec)x, nearest = bits + 0x7fff + (bits >> 16 & 1);
    uvec upper = (uvec)(x != x) & (bits | 0x400000);
    upper = (upper | (nearest & ~(uvec)(x != x))) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)upper));
#else
    half_lanes lanes = __builtin_convertvector(upper, half_lanes);
    __builtin_memcpy(p, &lanes, sizeof lanes);
#endif
}
/* LANES numbers of 4 bits, each plus 8. */
INLINE vec load_nibbles(const char *p) {
#if defined(__AVX512F__)
    __m128i x = _mm_loadl_epi64((const __m128i *)p);
    __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(x, x));
    __m512i low = _mm512_srlv_epi32(twice, _mm512_set1_epi64((long long)4 << 32));
    /* An index is the lowest four bits. */
    const __m512 table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return _mm512_permutexvar_ps(low, table);
#elif defined(__AVX2__)
    __m128i x = _mm_cvtsi32_si128(as_int(p));
    __m256i twice = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(x, x));
    __m256i low = _mm256_srlv_epi32(twice, _mm256_set1_epi64x((long long)4 << 32));
    low = _mm256_and_si256(low, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_set1_epi32(8)));
#else
    ivec x = {0};
    for (int i = 0; i < LANES; i++) x[i] = ((uint8_t)p[i / 2] >> i % 2 * 4 & 15) - 8;
    return __builtin_convertvector(x, vec);
#endif
}
/* A finite number stays finite, however large. */
INLINE vec load_doubles(const char *p) {
    const double_lanes none = {0}, most = none + FLT_MAX, infinity = none + INFINITY;
    double_lanes x;
    half_vec converted[2]; /* of half a vector each: compilers take wider ones apart */
    for (int half = 0; half < 2; half++) {
        __builtin_memcpy(&x, p + half * (int)sizeof x, sizeof x);
        double_bits high = (x > most) & (x < infinity), low = (x < -most) & (x > -infinity);
        double_bits bound = (high & (double_bits)most) | (low & (double_bits)-most);
        x = (double_lanes)(((double_bits)x & ~(high | low)) | bound);
        converted[half] = __builtin_convertvector(x, half_vec);
    }
    vec all;
    __builtin_memcpy(&all, converted, sizeof all);
    return all;
}
INLINE vec load_bytes(const char *p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#endif
    byte_lanes x;
    __builtin_memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, ivec), vec);
}
#if defined(__AVX512F__) || defined(__F16C__) || defined(__aarch64__)
#define HAS_HALF
INLINE vec load_halves(const char *p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    float16x4_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return (vec)vcvt_f32_f16(x);
#endif
}
/* LANES float8_e4m3fn: the bits of halves that are 2**-8 times as large, all but NaN. */
#define HAS_FLOAT8
INLINE vec load_float8(const char *p) {
#if defined(__AVX512F__)
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(x), 7); /* two sign bits */
    __m512 numbers = _mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16((short)0xbf80)));
    __m128i without_sign = _mm_or_si128(x, _mm_set1_epi8((char)0x80));
    __mmask16 finite = _mm_cmpneq_epi8_mask(without_sign, _mm_set1_epi8(-1));
    return _mm512_mask_mul_ps(splat(NAN), finite, numbers, splat(256));
#else
    ubyte_lanes bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    half_lanes halves = __builtin_convertvector(bytes, half_lanes);
    half_lanes bits = (halves & 0x7f) << 7 | (halves & 0x80) << 8;
    vec x = load_halves((const char *)&bits) * 256;
    ivec nan = x * x > splat(448 * 448);
    return (vec)((ivec)x | nan);
#endif
}
INLINE void store_halves(char *p, vec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    float16x4_t halves = vcvt_f16_f32((float32x4_t)x);
    __builtin_memcpy(p, &halves, sizeof halves);
#endif
}
#endif
#endif

/* In each lane `yes` if the sign bit of `condition` is set, as comparisons set all bits, else `no`.
 */
INLINE vec choose(ivec condition, vec yes, vec no) {
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
    return _mm512_mask_blend_pd(_mm512_movepi64_mask((__m512i)condition), no, yes);
#elif defined(__AVX512F__)
    return _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)condition), no, yes);
#elif defined(__AVX2__) && defined(REAL_IS_DOUBLE)
    return _mm256_blendv_pd(no, yes, (__m256d)condition);
#elif defined(__AVX2__)
    return _mm256_blendv_ps(no, yes, (__m256)condition);
#else
    ivec all = condition < 0;
    return (vec)(((ivec)yes & all) | ((ivec)no & ~all));
#endif
}

/* The products of the lower halves of 64-bit lanes. */
typedef uint64_t wide __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t half_wide __attribute__((vector_size(VEC_BYTES / 2)));
INLINE wide multiply_low(wide a, uint32_t b) {
    wide factor = (wide){0} + b;
#if defined(__AVX512F__)
    return (wide)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
    return (wide)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
    return (wide)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#elif defined(__aarch64__)
    return (wide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)factor));
#else
    return (a & 0xffffffffu) * factor;
#endif
}

/* Is any lane not 0? */
INLINE bool any_lane(ivec x) {
    lane_int any = 0;
    for (int i = 0; i < LANES; i++) any |= x[i];
    return any != 0;
}

#define SIGN_BIT splat_int((lane_int)((lane_uint)1 << (LANE_BITS - 1)))
INLINE vec magnitude(vec x) { return (vec)((ivec)x & ~SIGN_BIT); }
INLINE vec with_sign_of(vec x, vec sign) {
#if defined(__AVX512F__)
    return (vec)_mm512_ternarylogic_epi64((__m512i)SIGN_BIT, (__m512i)sign, (__m512i)x, 0xca);
#else
    return (vec)(((ivec)x & ~SIGN_BIT) | ((ivec)sign & SIGN_BIT));
#endif
}

/* Bit j of the result: is byte j not 0? */
INLINE uint64_t nonzero_bytes(const char *p) {
#if defined(__AVX512BW__)
    __m512i x = _mm512_loadu_si512(p);
    return _mm512_test_epi8_mask(x, x);
#else
    uint64_t bits = 0;
    for (int i = 0; i < 64; i += 8) {
        const uint64_t low = 0x7f7f7f7f7f7f7f7f;
        uint64_t x;
        __builtin_memcpy(&x, p + i, 8);
        x = ((((x & low) + low) | x) & ~low) >> 7; /* a 1 in each byte that is not 0 */
        bits |= (x * 0x0102040810204080 >> 56) << i;
    }
    return bits;
#endif
}

/* Hide a value from the optimizer. */
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

/* The smaller of two; `b` where one is a NaN. */
INLINE vec smaller(vec a, vec b) {
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
    return _mm512_min_pd(a, b);
#elif defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#else
    return -larger(-a, -b);
#endif
}

/* x - floor(x), and 2**floor(x) * y for x <= 0 or a NaN, but 0 where the power is subnormal. */
#define FLUSH splat(1 - EXPONENT_BIAS)
#if defined(__AVX512F__) && defined(REAL_IS_DOUBLE)
INLINE vec fraction(vec x) {
    return _mm512_reduce_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
INLINE vec scale_by_power(vec y, vec x) {
    return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, FLUSH, _CMP_NLT_UQ), y, x);
}
#elif defined(__AVX512F__)
INLINE vec fraction(vec x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
INLINE vec scale_by_power(vec y, vec x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, FLUSH, _CMP_NLT_UQ), y, x);
}
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
INLINE vec fraction(vec x) { return x - floor_vec(x); }
INLINE vec scale_by_power(vec y, vec x) {
    /* floor(x) + bias is in the lowest bits of the sum; shift it to the exponent. */
    vec sum = floor_vec(x) + splat((real)((1ull << MANTISSA_BITS) + EXPONENT_BIAS));
    vec power = (vec)((ivec)sum << MANTISSA_BITS);
    return (vec)((ivec)(y * power) & ~(x < FLUSH));
}
#endif

/* The lower and the upper halves of a and b, interleaved. */
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

/* In lane l, the sum over the lanes of x[l]. */
INLINE vec sum_lanes(vec x[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            x[i] = zip_low(x[i], x[i + half]) + zip_high(x[i], x[i + half]);
    return x[0];
}

/* The sum of all lanes. */
INLINE real sum_of_lanes(vec x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) x = zip_low(x, x) + zip_high(x, x);
    return x[0];
}

#endif
