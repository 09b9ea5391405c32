/* The online softmax of the bfloat16 engine. A row's maximum is raised only by a score far above
 * it, so only the scores of one sub-block are kept, in the first-level cache, and the values of
 * several sub-blocks are summed by one matmul, as late as possible. flash-attention's kernels for
 * Blackwell delay the rescaling in the same way. */
#ifndef FASTATTN_ONLINE_SOFTMAX_BF16_INL_H
#define FASTATTN_ONLINE_SOFTMAX_BF16_INL_H

#include "block-inl.h"
#include "matmul_bf16-inl.h"
#include "top_k-inl.h"

typedef struct {
    ivec lanes[MR_VECS]; /* whose maximum must be raised */
    bool any;
} MaxUpdate;

static MaxUpdate find_max_update(const Tile *t, int vecs, const vec *top, const real *row_max) {
    MaxUpdate update = {.any = false};
    for (int n = 0; n < vecs; n++) {
        vec above = (top[n] + (real)t->margin - load(row_max + n * LANES)) * (real)t->exponent;
        update.lanes[n] = above > splat(t->margin > 0 ? 0 : RESCALE_THRESHOLD);
        update.any |= any_lane(update.lanes[n]);
    }
    return update;
}

/* Raise the maximum of some lanes and rescale their sums; the others stay bit for bit. */
static void rescale_lanes(const Tile *t, int vecs, const MaxUpdate *update, const vec *top,
                          BlockState *b, real *row_max, real *sums) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < vecs; n++) {
        vec before = load(row_max + n * LANES);
        vec now = choose(update->lanes[n], top[n] + (real)t->margin, before);
        vec factor = weight_from(before, now, exponent) * (real)(1 / WEIGHT_UNIT);
        factor = choose(update->lanes[n], factor, splat(1));
        store(row_max + n * LANES, now);
        b->top[n] = choose(now == splat(-INFINITY), splat(0), now);
        b->sum[n] *= factor;
        b->rescale[n] *= factor;
        for (ptrdiff_t d = 0; sums && d < t->value_dim; d++) {
            real *sum = sums + d * MR + n * LANES;
            store(sum, load(sum) * factor);
        }
    }
}

static void bf16_attend_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end) {
    BlockState b;
    int vecs = t->micropanel[p].vecs,
        first = 0; /* of the sub-blocks whose values have not been summed */
    real *row_max = s->row_max + p * MR, *out = s->out + p * MR * s->out_rows;
    real *block_out = t->micropanel[p].has_output ? s->block_out : out;
    bool accumulate = false;
    int sub_blocks = begin_block(t, s, p, begin, end, &b);
    for (int n = 0; n < vecs; n++) {
        vec top = load(row_max + n * LANES);
        b.top[n] = choose(top == splat(-INFINITY), splat(0), top);
        b.rescale[n] = splat(1);
    }
    for (int i = 0; i < sub_blocks; i++) {
        SubBlock *sub = &b.sub_blocks[i];
        vec top[MR_VECS];
        for (int n = 0; n < vecs; n++) top[n] = splat(-INFINITY);
        if (!score(t, s, p, sub, top)) continue;
        b.any_visible = true;
        if (t->top_k > 0) collect_sub_block_max(t, p, sub);
        MaxUpdate update = find_max_update(t, vecs, top, row_max);
        if (update.any) {
            sum_sub_blocks(t, s, p, &b, first, i, block_out, &accumulate);
            rescale_lanes(t, vecs, &update, top, &b, row_max, accumulate ? block_out : NULL);
            first = i;
        }
        for (int n = 0; n < vecs; n++) record_nan(s, p, n, sub, 1, update.lanes[n], b.sum[n]);
        if (t->value_dim == 0) {
            sum_weights(t, p, &b, sub);
            continue;
        }
        weigh(vecs, t->exponent, sub, b.top, b.sum, weights_of(s, sub), WEIGHT_TERM);
        if (t->has_dropout) drop_weights(t, s, p, sub);
        ensure_packed(t, s, sub->key, &s->packed->values, s->engine->pack_values);
        if (bits_of(s->special_values, sub)) {
            sum_sub_blocks(t, s, p, &b, first, i + 1, block_out, &accumulate);
            add_special_values(t, s, p, &b, sub, block_out);
            first = i + 1;
        }
    }
    if (!b.any_visible) return;
    sum_sub_blocks(t, s, p, &b, first, sub_blocks, block_out, &accumulate);
    combine_block(&b, vecs, t->value_dim, s->row_sum + p * MR, block_out, out);
    t->micropanel[p].has_output = 1;
}

static const MatmulEngine BF16_ENGINE = {
    .exact_queries = BF16_TERMS < 3,
    .pack_queries = bf16_pack_queries,
    .pack_keys = bf16_pack_keys,
    .pack_values = bf16_pack_values,
    .multiply_keys = bf16_multiply_keys,
    .attend_block = bf16_attend_block,
};

static const MatmulEngine *choose_engine(const Tile *t) {
    (void)t;
    return &BF16_ENGINE;
}
#endif
