/* The gradients under a sparse mask (Dao et al. 2022, "FlashAttention", algorithm 4): first those
 * of the queries, then of the keys, each from the pairs that it is in. */
#ifndef FASTATTN_SPARSE_BACKWARD_INL_H
#define FASTATTN_SPARSE_BACKWARD_INL_H

#include "sparse_forward-inl.h"

static double real_number(const char *at) { return *(const real *)at; }

/* What row i brings along; its gradient of the result is in own_v. */
static SparseRow prepare_row(Tile *t, const SparseHead *h, const SparseScratch *s,
                             const SparseLists *keys, ptrdiff_t i) {
    double lse = real_number(h->lse + i * h->lse_row);
    const double eps = sizeof(real) == 8 ? DBL_EPSILON : FLT_EPSILON;
    Gather result = {.data = h->result, .row = h->result_row, .dim = t->result_dim,
                     .dims = t->value_dim, .format = t->grad_out_format};
    SparseRow row = {.lse = lse};
    s->index[0] = i; /* summed as the products of grad_out and v are */
    compare(DOT, s, s->own_v, &result, 1, s->grads);
    row.mean = s->grads[0];
    if (!(h->coarse < fabs(lse) && fabs(lse) < INFINITY)) return row;
    RowSoftmax own = attend_row(t, h, s, keys, i, 0);
    double rest = log((double)own.sum / WEIGHT_UNIT), apart = fabs((own.top - lse) + rest);
    if (own.any && !own.nan && (apart <= 4 * eps * fabs(lse) || fabs(lse) > 1 / eps))
        row.lse = own.top, row.lse_rest = isinf(own.top) ? 0 : rest;
    return row;
}

/* What is subtracted from the gradients of a row's weights. */
static real delta_of(const SparseHead *h, ptrdiff_t i) {
    double grad_lse = h->grad_lse ? real_number(h->grad_lse + i * h->grad_lse_row) : 0;
    return (real)(h->rows[i].mean - grad_lse);
}

/* The weights of n pairs, and the gradients of their scores, in WEIGHT_UNITs. `v` are the values or
 * gradients of results that own_v is multiplied with. */
NOINLINE void differentiate_pairs(Tile *t, const SparseHead *h, const SparseScratch *s,
                                  const Pairs *x, const Gather *v, int n) {
    prefetch_listed(v, s, n);
    score_pairs(t, h, s, x, n);
    compare(DOT, s, s->own_v, v, n, s->grads);
    if (t->has_dropout) {
        draw_pairs(t, h, s, x, n);
        drop_pairs(s, n, s->grads);
    }
    real keep_factor = (real)t->keep_factor;
    for (int j = 0; j < n; j++) {
        ptrdiff_t i = query_of(x, s->index[j]);
        const SparseRow *row = h->rows + i;
        real lse = row->lse == -INFINITY ? 0 : (real)row->lse;
        s->scores[j] = (s->scores[j] - lse) - (real)row->lse_rest;
        s->grads[j] = s->grads[j] * keep_factor - delta_of(h, i);
    }
    for (int j = n; j < round_up(n, LANES); j++) s->grads[j] = 0;
    for (int j = 0; j < n; j += LANES) {
        vec weight = weight_of(load(s->scores + j) * splat((real)LOG2_E));
        store(s->weights + j, weight);
        store(s->grads + j, weight * load(s->grads + j));
    }
}

/* The derivative of the softcap. */
INLINE vec softcap_slope(const Tile *t, const SparseScratch *s, int j) {
    vec x = load(s->capped + j) * (real)(1 / t->softcap);
    return 1 - x * x;
}

/* From the gradients of scores to what the terms of the listed rows are multiplied by. */
static void differentiate_scores(const Tile *t, const SparseHead *h, const SparseScratch *s,
                                 int n) {
    for (int j = 0; j < n; j += LANES) {
        vec grad = load(s->grads + j) * (real)h->scale;
        if (t->softcap > 0) grad *= softcap_slope(t, s, j);
        if (t->score_function == SQUARED_DISTANCE) grad *= 2;
        if (t->score_function == DISTANCE) {
            vec distance = load(s->unscaled + j);
            grad = choose(distance == splat(0), splat(0), grad / distance);
        }
        store(s->grads + j, grad);
    }
}

static Term term_of(const Tile *t) {
    return t->score_function == DOT ? NUMBERS
           : t->score_function == ADDITIVE ? TANH_SLOPES
                                           : DIFFERENCES;
}

/* Add the terms of n pairs to the gradient of the vector in `own`. */
static void add_terms(const Tile *t, const SparseHead *h, const SparseScratch *s, const Pairs *x,
                      int n) {
    differentiate_scores(t, h, s, n);
    prefetch_next(&x->rows, x);
    weighted_sum(term_of(t), s, s->own, &x->rows, n, s->grads, s->sum);
    add_sum(t->head_dim, 1, s->sum, s->total);
}

/* The sum of the terms to the gradient of a vector. */
static void store_gradient(const Tile *t, const SparseScratch *s, char *to, NumberFormat format) {
    for (ptrdiff_t d = 0; d < t->head_dim && t->score_function == ADDITIVE; d += LANES)
        store(s->total + d, load(s->total + d) * load(s->dim_weights + d));
    store_row(s->total, (real)(1 / WEIGHT_UNIT), t->head_dim, to, format.bytes, format);
}

