/* The forward pass under a sparse mask: an online softmax over the lists of a query (Milakov and
 * Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3). */
#ifndef FASTATTN_SPARSE_FORWARD_INL_H
#define FASTATTN_SPARSE_FORWARD_INL_H

#include "sparse_scores-inl.h"

/* The softmax of a row: weights are exp(score - top) / sum, where `top` may be the sink. */
typedef struct {
    real top, sum, max_score;
    bool any, nan;
} RowSoftmax;

static real shift_of(RowSoftmax row) {
    return row.nan ? (real)NAN : row.top == -INFINITY ? 0 : row.top;
}

static real max_of_lanes(vec x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2) x = larger(zip_low(x, x), zip_high(x, x));
    return x[0];
}

/* Take the scores of a list into the maximum of its row. */
static void raise_top(const SparseScratch *s, int n, RowSoftmax *row) {
    vec most = splat(-INFINITY);
    ivec nan = splat_int(0);
    for (int j = 0; j < n; j += LANES) {
        vec score = load(s->scores + j);
        most = larger(score, most);
        nan |= score != score;
    }
    real own = max_of_lanes(most);
    row->any = true;
    row->nan |= any_lane(nan);
    if (own > row->max_score) row->max_score = own;
    if (own > row->top) row->top = own;
}

/* Weights of the listed scores relative to `shift`, in WEIGHT_UNITs; returns their sum. */
NOINLINE real weigh_list(const SparseScratch *s, int n, real shift) {
    vec sum = splat(0);
    for (int j = 0; j < n; j += LANES) {
        vec weight = weight_of((load(s->scores + j) - splat(shift)) * splat((real)LOG2_E));
        if (n - j < LANES)
            for (int l = n - j; l < LANES; l++) weight[l] = 0; /* or NaN, beside one */
        store(s->weights + j, weight);
        sum += weight;
    }
    return sum_of_lanes(sum);
}

/* The softmax of row i, whose query is in `own`; total_v becomes the weighted sum of values. */
NOINLINE RowSoftmax attend_row(Tile *t, const SparseHead *h, const SparseScratch *s,
                               const SparseLists *keys, ptrdiff_t i, ptrdiff_t value_dim) {
    Pairs pairs = pairs_of_query(t, h, keys, i);
    RowSoftmax row = {.top = t->has_sinks ? as_real(h->sink) : -INFINITY, .max_score = -INFINITY};
    row.sum = row.top == -INFINITY ? 0 : (real)WEIGHT_UNIT;
    Gather v = values_of(t, h);
    v.dims = value_dim;
    memset(s->total_v, 0, sizeof(real) * (size_t)round_up(value_dim, LANES));
    for (int n; (n = next_pairs(t, h, s, &pairs)) > 0;) {
        real before = row.top;
        prefetch_listed(&v, s, n);
        score_pairs(t, h, s, &pairs, n);
        raise_top(s, n, &row);
        real factor = before == row.top ? 1 : before == -INFINITY ? 0 : (real)exp(before - row.top);
        row.sum = row.sum * factor + weigh_list(s, n, shift_of(row));
        if (value_dim == 0) continue;
        if (t->has_dropout) {
            draw_pairs(t, h, s, &pairs, n);
            drop_pairs(s, n, s->weights);
        }
        prefetch_next(&pairs.rows, &pairs);
        weighted_sum(NUMBERS, s, NULL, &v, n, s->weights, s->sum_v);
        add_sum(value_dim, factor, s->sum_v, s->total_v);
    }
    return row;
}

/* Are all values of dim d that row i sees finite? */
static bool finite_values(const Tile *t, const SparseHead *h, const SparseScratch *s,
                          const SparseLists *keys, ptrdiff_t i, ptrdiff_t d) {
    Pairs pairs = pairs_of_query(t, h, keys, i);
    Gather v = values_of(t, h);
    for (int n; (n = next_pairs(t, h, s, &pairs)) > 0;)
        for (int j = 0; j < n; j++)
            if (!isfinite(number_at(&v, s->index[j], d))) return false;
    return true;
}

