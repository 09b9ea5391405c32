/* bf16.h for AVX-512: matmuls by AMX, or by AVX512_BF16, whose bundles are pairs, too. */
#ifndef FASTATTN_BF16_AVX512_INL_H
#define FASTATTN_BF16_AVX512_INL_H

#include <immintrin.h>

#include "bf16.h"
#include "matmul.h"

#define PAIRS BUNDLES
typedef bundle pair;

INLINE uint64_t flag_bits(flags x) { return x; }
INLINE vec without(flags lanes, vec x) {
    return (vec)_mm512_maskz_mov_ps((__mmask16)~lanes, (__m512)x);
}

INLINE flags unrepresentable(vec x) {
    __m512i size = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff));
    __mmask16 bits = _mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(0x7f800000));
#if BF16_TERMS == 3
    const __m512i least = _mm512_set1_epi32((127 - 100) << 23), one = _mm512_set1_epi32(1);
    bits |= _mm512_cmplt_epu32_mask(_mm512_sub_epi32(size, one), _mm512_sub_epi32(least, one));
#endif
    return bits;
}

/* The high term of each number, in the upper half of its lane. */
INLINE vec high_term(vec x) {
    return (vec)_mm512_and_si512((__m512i)x, _mm512_set1_epi32((int)0xffff0000));
}

/* terms[i] = the i-th terms of 32 numbers, in order. */
INLINE void split_bf16(vec first, vec second, __m512i terms[BF16_TERMS]) {
    const __m512i upper = _mm512_add_epi16(
        _mm512_set1_epi16(1),
        _mm512_slli_epi16((__m512i){0x0003000200010000, 0x0007000600050004, 0x000b000a00090008,
                                    0x000f000e000d000c, 0x0013001200110010, 0x0017001600150014,
                                    0x001b001a00190018, 0x001f001e001d001c},
                          1));
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS - 1; i++) {
        vec a = high_term(first), b = high_term(second);
        terms[i] = _mm512_permutex2var_epi16((__m512i)a, upper, (__m512i)b);
        first -= a;
        second -= b;
    }
    terms[BF16_TERMS - 1] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

INLINE void split_chunk(const vec x[CHUNK / LANES], bfloat *to, ptrdiff_t term) {
    __m512i terms[BF16_TERMS];
    split_bf16(x[0], x[1], terms);
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++) _mm512_store_si512(to + i * term, terms[i]);
}

/* Round pairs to bfloat16, ties away from zero, which saves an instruction or two. */
INLINE __m512i round_pairs(vec first, vec second) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)first, half), 16);
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaa, _mm512_add_epi32((__m512i)second, half));
}

/* terms[i] = the i-th terms of 16 pairs. */
INLINE void split_bf16_pairs(vec first, vec second, __m512i terms[BF16_TERMS]) {
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS - 1; i++) {
        vec a = high_term(first), b = high_term(second);
        terms[i] = _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b);
        first -= a;
        second -= b;
    }
    terms[BF16_TERMS - 1] = round_pairs(first, second);
}

INLINE void split_bundles(const vec x[BUNDLE], bundle *to, ptrdiff_t term) {
    __m512i terms[BF16_TERMS];
    split_bf16_pairs(x[0], x[1], terms);
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++) _mm512_store_si512(to + i * term, terms[i]);
}

/* Two rows of 16 bfloat16, in the lower and the upper half, to 16 pairs. */
INLINE __m512i interleave(__m512i rows) {
    const __m512i order = {0x0011000100100000, 0x0013000300120002, 0x0015000500140004,
                           0x0017000700160006, 0x0019000900180008, 0x001b000b001a000a,
                           0x001d000d001c000c, 0x001f000f001e000e};
    return _mm512_permutexvar_epi16(order, rows);
}

/* Two rows of 16 bfloat16. */
INLINE __m512i load_two(const char *low, const char *high) {
    __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)low));
    return _mm512_inserti64x4(x, _mm256_loadu_si256((const __m256i *)high), 1);
}

/* Which of 32 bfloat16 have a size of at least 2**power, or are NaN; with a power of 128 NaN and
 * Inf. */
INLINE __mmask32 bfloats_from(int power, __m512i x) {
    __m512i bound = _mm512_set1_epi16((short)((127 + power) << 8));
    return _mm512_cmpge_epu16_mask(_mm512_slli_epi16(x, 1), bound);
}

INLINE void bundle_bfloats(const char *const rows[BUNDLE], ptrdiff_t d, bundle *to,
                           flags special[BUNDLE]) {
    __m512i x = load_two(rows[0] + d * 2, rows[1] + d * 2);
    __mmask32 lanes = bfloats_from(128, x);
    special[0] |= (__mmask16)lanes;
    special[1] |= (__mmask16)(lanes >> LANES);
    _mm512_store_si512(to, interleave(_mm512_maskz_mov_epi16(~lanes, x)));
}

INLINE void drop_bundles(const ivec kept[BUNDLE], bundle *at, ptrdiff_t term) {
    __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)kept[0], (__m512i)kept[1]);
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++, at += term)
        _mm512_store_si512(at, _mm512_and_si512(_mm512_load_si512(at), both));
}