static void add_row_sums(const Tile *t, const SparseScratch *s, int n, double *sums) {
    for (int j = 0; j < n; j++) {
        double weight = s->weights[j] / WEIGHT_UNIT, grad = s->grads[j] / WEIGHT_UNIT;
        double distance = t->has_alibi ? s->distance[j] : 0, factor = s->unscaled[j];
        sums[0] += weight, sums[1] += grad;
        sums[2] += weight * distance, sums[3] += grad * distance;
        if (!t->wants_scale) continue;
        if (t->softcap > 0) factor *= softcap_slope(t, s, j / LANES * LANES)[j % LANES];
        sums[4] += weight * factor, sums[5] += grad * factor;
    }
}

/* Add the gradients of the scores of query i to those of what was added to them. */
static void add_to_options(const Tile *t, const SparseHead *h, const SparseScratch *s, ptrdiff_t i,
                           int n) {
    if (h->row_sums) add_row_sums(t, s, n, h->row_sums[i]);
    for (int j = 0; j < n && h->grad_bias; j++)
        *(real *)(h->grad_bias + i * h->grad_bias_row + s->index[j] * h->grad_bias_key) +=
            s->grads[j] * (real)(1 / WEIGHT_UNIT);
    for (int j = 0; j < n && t->wants_relative_bias; j++)
        t->grad_relative_bias[places_before(t, h, i, s->index[j]) + t->reach] +=
            s->grads[j] / WEIGHT_UNIT;
}

static void differentiate_queries(Tile *t, const SparseHead *h, const SparseLists *keys,
                                  ptrdiff_t begin, ptrdiff_t end) {
    SparseScratch s;
    const NumberFormat as_real_numbers = {'f', sizeof(real), 0};
    Gather q = queries_of(t, h), grad_outs = grad_outs_of(t, h), values = values_of(t, h);
    lay_out_sparse(t, t->scratch, &s);
    load_dim_weights(t, &s);
    for (ptrdiff_t i = begin; i < end; i++) {
        char *grad_q = h->out + i * h->out_row;
        if (i + PREFETCHED_ROWS < end) {
            prefetch_number_row(&q, i + PREFETCHED_ROWS);
            prefetch_number_row(&grad_outs, i + PREFETCHED_ROWS);
            prefetch_row(h->result + (i + PREFETCHED_ROWS) * h->result_row,
                         t->value_dim * t->result_dim, false);
            prefetch_row(grad_q + PREFETCHED_ROWS * h->out_row,
                         t->head_dim * (ptrdiff_t)sizeof(real), true);
        }
        load_row(&q, i, s.own);
        load_row(&grad_outs, i, s.own_v);
        h->rows[i] = prepare_row(t, h, &s, keys, i);
        memset(s.total, 0, sizeof(real) * (size_t)round_up(t->head_dim, LANES));
        Pairs pairs = pairs_of_query(t, h, keys, i);
        for (int n; (n = next_pairs(t, h, &s, &pairs)) > 0;) {
            differentiate_pairs(t, h, &s, &pairs, &values, n);
            add_to_options(t, h, &s, i, n);
            add_terms(t, h, &s, &pairs, n);
        }
        store_gradient(t, &s, grad_q, as_real_numbers);
    }
}

/* What the queries of one head add to the gradients of a key and its value. */
static void add_head(Tile *t, const SparseHead *h, const SparseScratch *s,
                     const SparseLists *queries, ptrdiff_t key) {
    Pairs pairs = pairs_of_key(t, h, queries, key);
    Gather grad_outs = grad_outs_of(t, h);
    for (int n; (n = next_pairs(t, h, s, &pairs)) > 0;) {
        differentiate_pairs(t, h, s, &pairs, &grad_outs, n);
        if (t->has_dropout) drop_pairs(s, n, s->weights);
        weighted_sum(NUMBERS, s, NULL, &grad_outs, n, s->weights, s->sum_v);
        add_sum(t->value_dim, 1, s->sum_v, s->total_v);
        add_terms(t, h, s, &pairs, n);
    }
}

static void differentiate_keys(Tile *t, const SparseHead *heads, ptrdiff_t group,
                               const SparseLists *queries, ptrdiff_t begin, ptrdiff_t end) {
    SparseScratch s;
    Gather keys = keys_of(t, heads), values = values_of(t, heads);
    real unit = (real)(t->keep_factor / WEIGHT_UNIT);
    lay_out_sparse(t, t->scratch, &s);
    load_dim_weights(t, &s);
    for (ptrdiff_t key = begin; key < end; key++) {
        char *grad_k = heads->grad_k + key * t->grad_k_key;
        char *grad_v = heads->grad_v + key * t->grad_v_key;
        if (key + PREFETCHED_ROWS < end) {
            prefetch_number_row(&keys, key + PREFETCHED_ROWS);
            prefetch_number_row(&values, key + PREFETCHED_ROWS);
            prefetch_row(grad_k + PREFETCHED_ROWS * t->grad_k_key,
                         t->head_dim * t->grad_k_format.bytes, true);
            prefetch_row(grad_v + PREFETCHED_ROWS * t->grad_v_key,
                         t->value_dim * t->grad_v_format.bytes, true);
        }
        load_row(&keys, key, s.own);
        load_row(&values, key, s.own_v);
        memset(s.total, 0, sizeof(real) * (size_t)round_up(t->head_dim, LANES));
        memset(s.total_v, 0, sizeof(real) * (size_t)round_up(t->value_dim, LANES));
        for (const SparseHead *h = heads; h < heads + group; h++) add_head(t, h, &s, queries, key);
        store_gradient(t, &s, grad_k, t->grad_k_format);
        store_row(s.total_v, unit, t->value_dim, grad_v, t->grad_v_format.bytes, t->grad_v_format);
    }
}
#endif
