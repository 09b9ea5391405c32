/* The second pass over the scores, once row_max and row_sum are known: weights, or their sums over
 * bins of queries x keys. */
#ifndef FASTATTN_WEIGHT_MAP_INL_H
#define FASTATTN_WEIGHT_MAP_INL_H

#include <string.h>

#include "block-inl.h"
#include "matmul.h"
#include "range-inl.h"
#include "score_options-inl.h"

/* Turn scores into normalized weights, in place. */
static void normalize_weights(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t lane = p * MR + n * LANES;
        Softmax row = softmax_of(load(s->row_max + lane), load(s->row_sum + lane));
        ivec own = delivered(t, p, n);
        for (int j = 0; j < sub->keys; j++) {
            real *score = sub->scores + j * MR + n * LANES;
            vec weight = weight_from(load(score), row.top, exponent) * row.inv_sum;
            store(score, choose(visible_lanes(sub, n, j) & own, weight, splat(0)));
        }
    }
}

static void store_weights(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    normalize_weights(t, s, p, sub);
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++)
        for (int j = 0, keys = delivers(t, p * MR + i) ? sub->keys : 0; j < keys; j++)
            write_number(t->weights[p * MR + i] + (sub->key + j) * t->weights_key, t->out_format,
                         sub->scores[j * MR + i]);
}

/* Compute the scores of the keys [begin, end) again, and pass each sub-block to `use`. */
static void each_sub_block(Tile *t, ptrdiff_t begin, ptrdiff_t end,
                           void (*use)(const Tile *, const Scratch *, int, const SubBlock *)) {
    Scratch s = scratch_of(t);
    begin_matmuls();
    *s.packed = (PackedSubBlocks){.end = end};
    for (int p = 0; p < t->micropanels; p++) {
        BlockState b;
        int sub_blocks = begin_block(t, &s, p, begin, end, &b);
        for (int i = 0; i < sub_blocks; i++)
            if (score(t, &s, p, &b.sub_blocks[i], b.top)) use(t, &s, p, &b.sub_blocks[i]);
    }
    end_matmuls();
}

static void weights(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    each_sub_block(t, begin, end, store_weights);
}

/* Sum the weights of each column of bins, in place. Returns the number of columns. */
static int sum_columns(const Tile *t, int vecs, const SubBlock *sub, ptrdiff_t first) {
    if (t->columns == t->n_keys) return sub->keys;
    int columns = 0;
    for (int j = 0, end; j < sub->keys; j = end, columns++) {
        end = fewer((first + columns + 1) * t->n_keys / t->columns - sub->key, sub->keys);
        for (int n = 0; n < vecs; n++) {
            vec sum = load(sub->scores + j * MR + n * LANES);
            for (int i = j + 1; i < end; i++) sum += load(sub->scores + i * MR + n * LANES);
            store(sub->scores + columns * MR + n * LANES, sum);
        }
    }
    return columns;
}

/* Add columns of sums to the bins. Vectors whose lanes have the same slots are added first, then
 * neighbouring lanes, as rows of the transpose. */
static void add_to_bins(const Tile *t, int p, const SubBlock *sub, ptrdiff_t first, int columns) {
    int vecs = t->micropanel[p].vecs;
    for (int n = 0, next; n < vecs; n = next) {
        const int *slot = t->slot + p * MR + n * LANES;
        for (next = n + 1; next < vecs; next++)
            if (memcmp(slot, slot + (next - n) * LANES, sizeof *slot * LANES) != 0) break;
        for (int column = 0; column < columns; column += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) {
                x[i] = splat(0);
                for (int m = n; m < next && column + i < columns; m++)
                    x[i] += load(sub->scores + (column + i) * MR + m * LANES);
            }
            transpose(x);
            for (int i = 0, after; i < LANES && slot[i] >= 0; i = after) {
                double *to = t->bins + slot[i] * t->bin_row + first + column;
                real sums[LANES];
                for (after = i + 1; after < LANES && slot[after] == slot[i]; after++)
                    x[i] += x[after];
                store_unaligned(sums, x[i]);
                for (int l = 0; l < LANES; l++) to[l] += sums[l];
            }
        }
    }
}

static void accumulate_bins_of_sub_block(const Tile *t, const Scratch *s, int p,
                                         const SubBlock *sub) {
    ptrdiff_t first = bin_of(sub->key, t->n_keys, t->columns);
    normalize_weights(t, s, p, sub);
    add_to_bins(t, p, sub, first, sum_columns(t, t->micropanel[p].vecs, sub, first));
}

static void accumulate_bins(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    each_sub_block(t, begin, end, accumulate_bins_of_sub_block);
}
#endif
