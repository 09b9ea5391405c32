/* The biases of a sub-block as columns of its scores, of whatever dtype and strides they are, and
 * which keys those of -inf hide. */
#ifndef FASTATTN_BIAS_INL_H
#define FASTATTN_BIAS_INL_H

#include "convert-inl.h"
#include "scratch-inl.h"

static uint64_t first_bits(ptrdiff_t n) {
    return n <= 0 ? 0 : n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
}

static void set_mask_words(lane_int *mask_words, int i, uint64_t bits) {
    for (int w = 0; w < MASK_WORDS; w++)
        mask_words[w * MR + i] = (lane_int)(bits >> (w * LANE_BITS % 64));
}

static const char *bias_row(const Tile *t, int p, int i, ptrdiff_t key) {
    ptrdiff_t row = p * MR + i < t->n_queries ? p * MR + i : t->n_queries - 1;
    return t->bias[row] + key * t->bias_key;
}

/* The biases of one query, as `real` numbers. */
static void widen_bias(const Tile *t, const char *row, int keys, real *to) {
    NumberFormat format = t->bias_format;
    int j = 0;
    if (t->bias_key == format.bytes && !format.swapped)
        for (; j + LANES <= keys; j += LANES)
            store_unaligned(to + j, load_numbers(row + j * t->bias_key, format));
    for (; j < keys; j++) {
        const char *at = row + j * t->bias_key;
        if (is_real(format)) memcpy(to + j, at, sizeof(real));
        else to[j] = as_real(read_number(at, format));
    }
}

/* s->bias, [keys][MR]. Queries that share a row of biases need no transpose. */
static void load_bias(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    const NumberFormat as_real_numbers = {'f', sizeof(real), 0};
    bool direct = is_real(t->bias_format) && t->bias_key == sizeof(real);
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        real widened[LANES][SUB_BLOCK_K], *columns = s->bias + n * LANES;
        const char *rows[LANES];
        bool shared = true;
        for (int i = 0; i < LANES; i++) {
            rows[i] = bias_row(t, p, n * LANES + i, sub->key);
            shared &= rows[i] == rows[0];
        }
        if (shared) {
            widen_bias(t, rows[0], sub->keys, widened[0]);
            for (int j = 0; j < sub->keys; j++) store(columns + j * MR, splat(widened[0][j]));
            continue;
        }
        for (int i = 0; i < LANES; i++) {
            const char *next = rows[i] + SUB_BLOCK_K * t->bias_key;
            for (ptrdiff_t at = 0; at <= SUB_BLOCK_K * t->bias_format.bytes; at += 64)
                __builtin_prefetch(next + at, 0, 2);
            if (direct) continue;
            widen_bias(t, rows[i], sub->keys, widened[i]);
            rows[i] = (const char *)widened[i];
        }
        load_columns_as(rows, sizeof(real), sub->keys, splat(1), columns, as_real_numbers);
    }
}

/* Load the biases of a sub-block, and hide the keys of those that are -inf. Returns the new
 * visibility. */
static Visibility hide_by_bias(const Tile *t, const Scratch *s, int p, SubBlock *sub,
                               Visibility before) {
    int vecs = t->micropanel[p].vecs;
    vec most = splat(0);
    load_bias(t, s, p, sub);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++)
            most = larger(magnitude(load(s->bias + j * MR + n * LANES)), most);
    sub->bias_in_range = !any_lane(~(most <= splat(REAL_MAX / 4)));
    if (!any_lane(most == splat(INFINITY))) return before;
    for (int i = 0; i < vecs * LANES && before == FULL; i++)
        set_mask_words(sub->mask_words, i, first_bits(sub->keys));
    ivec any_hidden = splat_int(0), any_visible = splat_int(0);
    for (int n = 0; n < vecs; n++)
        for (int w = 0; w * LANE_BITS < sub->keys; w++) {
            int count = fewer(sub->keys - w * LANE_BITS, LANE_BITS);
            ivec hidden = splat_int(0), *word = (ivec *)(sub->mask_words + w * MR + n * LANES);
            for (int j = count - 1; j >= 0; j--) {
                vec bias = load(s->bias + (w * LANE_BITS + j) * MR + n * LANES);
                hidden = shift_up(hidden, 1) - (bias == splat(-INFINITY)); /* a bit is -1 */
            }
            any_hidden |= *word & hidden;
            *word &= ~hidden;
            any_visible |= *word;
        }
    return !any_lane(any_hidden != 0) ? before : any_lane(any_visible != 0) ? PARTIAL : EMPTY;
}
#endif
