/* The engine for bfloat16 hardware: bfloat16, float16 and float32 as sums of bfloat16 terms.
 *
 * A float16 is the exact sum of two bfloat16 terms, and a float32 of three. The product of two such
 * sums is the sum of the products of their terms, without those that are smaller than the rounding
 * of a float32 (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence
 * Datatype For Higher-Precision Computations"). Sums are kept in float32. With BF16_TERMS = 1 the
 * weights are rounded to bfloat16.
 *
 * The hardware multiplies pairs, so head dims and keys are paired: an operand with queries in its
 * lanes is [term][pair][MR] pairs, the other one is [term][chunk][row][CHUNK] numbers. Numbers that
 * terms cannot represent are left out and added afterwards, in the lanes that they are visible to,
 * so that they change no bit of any other lane. */
#ifndef FASTATTN_MATMUL_BF16_INL_H
#define FASTATTN_MATMUL_BF16_INL_H

#include <immintrin.h>

#include "convert-inl.h"
#include "dropout-inl.h"
#include "masking-inl.h"
#include "matmul.h"
#include "register_tile-inl.h"
#include "score_options-inl.h"

#define PAIRS (CHUNK / 2)
#define WEIGHT_TERM (BLOCK_K / 2 * MR)

/* Matmuls use the products of terms i and j with i + j <= order. Of a float16 that is all of them,
 * so scores are exact; of a float32 the others are smaller than its rounding. */
#define SCORE_ORDER 2
#define VALUE_ORDER (BF16_TERMS - 1)

typedef uint16_t bfloat;
typedef uint32_t pair;

/* Lanes that terms cannot represent: NaN and Inf, and with three terms numbers so small that their
 * third term would be subnormal. */
INLINE __mmask16 unrepresentable(vec x) {
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

/* Two rows of 16 bfloat16, in the lower and the upper half, to 16 pairs. */
INLINE __m512i interleave(__m512i rows) {
    const __m512i order = {0x0011000100100000, 0x0013000300120002, 0x0015000500140004,
                           0x0017000700160006, 0x0019000900180008, 0x001b000b001a000a,
                           0x001d000d001c000c, 0x001f000f001e000e};
    return _mm512_permutexvar_epi16(order, rows);
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

/* The dims [d, d + LANES) of a row; 0 from `dims` on. */
INLINE vec load_dims(const char *row, ptrdiff_t dim, ptrdiff_t d, ptrdiff_t dims,
                     NumberFormat format, const float *scales) {
    float scale = d < dims ? scale_of_dim(scales, format, d) : 1;
    if (dim == format.bytes && d < dims)
        return load_some(row + dim_offset(format, d), dims - d, format) * scale;
    vec x = {0};
    for (int i = 0; i < LANES && d + i < dims; i++)
        x[i] = (float)read_dim(row, dim, d + i, format) * scale;
    return x;
}

static void bf16_pack_queries(Tile *t, const Scratch *s, int p) {
    ptrdiff_t pairs = round_up(t->head_dim, CHUNK) / 2, term = t->micropanels * pairs * MR;
    t->micropanel[p].special = 0;
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        pair *to = s->q_terms + p * pairs * MR + n * LANES;
        load_queries(t, p * MR + n * LANES, s->q + n * LANES);
        __mmask16 out = 0;
        for (ptrdiff_t d = 0; d < 2 * pairs; d += 2, to += MR) {
            vec even = d < t->head_dim ? load(s->q + d * MR + n * LANES) : splat(0);
            vec odd = d + 1 < t->head_dim ? load(s->q + (d + 1) * MR + n * LANES) : splat(0);
            __m512i terms[BF16_TERMS];
            split_bf16_pairs(even, odd, terms);
#pragma GCC unroll 3
            for (int i = 0; i < BF16_TERMS; i++) _mm512_store_si512(to + i * term, terms[i]);
            out |= unrepresentable(even) | unrepresentable(odd);
        }
        t->micropanel[p].special |= (uint64_t)out << n * LANES;
    }
}

/* key_terms[term][chunk of dims][key][CHUNK] of a sub-block. */
INLINE void split_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end,
                       NumberFormat format) {
    ptrdiff_t dims = round_up(t->head_dim, CHUNK), term = s->key_rows * dims;
    uint64_t special = 0;
    for (ptrdiff_t key = begin; key < end; key++) {
        const char *row = key_at(t, key);
        const float *scales = key_scales(t, key);
        bfloat *to = s->key_terms + key % BLOCK_K * CHUNK;
        __mmask16 out = 0;
        for (ptrdiff_t d = 0; d < dims; d += CHUNK, to += s->key_rows * CHUNK) {
            __m512i terms[BF16_TERMS];
            if (BF16_TERMS == 1 && format.kind == 'b' && t->k_dim == 2 &&
                d + CHUNK <= t->head_dim) {
                terms[0] = _mm512_loadu_si512(row + d * 2);
            } else {
                vec a = load_dims(row, t->k_dim, d, t->head_dim, format, scales);
                vec b = load_dims(row, t->k_dim, d + LANES, t->head_dim, format, scales);
                split_bf16(a, b, terms);
                out |= unrepresentable(a) | unrepresentable(b);
            }
#pragma GCC unroll 3
            for (int i = 0; i < BF16_TERMS; i++) _mm512_store_si512(to + i * term, terms[i]);
        }
        /* With one term, NaN and Inf multiply as in float32. */
        if (BF16_TERMS > 1 && out) special |= (uint64_t)1 << key % SUB_BLOCK_K;
    }
    s->special_keys[begin % BLOCK_K / SUB_BLOCK_K] = special;
}

