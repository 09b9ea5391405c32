/* Both products of attention by multiply-adds, on keys and values where they lie.
 *
 * S^T = K Q^T and O^T = V^T P^T have one form: an element of the left operand, read where it lies
 * in memory, is broadcast to the lanes of all queries.
 */
#ifndef FASTATTN_MATMUL_FMA_INL_H
#define FASTATTN_MATMUL_FMA_INL_H

#include "distances-inl.h"

/* c[r][lane] = (accumulate ? c[r][lane] : 0) + sum over t of a[r * a_row + t * a_step] *
 * b[t][lane], and where `top` is given top[lane] = max(top[lane], c[r][lane]). Constant `rows`,
 * `vecs` and one unit stride keep the accumulators in registers. Each step fetches one line
 * `ahead`: hardware prefetchers do not follow the narrow columns of V, nor keep up with K once it
 * lies in the third-level cache. */
INLINE void register_tile(const int rows, const int vecs, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,
                          bool accumulate, vec *top, const real *ahead, ptrdiff_t ahead_step) {
    vec sum[NR][MR_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vecs; n++)
            sum[r][n] = accumulate ? load(c + r * MR + n * LANES) : splat(0);
    for (ptrdiff_t t = 0; t < steps; t++) {
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
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int n = 0; n < vecs; n++) store(c + r * MR + n * LANES, sum[r][n]);
    if (top)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) top[n] = larger(sum[r][n], top[n]);
}

#define MATMUL_ARGS                                                                                \
    const real *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,     \
        bool accumulate, vec *top

