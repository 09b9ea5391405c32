/* A block of keys for a micropanel: the steps that all engines share. */
#ifndef FASTATTN_BLOCK_INL_H
#define FASTATTN_BLOCK_INL_H

#include "masking-inl.h"
#include "matmul.h"
#include "range-inl.h"
#include "score_options-inl.h"

/* Pack the whole sub-block of a key, unless its bit of `packed` says that it is. */
static void ensure_packed(const Tile *t, const Scratch *s, ptrdiff_t key, uint64_t *packed,
                          void (*pack)(const Tile *, const Scratch *, ptrdiff_t, ptrdiff_t)) {
    ptrdiff_t begin = key / SUB_BLOCK_K * SUB_BLOCK_K, end = begin + SUB_BLOCK_K;
    uint64_t bit = (uint64_t)1 << begin % BLOCK_K / SUB_BLOCK_K;
    if (!(*packed & bit)) pack(t, s, begin, end < s->packed->end ? end : s->packed->end);
    *packed |= bit;
}

/* The scores of a sub-block, -inf where hidden; `top` is raised to their maximum. Returns whether
 * any key is visible. */
static bool score(const Tile *t, const Scratch *s, int p, SubBlock *sub, vec *top) {
    int vecs = t->micropanel[p].vecs;
    sub->visibility = sub->keys > 0 ? classify(t, s, p, sub) : EMPTY;
    if (sub->visibility == EMPTY) return false;

    vec sub_top[MR_VECS];
    for (int n = 0; n < vecs; n++) sub_top[n] = splat(-INFINITY);
    ensure_packed(t, s, sub->key, &s->packed->keys, s->engine->pack_keys);
    s->engine->multiply_keys(t, s, p, sub, sub_top);
    if (t->has_scales) multiply_by_scales(t, p, sub, sub->scores, sub_top);
    finish_scores(t, s, p, sub, sub_top);
    if (t->check_range) clamp_scores(t, p, sub, sub_top);
    for (int n = 0; n < vecs; n++) {
        ivec *any_visible = (ivec *)(s->any_visible + p * MR + n * LANES);
        for (int w = 0; w < MASK_WORDS && sub->visibility == PARTIAL; w++)
            *any_visible |= *(const ivec *)(sub->mask_words + w * MR + n * LANES) != 0;
        if (sub->visibility == FULL) *any_visible = splat_int(-1);
        top[n] = larger(sub_top[n], top[n]);
        if (t->want_max) {
            real *most = s->max_score + p * MR + n * LANES;
            store(most, larger(sub_top[n], load(most)));
        }
    }
    return true;
}

/* Set up the sub-blocks of the keys [begin, end), each cut to the key ranges of the micropanel in
 * whole ROW_MULTIPLEs. Returns their number. */
static int begin_block(const Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end,
                       BlockState *b) {
    b->any_visible = false;
    for (int n = 0; n < MR_VECS; n++) b->top[n] = splat(-INFINITY), b->sum[n] = splat(0);
    for (int i = 0; begin + i * SUB_BLOCK_K < end; i++) {
        ptrdiff_t from = begin + i * SUB_BLOCK_K,
                  to = from + SUB_BLOCK_K < end ? from + SUB_BLOCK_K : end;
        if (from < t->micropanel[p].first)
            from = t->micropanel[p].first / ROW_MULTIPLE * ROW_MULTIPLE;
        if (to > t->micropanel[p].last) to = round_up(t->micropanel[p].last, ROW_MULTIPLE);
        if (to > end) to = end;
        b->sub_blocks[i] = (SubBlock){
            .key = from,
            .keys = to > from ? (int)(to - from) : 0,
            .scores = s->scores + (from - begin) % SCORE_KEYS * MR,
            .mask_words = s->visible + i * MASK_WORDS * MR,
            .visibility = EMPTY,
        };
    }
    return (int)((end - begin + SUB_BLOCK_K - 1) / SUB_BLOCK_K);
}

static void combine_block(const BlockState *b, int vecs, ptrdiff_t sums, real *row_sum,
                          const real *block_out, real *out) {
    for (int n = 0; n < vecs; n++) {
        real *sum = row_sum + n * LANES;
        store(sum, load(sum) * b->rescale[n] + b->sum[n]);
        if (block_out == out) continue; /* the first block */
        for (ptrdiff_t d = 0; d < sums; d++) {
            real *total = out + d * MR + n * LANES;
            store(total, load(total) * b->rescale[n] + load(block_out + d * MR + n * LANES));
        }
    }
}

/* Only the weights' sum, if there are no values. */
static void sum_weights(const Tile *t, int p, BlockState *b, const SubBlock *sub) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        vec top = b->top[n], even = b->sum[n], odd = splat(0);
        int j = 0;
        for (; j + 2 <= sub->keys; j += 2) {
            const real *scores = sub->scores + j * MR + n * LANES;
            even += weight_from(load(scores), top, exponent);
            odd += weight_from(load(scores + MR), top, exponent);
        }
        if (j < sub->keys)
            even += weight_from(load(sub->scores + j * MR + n * LANES), top, exponent);
        b->sum[n] = even + odd;
    }
}
#endif
