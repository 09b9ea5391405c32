/* Forward mode: the online softmax, with the tangents of its results beside them.
 *
 * With S' the tangents of the scores, the sums of a query are O^T = V^T P^T, then
 * V^T (P * S')^T + V'^T P^T, then the row sum of P * S'. All are rescaled alike, and store_tangents
 * makes tangents of them. Options that hide keys or add constants to scores do not change S'. */
#ifndef FASTATTN_TANGENTS_INL_H
#define FASTATTN_TANGENTS_INL_H

#include "matmul_fma-inl.h"

static void push_queries(Tile *t, const Scratch *s, int p) {
    fma_pack_queries(t, s, p);
    for (int n = 0; n < t->micropanel[p].vecs && t->has_d_q; n++)
        load_columns(t->d_q, t->d_q_dim, t->d_q_format, t->head_dim, t->n_queries, t->q_scale,
                     p * MR + n * LANES, s->d_q + p * MR * t->head_dim + n * LANES);
}

/* The tangents of the keys or values [begin, end), widened unless they are of type `real`. */
static void widen_tangents(const char *at, ptrdiff_t row, ptrdiff_t dim, NumberFormat format,
                           ptrdiff_t begin, ptrdiff_t end, ptrdiff_t dims, real *block) {
    if (!is_real(format))
        widen(at + begin * row, row, dim, format, NULL, 0, (int)(end - begin), dims,
              block + begin % BLOCK_K * dims);
}
static void push_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    fma_pack_keys(t, s, begin, end);
    if (t->has_d_k)
        widen_tangents(t->d_k, t->d_k_key, t->d_k_dim, t->d_k_format, begin, end, t->head_dim,
                       s->d_keys);
}
static void push_values(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    fma_pack_values(t, s, begin, end);
    if (t->has_d_v)
        widen_tangents(t->d_v, t->d_v_key, t->d_v_dim, t->d_v_format, begin, end, t->value_dim,
                       s->d_values);
}

static View tangents_from(const char *at, ptrdiff_t row, ptrdiff_t dim, NumberFormat format,
                          ptrdiff_t key, ptrdiff_t dims, const real *block) {
    if (is_real(format)) return view(at + key * row, row, dim);
    return (View){block + key % BLOCK_K * dims, dims, 1};
}

/* The slopes of the softcap, at the scores of a sub-block. */
static void find_cap_slope(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    SubBlock raw = *sub;
    vec top[MR_VECS];
    raw.scores = s->cap_slope;
    multiply_dims(t, p, &raw, keys_from(t, s, sub->key), s->q, false, NULL);
    if (t->has_scales) multiply_by_scales(t, p, &raw, raw.scores, top);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *slope = raw.scores + j * MR + n * LANES;
            vec x = tanh_vec(load(slope) * (real)(t->score_scale / t->softcap));
            store(slope, 1 - x * x);
        }
}

/* Turn the products Q' K + Q K' of a sub-block into P * S', in place, and add these to `sums`. */
static void weigh_tangents(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                           real *products, real *sums, bool accumulate) {
    double unit = t->exponent == LOG2_E || t->softcap > 0 ? 1 : LN2; /* of q_scale */
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        vec factor = splat((real)unit), sum = splat(0);
        if (t->has_scales) factor *= load_scales(t, p * MR + n * LANES);
        for (int j = 0; j < sub->keys; j++) {
            ptrdiff_t at = j * MR + n * LANES;
            vec x = load(products + at) * factor;
            if (t->softcap > 0) x *= load(s->cap_slope + at);
            x *= load(sub->scores + at);
            if (sub->visibility == PARTIAL) x = choose(visible_lanes(sub, n, j), x, splat(0));
            store(products + at, x);
            sum += x;
        }
        real *to = sums + n * LANES;
        store(to, accumulate ? load(to) + sum : sum);
    }
}

/* Add one sub-block to the sums of a block. */
static void push_sub_block(const Tile *t, const Scratch *s, int p, BlockState *b,
                           const SubBlock *sub, real *out, bool accumulate) {
    SubBlock moved = *sub;
    View v = values_from(t, s, sub->key);
    real *d_out = out + t->value_dim * MR, *sums = d_out + t->value_dim * MR;
    moved.scores = s->d_scores;
    if (t->has_d_q)
        multiply_dims(t, p, &moved, keys_from(t, s, sub->key), s->d_q, false, NULL);
    if (t->has_d_k)
        multiply_dims(t, p, &moved,
                      tangents_from(t->d_k, t->d_k_key, t->d_k_dim, t->d_k_format, sub->key,
                                    t->head_dim, s->d_keys),
                      s->q, t->has_d_q, NULL);
    if (t->softcap > 0) find_cap_slope(t, s, p, sub);
    weigh(t->micropanel[p].vecs, t->exponent, sub, b->top, b->sum);
    if (t->has_d_q || t->has_d_k)
        weigh_tangents(t, s, p, sub, moved.scores, sums, accumulate);
    else if (!accumulate) memset(d_out, 0, sizeof(real) * MR * (size_t)(t->value_dim + 1));
    if (t->has_dropout) drop_weights(t, s, p, sub);
    sum_weighted(t, p, sub, v, out, accumulate);
    if (t->has_d_q || t->has_d_k) {
        if (t->has_dropout) drop(t, s, p, sub, moved.scores);
        sum_weighted(t, p, &moved, v, d_out, accumulate);
        accumulate = true;
    }
    if (t->has_d_v)
        sum_weighted(t, p, sub,
                     tangents_from(t->d_v, t->d_v_key, t->d_v_dim, t->d_v_format, sub->key,
                                   t->value_dim, s->d_values),
                     d_out, true);
}

static void push_sub_blocks(const Tile *t, const Scratch *s, int p, BlockState *b, int sub_blocks,
                            real *out) {
    bool accumulate = false;
    for (int i = 0; i < sub_blocks; i++) {
        if (b->sub_blocks[i].visibility == EMPTY) continue;
        push_sub_block(t, s, p, b, &b->sub_blocks[i], out, accumulate);
        accumulate = true;
    }
}

static void push_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end) {
    attend_whole_block(t, s, p, begin, end, push_sub_blocks);
}

static const MatmulEngine TANGENTS_ENGINE = {
    .pack_queries = push_queries,
    .pack_keys = push_keys,
    .pack_values = push_values,
    .multiply_keys = fma_multiply_keys,
    .attend_block = push_block,
};
#endif