static void bf16_pack_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    WITH_STORED_FORMAT(t->k_format, split_keys, t, s, begin, end);
}

/* The bits of a sub-block's keys, which may begin within it. */
static uint64_t bits_of(const uint64_t *bits, const SubBlock *sub) {
    return bits[sub->key % BLOCK_K / SUB_BLOCK_K] >> sub->key % SUB_BLOCK_K;
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

/* Transpose LANES rows of LANES pairs, whose strides are `from_row` and `to_row` pairs. */
INLINE void transpose_pairs(const pair *from, ptrdiff_t from_row, pair *to, ptrdiff_t to_row) {
    vec x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load((const real *)(from + i * from_row));
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store((real *)(to + i * to_row), x[i]);
}

/* pairs[term][pair][d] of up to CHUNK values, and the bits of the special ones. Special numbers,
 * and values whose bits are not set in `use`, become 0. */
INLINE void pair_values(const Tile *t, ptrdiff_t key, uint32_t use, pair *pairs, uint32_t *special,
                        NumberFormat format) {
    ptrdiff_t dims = round_up(t->value_dim, LANES);
    *special = 0;
    for (int j = 0; j < CHUNK; j += 2, pairs += dims) {
        __mmask16 out[2] = {0};
        bool both = (use >> j & 3) == 3;
        const char *rows[2] = {NULL, NULL};
        for (int i = 0; i < 2; i++)
            if (use >> (j + i) & 1) rows[i] = value_at(t, key + j + i);
        for (ptrdiff_t d = 0; d < dims; d += LANES) {
            __m512i terms[BF16_TERMS];
            if (BF16_TERMS == 1 && format.kind == 'b' && t->v_dim == 2 &&
                d + LANES <= t->value_dim && both) {
                /* bfloat16 already. */
                __m512i x = load_two(rows[0] + d * 2, rows[1] + d * 2);
                __mmask32 special_lanes = bfloats_from(128, x);
                out[0] |= (__mmask16)special_lanes;
                out[1] |= (__mmask16)(special_lanes >> LANES);
                terms[0] = interleave(_mm512_maskz_mov_epi16(~special_lanes, x));
            } else {
                vec x[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    x[i] = splat(0);
                    if (rows[i])
                        x[i] = load_dims(rows[i], t->v_dim, d, t->value_dim, format,
                                         value_scales(t, key + j + i));
                    __mmask16 special_lanes = unrepresentable(x[i]);
                    x[i] = (vec)_mm512_maskz_mov_ps((__mmask16)~special_lanes, (__m512)x[i]);
                    out[i] |= special_lanes;
                }
                split_bf16_pairs(x[0], x[1], terms);
            }
#pragma GCC unroll 3
            for (int i = 0; i < BF16_TERMS; i++)
                _mm512_store_si512(pairs + i * PAIRS * dims + d, terms[i]);
        }
        *special |= (uint32_t)(out[0] != 0) << j | (uint32_t)(out[1] != 0) << (j + 1);
    }
}

/* value_terms[term][chunk of keys][value dim][CHUNK] of a sub-block. Special numbers become 0. */
static void bf16_pack_values(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    ptrdiff_t term = s->out_rows * s->key_rows, dims = s->out_rows;
    uint64_t *sub_special = s->special_values + begin % BLOCK_K / SUB_BLOCK_K;
    *sub_special = 0;
    for (ptrdiff_t key = begin; key < end; key += CHUNK) {
        uint32_t use = (uint32_t)first_bits(fewer(end - key, CHUNK));
        uint32_t special;
        WITH_STORED_FORMAT(t->v_format, pair_values, t, key, use, s->value_pairs, &special);
        *sub_special |= (uint64_t)special << key % SUB_BLOCK_K;
        for (int i = 0; i < BF16_TERMS; i++)
            for (ptrdiff_t d = 0; d < dims; d += LANES)
                transpose_pairs(
                    s->value_pairs + i * PAIRS * dims + d, dims,
                    (pair *)(s->value_terms + i * term + key % BLOCK_K * dims + d * CHUNK), PAIRS);
    }
}

/* The terms of an operand; strides in elements. */
typedef struct {
    const bfloat *data; /* [row][CHUNK] */
    ptrdiff_t term, chunk;
} Rows;
typedef struct {
    const pair *data; /* [pair][MR] */
    ptrdiff_t term, chunk;
} Lanes;

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

/* c[row][lane] of `row_groups` times ROW_PAD rows, in steps of a chunk: the products of terms i and
 * j with i + j <= order, smaller ones first. */
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

/* c[row][lane] of `row_groups` times ROW_PAD rows, in steps of a chunk, by dot products of pairs.
 */
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

/* c[row][lane] (+)= sum over chunks; rows in whole ROW_GRAINs. */
INLINE void multiply(const int order, int vecs, ptrdiff_t rows, Rows a, Lanes b, int chunks,
                     real *c, bool accumulate) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tile loads read memory */
    for (int row_groups; rows > 0; rows -= row_groups * ROW_PAD) {
        row_groups = rows > ROW_PAD ? 2 : 1;
#define SIZE(g, v)                                                                                 \
    if (row_groups == g && vecs == v) multiply_rows(order, g, v, a, b, chunks, c, accumulate);
        SIZE(2, 2)
        SIZE(2, 1)
        SIZE(1, 2)
        SIZE(1, 1)
#if MR_VECS == 3
        SIZE(2, 3)
        SIZE(1, 3)
#endif
#undef SIZE
        a.data += row_groups * ROW_PAD * CHUNK;
        c += row_groups * ROW_PAD * MR;
    }
}

