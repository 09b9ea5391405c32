/* bf16.h for arm64: matmuls by BFMMLA.
 *
 * It adds to each element of a matrix of 2 x 2 the product of a row of 4 numbers and a column of 4:
 * rows and lanes are taken by two, and a bundle is 4 numbers. It rounds to odd, and takes subnormal
 * numbers for 0 (Arm Architecture Reference Manual, DDI 0487). */
#ifndef FASTATTN_BF16_NEON_INL_H
#define FASTATTN_BF16_NEON_INL_H

#include "bf16.h"
#include "matmul.h"

_Static_assert(CHUNK == BUNDLE && BUNDLE == LANES, "a row of a matrix is a vector of floats");

INLINE uint64_t flag_bits(flags x) {
    return vaddvq_u32(vandq_u32((uint32x4_t)x, (uint32x4_t){1, 2, 4, 8}));
}
INLINE vec without(flags lanes, vec x) { return (vec)((ivec)x & ~lanes); }

INLINE flags unrepresentable(vec x) {
    uvec size = (uvec)x & 0x7fffffff;
    ivec special = size >= 0x7f800000;
#if BF16_TERMS == 3
    special |= size - 1 < ((127 - 100) << 23) - 1;
#endif
    return special;
}

/* The i-th term of four numbers, which is taken from them. */
INLINE uint16x4_t next_term(int i, vec *x) {
    if (i == BF16_TERMS - 1) return (uint16x4_t)vcvt_bf16_f32((float32x4_t)*x);
    uint16x4_t term = vshrn_n_u32((uint32x4_t)*x, 16);
    *x -= (vec)((uvec)*x & 0xffff0000);
    return term;
}

INLINE void split_chunk(const vec x[1], bfloat *to, ptrdiff_t term) {
    vec rest = x[0];
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++, to += term) vst1_u16(to, next_term(i, &rest));
}

INLINE void split_bundles(const vec x[BUNDLE], bundle *to, ptrdiff_t term) {
    vec rest[BUNDLE] = {x[0], x[1], x[2], x[3]};
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++, to += term) {
        uint16x4x4_t rows;
#pragma GCC unroll 4
        for (int n = 0; n < BUNDLE; n++) rows.val[n] = next_term(i, &rest[n]);
        vst4_u16((bfloat *)to, rows);
    }
}

INLINE void bundle_bfloats(const char *const rows[BUNDLE], ptrdiff_t d, bundle *to,
                           flags special[BUNDLE]) {
    uint16x4x4_t x;
#pragma GCC unroll 4
    for (int n = 0; n < BUNDLE; n++) {
        memcpy(&x.val[n], rows[n] + d * 2, sizeof x.val[n]);
        uint16x4_t lanes = vcge_u16(vshl_n_u16(x.val[n], 1), vdup_n_u16(0xff00));
        x.val[n] = vbic_u16(x.val[n], lanes);
        special[n] |= (ivec)vmovl_u16(lanes);
    }
    vst4_u16((bfloat *)to, x);
}

INLINE void drop_bundles(const ivec kept[BUNDLE], bundle *at, ptrdiff_t term) {
    uint16x4x4_t masks;
#pragma GCC unroll 4
    for (int n = 0; n < BUNDLE; n++) masks.val[n] = vmovn_u32((uint32x4_t)kept[n]);
    bundle whole[LANES];
    vst4_u16((bfloat *)whole, masks);
#pragma GCC unroll 3
    for (int i = 0; i < BF16_TERMS; i++, at += term)
#pragma GCC unroll 4
        for (int n = 0; n < LANES; n++) at[n] &= whole[n];
}

static void begin_matmuls(void) {}
static void end_matmuls(void) {}

/* Two rows of a vector each, as two matrices of 2 x 2. */
typedef struct {
    float32x4_t left, right;
} Matrices;
INLINE Matrices swap_halves(float32x4_t first, float32x4_t second) {
    float64x2_t a = (float64x2_t)first, b = (float64x2_t)second;
    return (Matrices){(float32x4_t)vzip1q_f64(a, b), (float32x4_t)vzip2q_f64(a, b)};
}

INLINE bfloat16x8_t two_bundles(const void *at) {
    return vreinterpretq_bf16_u16(vld1q_u16((const bfloat *)at));
}

INLINE void multiply_rows(const int order, const int row_groups, const int vecs, Rows a, Lanes b,
                          int chunks, real *c, bool accumulate) {
    for (int first = 0; first < row_groups * ROW_PAD; first += NR, c += NR * MR) {
        Matrices sum[NR / 2][MR_VECS];
#pragma GCC unroll 4
        for (int r = 0; r < NR / 2; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) {
                const real *at = c + 2 * r * MR + n * LANES;
                sum[r][n] = (Matrices){vdupq_n_f32(0), vdupq_n_f32(0)};
                if (accumulate) sum[r][n] = swap_halves(vld1q_f32(at), vld1q_f32(at + MR));
            }
        for (int chunk = 0; chunk < chunks; chunk++)
#pragma GCC unroll 3
            for (int j = BF16_TERMS - 1; j >= 0; j--)
#pragma GCC unroll 3
                for (int i = order - j < BF16_TERMS ? order - j : BF16_TERMS - 1; i >= 0; i--) {
                    const bfloat *rows = a.data + chunk * a.chunk + i * a.term + first * CHUNK;
                    const bundle *lanes = b.data + chunk * b.chunk + j * b.term;
                    bfloat16x8_t factor[NR / 2];
#pragma GCC unroll 4
                    for (int r = 0; r < NR / 2; r++) factor[r] = two_bundles(rows + 2 * r * CHUNK);
#pragma GCC unroll 3
                    for (int n = 0; n < vecs; n++) {
                        bfloat16x8_t left = two_bundles(lanes + n * LANES),
                                     right = two_bundles(lanes + n * LANES + 2);
#pragma GCC unroll 4
                        for (int r = 0; r < NR / 2; r++) {
                            sum[r][n].left = vbfmmlaq_f32(sum[r][n].left, factor[r], left);
                            sum[r][n].right = vbfmmlaq_f32(sum[r][n].right, factor[r], right);
                        }
                    }
                }
#pragma GCC unroll 4
        for (int r = 0; r < NR / 2; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) {
                Matrices rows = swap_halves(sum[r][n].left, sum[r][n].right);
                vst1q_f32(c + 2 * r * MR + n * LANES, rows.left);
                vst1q_f32(c + (2 * r + 1) * MR + n * LANES, rows.right);
            }
    }
}

static double peak(ptrdiff_t rounds) {
    bfloat16x8_t factor = vreinterpretq_bf16_u16(vdupq_n_u16(0));
    Matrices sum[NR / 2][MR_VECS] = {{{{0}, {0}}}};
    HIDE_VALUE(factor);
    for (ptrdiff_t i = 0; i < rounds; i++)
#pragma GCC unroll 4
        for (int r = 0; r < NR / 2; r++)
#pragma GCC unroll 3
            for (int n = 0; n < MR_VECS; n++) {
                sum[r][n].left = vbfmmlaq_f32(sum[r][n].left, factor, factor);
                sum[r][n].right = vbfmmlaq_f32(sum[r][n].right, factor, factor);
                HIDE_VALUE(sum[r][n].left);
                HIDE_VALUE(sum[r][n].right);
            }
    return 2.0 * (double)rounds * NR * MR_VECS * LANES * BUNDLE;
}
#endif
