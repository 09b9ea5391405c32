/* Which keys are visible to each query: key ranges, masks and biases of -inf, as bits. */
#ifndef FASTATTN_MASKING_INL_H
#define FASTATTN_MASKING_INL_H

#include "bias-inl.h"

static uint64_t mask_bits(const char *mask, ptrdiff_t stride, int keys) {
    if (stride == 0) return mask[0] ? ~(uint64_t)0 : 0;
    if (stride == 1 && keys == 64) return nonzero_bytes(mask);
    uint64_t bits = 0;
    for (int j = 0; j < keys; j++) bits |= (uint64_t)(mask[j * stride] != 0) << j;
    return bits;
}

/* Where the relative bias of query i and a key is; those of the next queries follow. */
INLINE const real *relative_bias_at(const Tile *t, ptrdiff_t i, ptrdiff_t key) {
    ptrdiff_t before = t->position[i] - key, farthest = t->reach + MAX_LANES;
    before = before < -farthest ? -farthest : before > t->reach ? t->reach : before;
    return (const real *)t->relative_bias + (before + farthest) * t->group + t->column[i];
}

/* Is every relative bias of the micropanel and sub-block -inf? */
static bool hidden_by_relative_bias(const Tile *t, int p, const SubBlock *sub) {
    ptrdiff_t last = fewer(t->n_queries, (p + 1) * MR) - 1;
    /* Whole rows: at the ends of the table queries of all heads are on one. */
    const real *from = relative_bias_at(t, p * MR, sub->key + sub->keys - 1) - t->column[p * MR];
    const real *to = relative_bias_at(t, last, sub->key) + t->group - 1 - t->column[last];
    for (; from <= to; from++)
        if (*from != -INFINITY) return false;
    return true;
}

/* Which keys of a sub-block the key ranges and the mask show. */
static Visibility masked_visibility(const Tile *t, int p, const SubBlock *sub) {
    ptrdiff_t first = p * MR, key = sub->key;
    bool inner =
        t->micropanel[p].inner_first <= key && key + sub->keys <= t->micropanel[p].inner_last;
    if (inner && !t->has_mask) return FULL;
    uint64_t every = first_bits(sub->keys), any = 0, all = every, bits = 0, masked = every;
    for (int i = 0; i < MR; i++) {
        ptrdiff_t row = first + i;
        if (row < t->n_queries) { /* lanes without a query repeat the last one */
            if (t->has_mask) {
                if (i == 0 || t->mask[row] != t->mask[row - 1])
                    masked = mask_bits(t->mask[row] + key * t->mask_key, t->mask_key, sub->keys);
                __builtin_prefetch(t->mask[row] + (key + 2 * SUB_BLOCK_K) * t->mask_key, 0, 2);
            }
            bits = masked & every;
            if (!inner) bits &= first_bits(t->stop[row] - key) & ~first_bits(t->start[row] - key);
            any |= bits;
            all &= bits;
        }
        set_mask_words(sub->mask_words, i, bits);
    }
    return any == 0 ? EMPTY : all == every ? FULL : PARTIAL;
}

/* The visibility of a sub-block, whose biases are loaded. Relative biases of -inf count only if all
 * are; add_any_relative_bias masks the others. */
static Visibility classify(const Tile *t, const Scratch *s, int p, SubBlock *sub) {
    Visibility visibility = masked_visibility(t, p, sub);
    if (visibility == EMPTY) return EMPTY;
    if (t->hiding_relative_bias && hidden_by_relative_bias(t, p, sub)) return EMPTY;
    return t->has_bias ? hide_by_bias(t, s, p, sub, visibility) : visibility;
}

/* Is key j visible to each query of vector n? In the sign bits, for `choose`. */
INLINE ivec visible_lanes(const SubBlock *sub, int n, int j) {
    if (sub->visibility == FULL) return splat_int(-1);
    ivec word = *(const ivec *)(sub->mask_words + j / LANE_BITS * MR + n * LANES);
    return shift_up(word, LANE_BITS - 1 - j % LANE_BITS);
}

/* Set the scores of hidden keys to -inf, and take the maximum of the others. */
static void apply_mask(int vecs, const SubBlock *sub, vec *top) {
    for (int n = 0; n < vecs; n++) {
        vec most = splat(-INFINITY);
        for (int w = 0; w * LANE_BITS < sub->keys; w++) {
            int count = fewer(sub->keys - w * LANE_BITS, LANE_BITS);
            ivec word = *(const ivec *)(sub->mask_words + w * MR + n * LANES);
            word = shift_up(word, LANE_BITS - count);
            for (int j = w * LANE_BITS + count - 1; j >= w * LANE_BITS; j--) {
                real *s = sub->scores + j * MR + n * LANES;
                vec x = choose(word, load(s), splat(-INFINITY));
                store(s, x);
                most = larger(x, most);
                word = shift_up(word, 1); /* the next lower key in the sign bit */
            }
        }
        top[n] = most;
    }
}
#endif