INLINE void matmul_vecs(const int vecs, ptrdiff_t rows, MATMUL_ARGS) {
    for (; rows >= NR; rows -= NR) {
        if (a_step == 1) {
            /* Rows of K, one behind the other: the same rows of the next sub-block. */
            bool packed = a_row == steps;
            register_tile(NR, vecs, a, a_row, 1, steps, b, c, accumulate, top,
                          packed ? a + SUB_BLOCK_K * a_row : a, packed ? NR : 0);
        } else if (a_row == 1)
            register_tile(NR, vecs, a, 1, a_step, steps, b, c, accumulate, top,
                          a + SUB_BLOCK_K * a_step, a_step);
        else register_tile(NR, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0);
        a += NR * a_row;
        c += NR * MR;
    }
    switch (rows) {
#define ROWS(n)                                                                                    \
    case n: register_tile(n, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0); break;
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

/* The product above for any number of rows of the first `vecs` vectors of a micropanel. */
static void matmul(int vecs, ptrdiff_t rows, MATMUL_ARGS) {
    switch (vecs) {
    case 1: matmul_vecs(1, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
    case 2: matmul_vecs(2, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#if MR_VECS == 3
    case 3: matmul_vecs(3, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#endif
    }
}

static void load_queries(const Tile *t, ptrdiff_t first, real *columns) {
    load_columns(t->q, t->q_dim, t->q_format, t->head_dim, t->n_queries, t->q_scale, first,
                 columns);
}

#ifdef HAS_BACKWARD
/* Is each value of these keys finite? x * 0 is 0 for finite x only. */
static bool all_finite(View v, int keys, ptrdiff_t dims) {
    vec sums[4] = {{0}}; /* independent, or the latency of one sum would be the time of the loop */
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

/* The second product where some query must not meet a NaN or an Inf in some v that it does not
 * see: 0 * NaN is a NaN, so hidden keys are left out lane by lane. */
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

#ifndef BF16_TERMS
static View view(const char *at, ptrdiff_t row, ptrdiff_t dim) {
    return (View){(const real *)at, row / (ptrdiff_t)sizeof(real), dim / (ptrdiff_t)sizeof(real)};
}
static View keys_from(const Tile *t, const Scratch *s, ptrdiff_t key) {
    if (direct_keys(t)) return view(t->k + key * t->k_key, t->k_key, t->k_dim);
    return (View){s->keys + key % BLOCK_K * t->head_dim, t->head_dim, 1};
}
static View values_from(const Tile *t, const Scratch *s, ptrdiff_t key) {
    if (direct_values(t)) return view(t->v + key * t->v_key, t->v_key, t->v_dim);
    return (View){s->values + key % BLOCK_K * t->value_dim, t->value_dim, 1};
}

#define MICROPANELS (BLOCK_Q / MR)
#define ROW_MULTIPLE 1 /* keys that a product takes at once */
#define BEGIN_MATMULS()
#define END_MATMULS()
#define EXACT_QUERIES 0 /* must queries be multiplied as they are, unscaled? */

static void pack_queries(Tile *t, const Scratch *s, int p) {
    if (dims_in_lanes(t)) pack_decode_queries(t, s);
    for (int n = 0; n < t->micropanel[p].vecs && !dims_in_lanes(t); n++)
        load_queries(t, p * MR + n * LANES, s->q + p * MR * t->head_dim + n * LANES);
    if (t->score_function == ADDITIVE) pack_additive_queries(t, s, p);
}

static void pack_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    if (direct_keys(t) || decodes_in_place(t)) return;
    widen(t->k + begin * t->k_key, t->k_key, t->k_dim, t->k_format,
          t->k_scales ? t->k_scales + begin : NULL, (int)(end - begin), t->head_dim,
          s->keys + begin % BLOCK_K * t->head_dim);
    if (t->score_function == ADDITIVE) pack_additive_keys(t, s, begin % BLOCK_K, end - begin);
}

static void multiply_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub, vec *top) {
    if (t->score_function != DOT) {
        metric_scores(t, s, p, sub, keys_from(t, s, sub->key));
        take_max(t->micropanel[p].vecs, sub, top);
        return;
    }
    if (dims_in_lanes(t)) {
        WITH_FORMAT(decode_format(t->k_dim, t->k_format), decode_scores, t, s, sub);
        take_max(1, sub, top);
        return;
    }
    View k = keys_from(t, s, sub->key);
    const real *q = s->q + p * MR * t->head_dim;
    int vecs = t->micropanel[p].vecs;
    bool all = t->head_dim <= BLOCK_D;
    matmul(vecs, sub->keys, k.data, k.row, k.dim, all ? t->head_dim : BLOCK_D, q, sub->scores,
           false, all ? top : NULL);
    if (all) return;
    for (ptrdiff_t d = BLOCK_D; d < t->head_dim; d += BLOCK_D) {
        matmul(vecs, sub->keys, k.data + d * k.dim, k.row, k.dim, fewer(t->head_dim - d, BLOCK_D),
               q + d * MR, s->more, false, NULL);
        add_to_scores(vecs, sub, s->more);
    }
    take_max(vecs, sub, top);
}

static void pack_values(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    if (!direct_values(t) && !decodes_in_place(t))
        widen(t->v + begin * t->v_key, t->v_key, t->v_dim, t->v_format,
              t->v_scales ? t->v_scales + begin : NULL, (int)(end - begin), t->value_dim,
              s->values + begin % BLOCK_K * t->value_dim);
}

INLINE void weigh_vecs(const int vecs, const bool scaled, int keys, real *scores, vec exponent,
                       const vec *top, vec *sum) {
    vec shift[MR_VECS], total[MR_VECS];
#pragma GCC unroll 4
    for (int n = 0; n < vecs; n++) shift[n] = top[n], total[n] = sum[n];
    for (int j = 0; j < keys; j++) {
#pragma GCC unroll 4
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * MR + n * LANES;
            vec p =
                scaled ? weight_from(load(s), shift[n], exponent) : weight_of(load(s) - shift[n]);
            store(s, p);
            total[n] += p;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < vecs; n++) sum[n] = total[n];
}

/* Scores to weights, in place; their sum is added to `sum`. */
static void weigh(int vecs, double exponent, const SubBlock *sub, const vec *top, vec *sum) {
    vec factor = splat((real)exponent);
#define VECS(n)                                                                                    \
    if (vecs == n && exponent == 1)                                                                \
        weigh_vecs(n, false, sub->keys, sub->scores, factor, top, sum);                            \
    else if (vecs == n) weigh_vecs(n, true, sub->keys, sub->scores, factor, top, sum);
    VECS(1)
    VECS(2)
#if MR_VECS == 3
    VECS(3)
#endif
#undef VECS
}

static void decode_values(const Tile *t, const Scratch *s, BlockState *b, int sub_blocks,
                          real *out) {
    memset(s->decode_sums, 0,
           sizeof(real) * (size_t)(t->n_queries * round_up(t->value_dim, LANES)));
    for (int i = 0; i < sub_blocks; i++) {
        const SubBlock *sub = &b->sub_blocks[i];
        if (sub->visibility == EMPTY) continue;
        weigh(1, t->exponent, sub, b->top, b->sum);
        WITH_FORMAT(decode_format(t->v_dim, t->v_format), decode_add_values, t, s, sub);
    }
    transpose_decode_sums(t, s, out);
}

/* The micropanel's weights of a block, and the weighted sum of its values. */
static void sum_values(const Tile *t, const Scratch *s, int p, BlockState *b, int sub_blocks,
                       real *out) {
    if (dims_in_lanes(t)) {
        decode_values(t, s, b, sub_blocks, out);
        return;
    }
    bool accumulate = false;
    int vecs = t->micropanel[p].vecs;
    for (int i = 0; i < sub_blocks; i++) {
        const SubBlock *sub = &b->sub_blocks[i];
        if (sub->visibility == EMPTY) continue;
        View v = values_from(t, s, sub->key);
        weigh(vecs, t->exponent, sub, b->top, b->sum);
        if (sub->visibility == PARTIAL && !all_finite(v, sub->keys, t->value_dim)) {
            if (!accumulate) memset(out, 0, sizeof(real) * MR * (size_t)t->value_dim);
            masked_matmul(sub, vecs, v, t->value_dim, out);
        } else {
            matmul(vecs, t->value_dim, v.data, v.dim, v.row, sub->keys, sub->scores, out,
                   accumulate, NULL);
        }
        accumulate = true;
    }
}

/* Flops of `rounds` rounds of independent multiply-adds: what the machine can do at most. */
static double peak(ptrdiff_t rounds) {
    vec sum[NR][MR_VECS], factor = splat((real)0.5), term = splat((real)1);
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
        for (int n = 0; n < MR_VECS; n++) {
            sum[r][n] = splat(1);
            HIDE_VALUE(sum[r][n]); /* or equal ones would be computed once */
        }
    HIDE_VALUE(factor);
    HIDE_VALUE(term);
    for (ptrdiff_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int n = 0; n < MR_VECS; n++) sum[r][n] = sum[r][n] * factor + term;
    vec all = splat(0);
    for (int r = 0; r < NR; r++)
        for (int n = 0; n < MR_VECS; n++) all += sum[r][n];
    HIDE_VALUE(all);
    return 2.0 * (double)rounds * NR * MR_VECS * LANES;
}
#endif
#endif
