/* What becomes of weights that are not wanted one by one: their sums over bins of queries x keys,
 * for which the scores are made once more, as for weights().
 */
#ifndef FASTATTN_WEIGHT_MAP_INL_H
#define FASTATTN_WEIGHT_MAP_INL_H

/* The sums of each column's weights, in place. Returns the number of columns. */
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

/* Add columns of sums to the bins. Vectors whose lanes go to the same slots are added first, then
 * neighbours in a vector, as rows of the transpose. */
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