/* Once the sums of a row are known: its weights, where wanted, and its result in doubles. */
NOINLINE void attend_row_again(Tile *t, const SparseHead *h, const SparseScratch *s,
                               const SparseLists *keys, ptrdiff_t i, RowSoftmax row) {
    Pairs pairs = pairs_of_query(t, h, keys, i);
    Gather v = values_of(t, h);
    double sum = row.top == INFINITY ? WEIGHT_UNIT : row.sum;
    for (ptrdiff_t d = 0; d < t->value_dim; d++) s->exact[d] = 0;
    for (int n; (n = next_pairs(t, h, s, &pairs)) > 0;) {
        score_pairs(t, h, s, &pairs, n);
        weigh_list(s, n, shift_of(row));
        if (t->has_dropout) draw_pairs(t, h, s, &pairs, n);
        for (int j = 0; j < n; j++) {
            ptrdiff_t key = s->index[j];
            double weight = (real)(s->weights[j] / sum);
            if (h->weights)
                write_number(h->weights + i * h->weights_row + key * t->weights_key, t->out_format,
                             (real)weight);
            if (h->bins)
                h->bins[bin_of(i, h->n_queries, h->bin_rows) * h->bin_columns +
                        bin_of(key, h->n_keys, h->bin_columns)] += weight;
            weight = t->has_dropout && !s->kept[j] ? 0 : weight * t->keep_factor;
            for (ptrdiff_t d = 0; d < t->value_dim; d++)
                s->exact[d] += weight * number_at(&v, key, d);
        }
    }
    /* A mean of the largest numbers that was rounded up is finite still. */
    for (ptrdiff_t d = 0; d < t->value_dim; d++)
        if (isinf(s->exact[d]) && finite_values(t, h, s, keys, i, d))
            s->exact[d] = clamp_finite(s->exact[d], true);
}

static void store_softmax(const SparseHead *h, ptrdiff_t i, RowSoftmax row) {
    bool finite = row.top != -INFINITY && row.top != INFINITY;
    double rest = finite ? log((double)row.sum / WEIGHT_UNIT) : 0;
    if (h->lse) *(real *)(h->lse + i * h->lse_row) = row.nan ? (real)NAN : (real)(row.top + rest);
    if (h->max_score)
        *(real *)(h->max_score + i * h->max_score_row) = row.nan ? (real)NAN : row.max_score;
}

static bool row_is_finite(const real *x, ptrdiff_t dims) {
    vec wrong = splat(0);
    for (ptrdiff_t d = 0; d < dims; d += LANES) wrong += load(x + d) * 0;
    return !any_lane(wrong != splat(0));
}

static void load_dim_weights(const Tile *t, const SparseScratch *s) {
    if (t->score_function != ADDITIVE) return;
    for (ptrdiff_t d = 0; d < round_up(t->head_dim, LANES); d++)
        s->dim_weights[d] = d < t->head_dim ? (real)t->dim_weights[d] : 0;
}

static void sparse_attend(Tile *t, const SparseHead *h, const SparseLists *keys, ptrdiff_t begin,
                          ptrdiff_t end) {
    SparseScratch s;
    lay_out_sparse(t, t->scratch, &s);
    load_dim_weights(t, &s);
    Gather q = queries_of(t, h);
    for (ptrdiff_t i = begin; i < end; i++) {
        char *out = h->out + i * h->out_row;
        if (i + PREFETCHED_ROWS < end) {
            prefetch_number_row(&q, i + PREFETCHED_ROWS);
            prefetch_row(out + PREFETCHED_ROWS * h->out_row, t->value_dim * t->out_dim, true);
        }
        load_row(&q, i, s.own);
        RowSoftmax row = attend_row(t, h, &s, keys, i, t->value_dim);
        real share = row.any ? (real)t->keep_factor / row.sum : 0;
        bool lost = !row_is_finite(s.total_v, t->value_dim) || !isfinite(share);
        if (row.any && (lost || h->weights || h->bins)) attend_row_again(t, h, &s, keys, i, row);
        if (row.any && lost)
            for (ptrdiff_t d = 0; d < t->value_dim; d++)
                write_number(out + d * t->out_dim, t->out_format, as_real(s.exact[d]));
        else store_row(s.total_v, share, t->value_dim, out, t->out_dim, t->out_format);
        store_softmax(h, i, row);
    }
}
#endif