/* Recompute the scores of special keys and queries from real numbers. */
static void recompute_special_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                                     uint64_t special) {
    int vecs = t->micropanel[p].vecs;
    real row[MR] __attribute__((aligned(64)));
    for (int n = 0; n < vecs; n++) load_queries(t, p * MR + n * LANES, s->q + n * LANES);
    for (int j = 0; j < sub->keys; j++) {
        uint64_t lanes = special >> j & 1 ? ~(uint64_t)0 : t->micropanel[p].special;
        if (!lanes) continue;
        widen_keys(t, sub->key + j, sub->key + j + 1, s->keys);
        matmul(vecs, 1, s->keys, t->head_dim, 1, t->head_dim, s->q, row, false, NULL);
        for (int i = 0; i < vecs * LANES; i++)
            if (lanes >> i & 1) sub->scores[j * MR + i] = row[i];
    }
}

static void bf16_multiply_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                               vec *top) {
    ptrdiff_t dims = round_up(t->head_dim, CHUNK);
    Rows k = {s->key_terms + sub->key % BLOCK_K * CHUNK, s->key_rows * dims, s->key_rows * CHUNK};
    Lanes q = {s->q_terms + p * dims / 2 * MR, t->micropanels * dims / 2 * MR, PAIRS * MR};
    for (ptrdiff_t d = 0; d < dims; d += BLOCK_D) {
        int chunks = fewer(dims - d, BLOCK_D) / CHUNK;
        real *to = d ? s->more : sub->scores;
        multiply(SCORE_ORDER, t->micropanel[p].vecs, sub->keys, k, q, chunks, to, false);
        if (d) add_to_scores(t->micropanel[p].vecs, sub, to);
        k.data += chunks * k.chunk;
        q.data += chunks * q.chunk;
    }
    uint64_t special = bits_of(s->special_keys, sub);
    if (special | t->micropanel[p].special) recompute_special_scores(t, s, p, sub, special);
    take_max(t->micropanel[p].vecs, sub, top);
}

INLINE void weigh_pairs(const int vecs, const bool both, const real *scores, vec exponent,
                        const vec *top, vec *sum, pair *to, ptrdiff_t term) {
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) {
        __m512i terms[BF16_TERMS];
        vec even = weight_from(load(scores + n * LANES), top[n], exponent), odd = splat(0);
        if (both) odd = weight_from(load(scores + MR + n * LANES), top[n], exponent);
        sum[n] += even;
        sum[n] += odd;
        split_bf16_pairs(even, odd, terms);
#pragma GCC unroll 3
        for (int i = 0; i < BF16_TERMS; i++)
            _mm512_store_si512(to + i * term + n * LANES, terms[i]);
    }
}

