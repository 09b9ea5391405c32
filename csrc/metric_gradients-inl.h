/* The gradients of metrics: what each pair of a query and a key adds to both, dim by dim.
 *
 * With queries in the lanes, as in backward_fma-inl.h. The sums over the keys of a sub-block are
 * vectors; those over the queries of a vector are made together for LANES keys. A pair that is
 * hidden adds nothing, whatever its query and key hold. */
#ifndef FASTATTN_METRIC_GRADIENTS_INL_H
#define FASTATTN_METRIC_GRADIENTS_INL_H

#include "backward_fma-inl.h" /* which includes this file behind its scratch */

/* From the gradients of a sub-block's scores to those of squared distances, halved. */
static void differentiate_distances(const Tile *t, const BackwardScratch *g, int p,
                                    const SubBlock *sub) {
    vec unit = splat((real)t->metric_scale);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *grad = g->grad_scores + j * MR + n * LANES;
            if (t->score_function == DISTANCE) {
                vec distance = load(g->unscaled + j * MR + n * LANES) / unit;
                store(grad, choose(distance == splat(0), splat(0), load(grad) / distance));
            } else store(grad, load(grad) * 2);
        }
}

/* All bits where a key of the sub-block is visible to a query of vector n, else none. */
static void find_pairs(const Tile *t, int p, const SubBlock *sub, int n, ivec *pairs) {
    ivec query;
    for (int l = 0; l < LANES; l++) query[l] = -(p * MR + n * LANES + l < t->n_queries);
    for (int j = 0; j < sub->keys; j++)
        pairs[j] = query & (visible_lanes(sub, n, j) < splat_int(0));
}

INLINE vec of_pairs(vec x, ivec pairs) { return (vec)((ivec)x & pairs); }

/* The sum over some keys and one vector of queries of dim d, whose numbers are `q`; of_keys[j] is
 * that of one key. The slopes of additive scores are yet to be multiplied by the weight of the dim;
 * their tanh is summed in `weighted`. */
INLINE vec sum_terms(const bool additive, vec q, const real *k, ptrdiff_t row, int keys,
                     const real *grads, const ivec *pairs, vec of_keys[LANES], vec *weighted) {
    vec sum = splat(0);
    for (int j = 0; j < keys; j++) {
        vec grad = load(grads + j * MR), key = splat(k[j * row]), term;
        if (additive) {
            vec tanh = tanh_vec(q + key);
            *weighted += of_pairs(grad * tanh, pairs[j]);
            term = of_pairs(grad * (1 - tanh * tanh), pairs[j]);
        } else term = of_pairs(grad * (q - key), pairs[j]);
        sum += term;
        of_keys[j] = term;
    }
    for (int j = keys; j < LANES; j++) of_keys[j] = splat(0);
    return sum;
}

/* Add the terms of a sub-block and vector n of a micropanel. */
INLINE void add_metric_terms(const bool additive, const Tile *t, const BackwardScratch *g, int p,
                             const SubBlock *sub, View k, int n) {
    ivec pairs[SUB_BLOCK_K];
    ptrdiff_t width = dim_vecs(t->head_dim) * LANES;
    find_pairs(t, p, sub, n, pairs);
    for (ptrdiff_t d = 0; d < t->head_dim; d++) {
        vec q = load(g->q_columns + (p * t->head_dim + d) * MR + n * LANES);
        vec sum = splat(0), weighted = splat(0), weight = splat(1), sign = splat(-1);
        if (additive) sign = weight = splat((real)t->dim_weights[d]);
        real *to = g->grad_q + p * MR * g->q_rows_padded + d * MR + n * LANES;
        real *keys = g->sub_grad_k + d / width * SUB_BLOCK_K * MR + d % width;
        for (int j = 0; j < sub->keys; j += LANES) {
            vec of_keys[LANES];
            int some = fewer(sub->keys - j, LANES);
            sum += sum_terms(additive, q, k.data + j * k.row + d * k.dim, k.row, some,
                             g->grad_scores + j * MR + n * LANES, pairs + j, of_keys, &weighted);
            vec sums = sum_lanes(of_keys) * sign;
            for (int l = 0; l < some; l++) keys[(j + l) * MR] += sums[l];
        }
        store(to, load(to) + sum * weight);
        if (additive && t->wants_dim_weights)
            t->grad_dim_weights[d] += sum_of_lanes(weighted) / WEIGHT_UNIT;
    }
}

/* Add the gradients of a sub-block of keys and values and of a micropanel's queries. */
static void sum_metric_sub_block(const Tile *t, const BackwardScratch *g, int p,
                                 const SubBlock *sub, View k, Accumulated *sums) {
    int queries = fewer(t->n_queries - p * MR, MR);
    const real *grad_out_rows = g->grad_out_rows + p * MR * MR;
    if (sub->visibility == PARTIAL && !g->finite[p])
        sum_queries_masked(t->value_dim, sub, queries, sub->scores, grad_out_rows, g->sub_grad_v,
                           sums->keys);
    else
        sum_queries(t->value_dim, sub->keys, queries, sub->scores, grad_out_rows, g->sub_grad_v,
                    sums->keys);
    if (!sums->q[p])
        memset(g->grad_q + p * MR * g->q_rows_padded, 0, sizeof(real) * MR * (size_t)t->head_dim);
    for (ptrdiff_t m = 0; m < dim_micropanels(t->head_dim) && !sums->keys; m++)
        memset(g->sub_grad_k + m * SUB_BLOCK_K * MR, 0, sizeof(real) * (size_t)(sub->keys * MR));
    if (t->score_function != ADDITIVE) differentiate_distances(t, g, p, sub);
    for (int n = 0; n < t->micropanel[p].vecs; n++)
        if (t->score_function == ADDITIVE) add_metric_terms(true, t, g, p, sub, k, n);
        else add_metric_terms(false, t, g, p, sub, k, n);
    sums->q[p] = sums->keys = true;
}
#endif
