/* The register tile of multiply-adds, and matmuls made of it.
 *
 * S^T = K Q^T and O^T = V^T P^T have one form: an element of the left operand, read where it is in
 * memory, is broadcast to the lanes of all queries.
 */
#ifndef FASTATTN_REGISTER_TILE_INL_H
#define FASTATTN_REGISTER_TILE_INL_H

#include "convert-inl.h"
#include "masking-inl.h"
#include "matmul.h"
#include "simd-inl.h"

static int micropanel_vecs(const Tile *t, ptrdiff_t p) {
    return fewer((t->n_queries - p * MR + LANES - 1) / LANES, MR_VECS);
}

/* Head dims of a sum that begins at zero: runs of sqrt(head_dim) have the least rounding error. */
static ptrdiff_t block_d(int vecs, ptrdiff_t head_dim) {
    ptrdiff_t block = vecs == 1 ? BLOCK_D_ONE_VECTOR : BLOCK_D;
    while (block * block < head_dim) block *= 2;
    return block;
}

/* c[r][lane] = (accumulate ? c[r][lane] : 0) + sum over t of a[r * a_row + t * a_step] *
 * b[t][lane]; unless it is NULL, top[lane] = max(top[lane], c[r][lane]). Each `block` of steps is
 * summed from zero, but for the first one if it accumulates. Constant `rows`, `vecs` and one unit
 * stride keep the accumulators in registers. Each step prefetches one line at `ahead`: hardware
 * prefetchers do not follow the narrow columns of V, nor keep up with K in the L3 cache. */
INLINE void register_tile(const int rows, const int vecs, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_step, ptrdiff_t steps, ptrdiff_t block, const real *b,
                          real *c, bool accumulate, vec *top, const real *ahead,
                          ptrdiff_t ahead_step) {
    vec sum[NR][MR_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vecs; n++)
            sum[r][n] = accumulate ? load(c + r * MR + n * LANES) : splat(0);
    for (ptrdiff_t t = 0;;) {
        for (ptrdiff_t end = fewer(steps, t + block); t < end; t++) {
            __builtin_prefetch(ahead, 0, 2);
            vec operand[MR_VECS];
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) operand[n] = load(b + n * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vec factor = splat(a[r * a_row]);
#pragma GCC unroll 4
                for (int n = 0; n < vecs; n++) sum[r][n] = factor * operand[n] + sum[r][n];
            }
            a += a_step;
            b += MR;
            ahead += ahead_step;
        }
        if (t > block)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                for (int n = 0; n < vecs; n++) sum[r][n] += load(c + r * MR + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) store(c + r * MR + n * LANES, sum[r][n]);
        if (t >= steps) break;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) sum[r][n] = splat(0);
    }
    if (top)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) top[n] = larger(sum[r][n], top[n]);
}

#define MATMUL_ARGS                                                                                \
    const real *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t steps, ptrdiff_t block,            \
        const real *b, real *c, bool accumulate, vec *top

INLINE void matmul_vecs(const int vecs, ptrdiff_t rows, MATMUL_ARGS) {
    for (; rows >= NR; rows -= NR) {
        if (a_step == 1) {
            /* Contiguous rows of K: prefetch those of the next sub-block. */
            bool packed = a_row == steps;
            register_tile(NR, vecs, a, a_row, 1, steps, block, b, c, accumulate, top,
                          packed ? a + SUB_BLOCK_K * a_row : a, packed ? NR : 0);
        } else if (a_row == 1)
            register_tile(NR, vecs, a, 1, a_step, steps, block, b, c, accumulate, top,
                          a + SUB_BLOCK_K * a_step, a_step);
        else register_tile(NR, vecs, a, a_row, a_step, steps, block, b, c, accumulate, top, a, 0);
        a += NR * a_row;
        c += NR * MR;
    }
    switch (rows) {
#define ROWS(n)                                                                                    \
    case n:                                                                                        \
        register_tile(n, vecs, a, a_row, a_step, steps, block, b, c, accumulate, top, a, 0);       \
        break;
        ROWS(1)
        ROWS(2)
        ROWS(3)
        ROWS(4)
        ROWS(5)
#if NR == 8
        ROWS(6)
        ROWS(7)
#endif
#undef ROWS
    }
}

/* register_tile for any number of rows, and the first `vecs` vectors of a micropanel. */
static void matmul(int vecs, ptrdiff_t rows, MATMUL_ARGS) {
    switch (vecs) {
    case 1: matmul_vecs(1, rows, a, a_row, a_step, steps, block, b, c, accumulate, top); break;
    case 2: matmul_vecs(2, rows, a, a_row, a_step, steps, block, b, c, accumulate, top); break;
#if MR_VECS == 3
    case 3: matmul_vecs(3, rows, a, a_row, a_step, steps, block, b, c, accumulate, top); break;
#endif
    }
}

static void load_queries(const Tile *t, ptrdiff_t first, real *columns) {
    load_columns(t->q, t->q_dim, t->q_format, t->head_dim, t->n_queries, t->q_scale, first,
                 columns);
}

#ifdef HAS_BACKWARD
/* Are all values of these keys finite? x * 0 is 0 only for finite x. */
static bool all_finite(View v, int keys, ptrdiff_t dims) {
    vec sums[4] = {{0}}; /* independent, to hide latency */
    real rest = 0;
    for (int j = 0; j < keys; j++) {
        const real *row = v.data + j * v.row;
        ptrdiff_t d = 0;
        if (v.dim == 1) {
            for (; d + 4 * LANES <= dims; d += 4 * LANES)
#pragma GCC unroll 4
                for (int n = 0; n < 4; n++) sums[n] += load_unaligned(row + d + n * LANES) * 0;
            for (; d + LANES <= dims; d += LANES) sums[0] += load_unaligned(row + d) * 0;
        }
        for (; d < dims; d++) rest += row[d * v.dim] * 0;
    }
    vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest;
    return !any_lane(sum != splat(0));
}

/* V^T P^T if some v is NaN or Inf and hidden from some query: 0 * NaN is NaN, so hidden keys are
 * left out of each lane. */
static void masked_matmul(const SubBlock *sub, int vecs, View v, ptrdiff_t dims, real *out) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            ivec visible = visible_lanes(sub, n, j);
            vec p = load(sub->scores + j * MR + n * LANES);
            for (ptrdiff_t d = 0; d < dims; d++) {
                real *o = out + d * MR + n * LANES;
                vec sum = load(o);
                store(o, choose(visible, splat(v.data[j * v.row + d * v.dim]) * p + sum, sum));
            }
        }
}
#endif
#endif