INLINE void weigh_vecs(const int vecs, const SubBlock *sub, vec exponent, const vec *top, vec *sum,
                       pair *to, ptrdiff_t term) {
    vec shift[MR_VECS], total[MR_VECS];
    int j = 0;
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) shift[n] = top[n], total[n] = sum[n];
    for (; j + 2 <= sub->keys; j += 2, to += MR)
        weigh_pairs(vecs, true, sub->scores + j * MR, exponent, shift, total, to, term);
    if (j < sub->keys) {
        weigh_pairs(vecs, false, sub->scores + j * MR, exponent, shift, total, to, term);
        j += 2, to += MR;
    }
    for (; j < round_up(sub->keys, CHUNK); j += 2, to += MR)
        for (int i = 0; i < BF16_TERMS; i++) memset(to + i * term, 0, MR * sizeof *to);
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) sum[n] = total[n];
}

/* Turn scores into the terms of weights, and add the weights to `sum`. */
static void weigh(int vecs, double exponent, const SubBlock *sub, const vec *top, vec *sum,
                  pair *to, ptrdiff_t term) {
    vec factor = splat((real)exponent);
    switch (vecs) {
    case 1: weigh_vecs(1, sub, factor, top, sum, to, term); break;
    case 2: weigh_vecs(2, sub, factor, top, sum, to, term); break;
#if MR_VECS == 3
    case 3: weigh_vecs(3, sub, factor, top, sum, to, term); break;
#endif
    }
}

static pair *weights_of(const Scratch *s, const SubBlock *sub) {
    return s->weight_terms + sub->key % BLOCK_K / 2 * MR;
}

/* The terms of weights that are dropped become 0: of a pair of keys the even one has the lower
 * half. */
static void drop_weights(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    pair *to = weights_of(s, sub);
    draw_kept(t, s, p, sub);
    for (int j = 0; j < sub->keys; j += 2, to += MR)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            const lane_int *kept = s->kept + j * MR + n * LANES;
            __m512i even = _mm512_load_si512(kept), odd = _mm512_load_si512(kept + MR);
            __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, even, odd);
            for (int i = 0; i < BF16_TERMS; i++) {
                pair *at = to + i * WEIGHT_TERM + n * LANES;
                _mm512_store_si512(at, _mm512_and_si512(_mm512_load_si512(at), both));
            }
        }
}

/* Add the special numbers of a sub-block's values to the queries they are visible to. */
static void add_special_values(const Tile *t, const Scratch *s, int p, const BlockState *b,
                               const SubBlock *sub, real *out) {
    uint64_t special = bits_of(s->special_values, sub);
    vec exponent = splat((real)t->exponent);
    for (int j = 0; j < sub->keys; j++) {
        if (!(special >> j & 1)) continue;
        widen_values(t, sub->key + j, sub->key + j + 1, s->values);
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            vec score = load(sub->scores + j * MR + n * LANES);
            vec weight = weight_from(score, b->top[n], exponent);
            if (t->has_dropout)
                weight = choose(*(const ivec *)(s->kept + j * MR + n * LANES), weight, splat(0));
            for (ptrdiff_t d = 0; d < t->value_dim; d++) {
                real *o = out + d * MR + n * LANES;
                if (!(unrepresentable(splat(s->values[d])) & 1)) continue;
                store(o,
                      choose(visible_lanes(sub, n, j), weight * s->values[d] + load(o), load(o)));
            }
        }
    }
}

/* Add the weighted values of the sub-blocks [i, end) of a block. */
static void sum_sub_blocks(const Tile *t, const Scratch *s, int p, const BlockState *b, int i,
                           int end, real *out, bool *accumulate) {
    while (i < end && t->value_dim > 0) {
        const SubBlock *first = &b->sub_blocks[i];
        int chunks = 0;
        /* Contiguous sub-blocks make one matmul. */
        for (; i < end && b->sub_blocks[i].visibility != EMPTY &&
               b->sub_blocks[i].key == first->key + chunks * CHUNK;
             i++)
            chunks += (int)round_up(b->sub_blocks[i].keys, CHUNK) / CHUNK;
        if (chunks == 0) {
            i++;
            continue;
        }
        Rows v = {s->value_terms + first->key % BLOCK_K * s->out_rows, s->key_rows * s->out_rows,
                  CHUNK * s->out_rows};
        Lanes w = {weights_of(s, first), WEIGHT_TERM, PAIRS * MR};
        multiply(VALUE_ORDER, t->micropanel[p].vecs, s->out_rows, v, w, chunks, out, *accumulate);
        *accumulate = true;
    }
}
#endif