/* Transpose LANES rows of LANES pairs, whose strides are `from_row` and `to_row` pairs. */
INLINE void transpose_pairs(const pair *from, ptrdiff_t from_row, pair *to, ptrdiff_t to_row) {
    vec x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load((const real *)(from + i * from_row));
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store((real *)(to + i * to_row), x[i]);
}

INLINE void transpose_bundles(const bundle *from, ptrdiff_t from_row, bundle *to) {
    transpose_pairs(from, from_row, to, BUNDLES);
}

#ifdef HAS_AMX
/* Eight tile registers of 16 rows of 64 bytes: 0 to 3 for sums, 4 and 5 for rows, 6 and 7 for
 * lanes. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin_matmuls(void) { _tile_loadconfig(&TILES); }
static void end_matmuls(void) { _tile_release(); }

INLINE void multiply_rows(const int order, const int row_groups, const int vecs, Rows a, Lanes b,
                          int chunks, real *c, bool accumulate) {
    real *below = c + ROW_PAD * MR;
    const int stride = MR * 4;
    if (accumulate) {
        _tile_loadd(0, c, stride);
        if (vecs > 1) _tile_loadd(1, c + LANES, stride);
        if (row_groups > 1) _tile_loadd(2, below, stride);
        if (row_groups > 1 && vecs > 1) _tile_loadd(3, below + LANES, stride);
    } else {
        _tile_zero(0);
        if (vecs > 1) _tile_zero(1);
        if (row_groups > 1) _tile_zero(2);
        if (row_groups > 1 && vecs > 1) _tile_zero(3);
    }
    for (int chunk = 0; chunk < chunks; chunk++, a.data += a.chunk, b.data += b.chunk)
#pragma GCC unroll 3
        for (int j = BF16_TERMS - 1; j >= 0; j--) {
            const pair *lanes = b.data + j * b.term;
            _tile_loadd(6, lanes, stride);
            if (vecs > 1) _tile_loadd(7, lanes + LANES, stride);
#pragma GCC unroll 3
            for (int i = order - j < BF16_TERMS ? order - j : BF16_TERMS - 1; i >= 0; i--) {
                const bfloat *rows = a.data + i * a.term;
                _tile_loadd(4, rows, CHUNK * 2);
                if (row_groups > 1) _tile_loadd(5, rows + ROW_PAD * CHUNK, CHUNK * 2);
                _tile_dpbf16ps(0, 4, 6);
                if (vecs > 1) _tile_dpbf16ps(1, 4, 7);
                if (row_groups > 1) _tile_dpbf16ps(2, 5, 6);
                if (row_groups > 1 && vecs > 1) _tile_dpbf16ps(3, 5, 7);
            }
        }
    _tile_stored(0, c, stride);
    if (vecs > 1) _tile_stored(1, c + LANES, stride);
    if (row_groups > 1) _tile_stored(2, below, stride);
    if (row_groups > 1 && vecs > 1) _tile_stored(3, below + LANES, stride);
}

static double peak(ptrdiff_t rounds) {
    begin_matmuls();
    _tile_zero(4);
    _tile_zero(5);
    for (ptrdiff_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    end_matmuls();
    return 2.0 * 4 * 16 * LANES * CHUNK * (double)rounds;
}

#else
static void begin_matmuls(void) {}
static void end_matmuls(void) {}

/* By dot products of pairs. */
INLINE void multiply_rows(const int order, const int row_groups, const int vecs, Rows a, Lanes b,
                          int chunks, real *c, bool accumulate) {
    (void)order;
    _Static_assert(BF16_TERMS == 1, "without AMX, terms are slower than float32");
    for (int first = 0; first < row_groups * ROW_PAD; first += NR) {
        vec sum[NR][MR_VECS];
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++)
                sum[r][n] = accumulate ? load(c + (first + r) * MR + n * LANES) : splat(0);
        for (int chunk = 0; chunk < chunks; chunk++) {
            const int *rows = (const int *)(a.data + chunk * a.chunk + first * CHUNK);
            const pair *lanes = b.data + chunk * b.chunk;
            for (int t = 0; t < PAIRS; t++) {
                __m512bh operand[MR_VECS];
#pragma GCC unroll 3
                for (int n = 0; n < vecs; n++)
                    operand[n] = (__m512bh)_mm512_load_si512(lanes + t * MR + n * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < NR; r++) {
                    __m512bh factor = (__m512bh)_mm512_set1_epi32(rows[r * PAIRS + t]);
#pragma GCC unroll 3
                    for (int n = 0; n < vecs; n++)
                        sum[r][n] = _mm512_dpbf16_ps(sum[r][n], factor, operand[n]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) store(c + (first + r) * MR + n * LANES, sum[r][n]);
    }
}

static double peak(ptrdiff_t rounds) {
    __m512bh factor = (__m512bh)_mm512_setzero_si512();
    vec sum[NR][MR_VECS] = {{{0}}};
    HIDE_VALUE(factor);
    for (ptrdiff_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int n = 0; n < MR_VECS; n++) {
                sum[r][n] = _mm512_dpbf16_ps(sum[r][n], factor, factor);
                HIDE_VALUE(sum[r][n]);
            }
    return 4.0 * (double)rounds * NR * MR_VECS * LANES;
}
#endif
#endif
