/* The engine of multiply-adds with queries in the lanes.
 *
 * Keys and values of type `real` are read where they are; others are widened to it, a sub-block at
 * a time.
 */
#ifndef FASTATTN_MATMUL_FMA_INL_H
#define FASTATTN_MATMUL_FMA_INL_H

#include "distances-inl.h"
#include "matmul.h"
#include "online_softmax_fma-inl.h"
#include "register_tile-inl.h"

static void begin_matmuls(void) {}
static void end_matmuls(void) {}

static View view(const char *at, ptrdiff_t row, ptrdiff_t dim) {
    return (View){(const real *)at, row / (ptrdiff_t)sizeof(real), dim / (ptrdiff_t)sizeof(real)};
}
static View keys_from(const Tile *t, const Scratch *s, ptrdiff_t key) {
    if (direct_keys(t)) return view(key_at(t, key), t->k_key, t->k_dim);
    return (View){s->keys + key % BLOCK_K * t->head_dim, t->head_dim, 1};
}
static View values_from(const Tile *t, const Scratch *s, ptrdiff_t key) {
    if (direct_values(t)) return view(value_at(t, key), t->v_key, t->v_dim);
    return (View){s->values + key % BLOCK_K * t->value_dim, t->value_dim, 1};
}

static void fma_pack_queries(Tile *t, const Scratch *s, int p) {
    for (int n = 0; n < t->micropanel[p].vecs; n++)
        load_queries(t, p * MR + n * LANES, s->q + p * MR * t->head_dim + n * LANES);
    if (t->score_function == ADDITIVE) pack_additive_queries(t, s, p);
}

static void fma_pack_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    if (direct_keys(t)) return;
    widen_keys(t, begin, end, s->keys + begin % BLOCK_K * t->head_dim);
    if (t->score_function == ADDITIVE) pack_additive_keys(t, s, begin % BLOCK_K, end - begin);
}

/* The products of keys and a micropanel of packed queries. */
static void multiply_dims(const Tile *t, int p, const SubBlock *sub, View k, const real *q,
                          bool accumulate, vec *top) {
    int vecs = t->micropanel[p].vecs;
    matmul(vecs, sub->keys, k.data, k.row, k.dim, t->head_dim, block_d(vecs, t->head_dim),
           q + p * MR * t->head_dim, sub->scores, accumulate, top);
}

static void fma_multiply_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                              vec *top) {
    View k = keys_from(t, s, sub->key);
    if (t->score_function == DOT) {
        multiply_dims(t, p, sub, k, s->q, false, top);
        return;
    }
    metric_scores(t, s, p, sub, k, metric_sub_block);
    take_max(t->micropanel[p].vecs, sub, top);
}

static void fma_pack_values(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    if (!direct_values(t))
        widen_values(t, begin, end, s->values + begin % BLOCK_K * t->value_dim);
}

/* out (+)= the values of a sub-block, weighted. */
static void sum_weighted(const Tile *t, int p, const SubBlock *sub, View v, real *out,
                         bool accumulate) {
    int vecs = t->micropanel[p].vecs;
    if (sub->visibility == PARTIAL && !all_finite(v, sub->keys, t->value_dim)) {
        if (!accumulate) memset(out, 0, sizeof(real) * MR * (size_t)t->value_dim);
        masked_matmul(sub, vecs, v, t->value_dim, out);
    } else {
        matmul(vecs, t->value_dim, v.data, v.dim, v.row, sub->keys, sub->keys, sub->scores, out,
               accumulate, NULL);
    }
}

static void fma_sum_values(const Tile *t, const Scratch *s, int p, BlockState *b, int sub_blocks,
                           real *out) {
    bool accumulate = false;
    int vecs = t->micropanel[p].vecs;
    for (int i = 0; i < sub_blocks; i++) {
        const SubBlock *sub = &b->sub_blocks[i];
        if (sub->visibility == EMPTY) continue;
        weigh(vecs, t->exponent, sub, b->top, b->sum);
        if (t->has_dropout) drop_weights(t, s, p, sub);
        sum_weighted(t, p, sub, values_from(t, s, sub->key), out, accumulate);
        accumulate = true;
    }
}

static void fma_attend_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end) {
    attend_whole_block(t, s, p, begin, end, fma_sum_values);
}

static const MatmulEngine FMA_ENGINE = {
    .pack_queries = fma_pack_queries,
    .pack_keys = fma_pack_keys,
    .pack_values = fma_pack_values,
    .multiply_keys = fma_multiply_keys,
    .attend_block = fma_attend_block,
};

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
