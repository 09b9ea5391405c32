/* The online softmax of the multiply-add engines: the scores of a whole block, its maximum, its
 * weights, then the sum of its values, as in FlashAttention (Dao et al. 2022, algorithm 1). */
#ifndef FASTATTN_ONLINE_SOFTMAX_FMA_INL_H
#define FASTATTN_ONLINE_SOFTMAX_FMA_INL_H

#include "block-inl.h"
#include "dropout-inl.h"
#include "top_k-inl.h"

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

/* Turn scores into weights, in place, and add these to `sum`. */
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

static void drop_weights(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    draw_kept(t, s, p, sub);
    drop(t, s, p, sub, sub->scores);
}

static void update_row_max(const Tile *t, int vecs, BlockState *b, real *row_max) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < vecs; n++) {
        vec before = load(row_max + n * LANES);
        vec now = larger(before, b->top[n] + (real)t->margin);
        store(row_max + n * LANES, now);
        /* Until a row has a visible key its maximum is -inf; subtract 0 instead. */
        b->top[n] = choose(now == splat(-INFINITY), splat(0), now);
        /* An unchanged maximum may be an infinite sink. */
        vec factor = weight_from(before, b->top[n], exponent) * (real)(1 / WEIGHT_UNIT);
        b->rescale[n] = choose(before == now, splat(1), factor);
    }
}

/* Turn the scores of a block into weights, and sum its values with them. */
typedef void SumValues(const Tile *, const Scratch *, int p, BlockState *, int sub_blocks,
                       real *out);

/* MatmulEngine.attend_block with the maximum of the whole block. */
static void attend_whole_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end,
                               SumValues *sum_values) {
    BlockState b;
    int sub_blocks = begin_block(t, s, p, begin, end, &b);
    for (int i = 0; i < sub_blocks; i++) b.any_visible |= score(t, s, p, &b.sub_blocks[i], b.top);
    if (!b.any_visible) return;
    real *out = s->out + p * MR * s->out_rows;
    real *block_out = t->micropanel[p].has_output ? s->block_out : out;
    update_row_max(t, t->micropanel[p].vecs, &b, s->row_max + p * MR);
    for (int n = 0; n < t->micropanel[p].vecs; n++)
        record_nan(s, p, n, b.sub_blocks, sub_blocks, b.rescale[n] != 1, splat(0));
    for (int i = 0; i < sub_blocks; i++) {
        if (b.sub_blocks[i].visibility == EMPTY) continue;
        if (t->top_k > 0) collect_sub_block_max(t, p, &b.sub_blocks[i]);
        if (s->sums > 0)
            ensure_packed(t, s, b.sub_blocks[i].key, &s->packed->values, s->engine->pack_values);
        else sum_weights(t, p, &b, &b.sub_blocks[i]);
    }
    if (s->sums > 0) sum_values(t, s, p, &b, sub_blocks, block_out);
    combine_block(&b, t->micropanel[p].vecs, s->sums, s->row_sum + p * MR, block_out, out);
    t->micropanel[p].has_output = 1;
}
#endif
