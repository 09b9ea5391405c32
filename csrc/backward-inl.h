/* The backward pass of a tile: the gradients of its queries, and what they add to those of a block
 * of keys and values.
 *
 * The weights are recomputed from the lse of the rows (Dao et al. 2022, "FlashAttention", algorithm
 * 4). With queries in the lanes, P^T = exp(S^T - lse) and dS^T = P^T * (V dO^T - delta). The
 * matmuls are those of backward_fma-inl.h or backward_bf16-inl.h. */
#ifndef FASTATTN_BACKWARD_INL_H
#define FASTATTN_BACKWARD_INL_H

#include "dropout-inl.h"
#ifdef BF16_TERMS
#include "backward_bf16-inl.h"
#else
#include "backward_fma-inl.h"
#endif

/* Begin a block of keys. */
static void begin_keys(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    BackwardScratch g;
    lay_out_backward(t, &g);
    size_t bytes = sizeof(real) * (size_t)((end - begin) * MR); /* of one micropanel of dims */
    for (ptrdiff_t m = 0; m < dim_micropanels(t->head_dim); m++)
        memset(g.grad_k + (m * BLOCK_K + begin % BLOCK_K) * MR, 0, bytes);
    for (ptrdiff_t m = 0; m < dim_micropanels(t->value_dim); m++)
        memset(g.grad_v + (m * BLOCK_K + begin % BLOCK_K) * MR, 0, bytes);
    *g.forward.packed = (PackedSubBlocks){.end = end};
}

/* The mean of the gradients of the weights, grad_out . out, summed in the order and the blocks of
 * the products of grad_out and v: if one key has all the weight of a row, out is its v, and the
 * gradient of its score is exactly 0. */
static void prepare(Tile *t) {
    BackwardScratch g;
    lay_out_backward(t, &g);
    for (ptrdiff_t first = 0; first < t->n_queries; first += LANES) {
        real *grad_out = g.grad_out, *result = g.grad_v;
        vec sum = splat(0);
        ptrdiff_t block = block_d(micropanel_vecs(t, first / MR), t->value_dim);
        load_columns(t->grad_out, t->grad_out_dim, t->grad_out_format, t->value_dim, t->n_queries,
                     1, first, grad_out);
        load_columns(t->result, t->result_dim, t->grad_out_format, t->value_dim, t->n_queries, 1,
                     first, result);
        for (ptrdiff_t d = 0; d < t->value_dim;) {
            vec block_sum = splat(0);
            for (ptrdiff_t end = fewer(t->value_dim, d + block); d < end; d++)
                block_sum = load(result + d * MR) * load(grad_out + d * MR) + block_sum;
            sum += block_sum;
        }
        for (int i = 0; i < LANES && first + i < t->n_queries; i++) t->mean[first + i] = sum[i];
    }
}

/* The unit of scores: 1, or ln(2) times the exponent. */
static double score_unit(const Tile *t) { return t->exponent == LOG2_E ? 1 : t->exponent * LN2; }

/* The lse as these kernels compute it: the maximum of the row, and the rest with all its digits. */
static void normalize(Tile *t) {
    Scratch s = scratch_of(t);
    double unit = score_unit(t);
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        double top = s.row_max[i], lse = top * unit;
        t->lse[i] = lse;
        t->lse_rest[i] =
            isinf(top) ? 0 : fma(top, unit, -lse) + log((double)s.row_sum[i] / WEIGHT_UNIT);
    }
}

/* Prepare the tile's queries. */
static void begin_queries(Tile *t, const BackwardScratch *g) {
    double unit = score_unit(t);
    for (ptrdiff_t i = 0; i < t->micropanels * MR; i++) {
        bool real_query = i < t->n_queries;
        double lse = !real_query ? INFINITY : t->lse[i] == -INFINITY ? 0 : t->lse[i];
        g->lse[i] = (real)(lse / unit);
        g->lse_rest[i] =
            isfinite(lse) ? (real)((fma(-g->lse[i], unit, lse) + t->lse_rest[i]) / unit) : 0;
        g->delta[i] = real_query ? (real)t->delta[i] : 0;
    }
    for (int p = 0; p < t->micropanels; p++) begin_micropanel(t, g, p);
}

/* Turn scores into weights, in place, and grad_scores from V dO^T, to be multiplied by `unit`, into
 * dS^T. Returns whether all of these are finite. */
static bool differentiate_scores(const Tile *t, const BackwardScratch *g, int p,
                                 const SubBlock *sub, real unit) {
    vec exponent = splat((real)t->exponent), not_finite = splat(0);
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t lane = p * MR + n * LANES;
        vec lse = load(g->lse + lane), rest = load(g->lse_rest + lane),
            delta = load(g->delta + lane);
        for (int j = 0; j < sub->keys; j++) {
            ptrdiff_t at = j * MR + n * LANES;
            vec weight = weight_from(load(sub->scores + at) - lse, rest, exponent);
            vec grad = weight * (load(g->grad_scores + at) * unit - delta);
            if (sub->visibility == PARTIAL) {
                ivec visible = visible_lanes(sub, n, j);
                weight = choose(visible, weight, splat(0));
                grad = choose(visible, grad, splat(0));
            }
            store(sub->scores + at, weight);
            store(g->grad_scores + at, grad);
            not_finite += grad * 0;
        }
    }
    return !any_lane(not_finite != splat(0));
}

/* Add a sub-block's gradients to those of the bias. */
static void add_to_bias(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    const real unit = (real)(1 / WEIGHT_UNIT);
    int rows = fewer(t->n_queries - p * MR, MR);
    for (int i = 0; i < rows; i += LANES) {
        char *const *to = t->grad_bias + p * MR + i;
        const real *from = g->grad_scores + i;
        int some = fewer(rows - i, LANES), j = 0;
        for (; j + LANES <= sub->keys && !t->rows_share_bias; j += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++) x[l] = load(from + (j + l) * MR);
            transpose(x);
            for (int l = 0; l < some; l++) { /* heads of a group may share a row */
                real *row = (real *)to[l] + sub->key + j;
                store_unaligned(row, load_unaligned(row) + x[l] * unit);
            }
        }
        for (int l = 0; l < some; l++)
            for (int key = j; key < sub->keys; key++) {
                real x = from[key * MR + l] * unit;
                if (t->rows_share_bias) ((double *)to[l])[sub->key + key] += x;
                else ((real *)to[l])[sub->key + key] += x;
            }
    }
}

/* Add a sub-block to row_sums. Distances are counted from the near end of the sub-block, so that
 * they are small; the rest, `far`, is added in double. */
static void add_to_row_sums(Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t first = p * MR + n * LANES;
        vec weights = splat(0), grads = splat(0), weighted = splat(0), slope = splat(0);
        vec near = splat(0), step = splat(0);
        double far[LANES] = {0};
        for (int i = 0; i < LANES && first + i < t->n_queries && t->has_alibi; i++) {
            ptrdiff_t away = t->position[first + i] - sub->key;
            near[i] = (real)(away > SUB_BLOCK_K    ? SUB_BLOCK_K
                             : away < -SUB_BLOCK_K ? -SUB_BLOCK_K
                                                   : away);
            far[i] = fabs((double)away) - fabs(near[i]);
        }
        for (int j = 0; j < sub->keys; j++) {
            vec weight = load(sub->scores + j * MR + n * LANES);
            vec grad = load(g->grad_scores + j * MR + n * LANES);
            vec distance = magnitude(near - step);
            weights += weight;
            grads += grad;
            weighted += weight * distance;
            slope += grad * distance;
            if (t->has_alibi) step += 1;
        }
        for (int i = 0; i < LANES && first + i < t->n_queries; i++) {
            double *sums = t->row_sums[first + i];
            sums[0] += weights[i] / WEIGHT_UNIT;
            sums[1] += grads[i] / WEIGHT_UNIT;
            sums[2] += (weighted[i] + far[i] * weights[i]) / WEIGHT_UNIT;
            sums[3] += (slope[i] + far[i] * grads[i]) / WEIGHT_UNIT;
        }
    }
}

/* Add a sub-block to the row_sums of the scale, whose factor in a score before the softcap is the
 * score without it. */
static void add_to_scale_sums(Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t first = p * MR + n * LANES;
        vec weighted = splat(0), grads = splat(0);
        for (int j = 0; j < sub->keys; j++) {
            ptrdiff_t at = j * MR + n * LANES;
            vec factor = load(g->unscaled + at);
            if (t->softcap > 0) factor *= load(g->slope + at);
            if (sub->visibility == PARTIAL)
                factor = choose(visible_lanes(sub, n, j), factor, splat(0));
            weighted += load(sub->scores + at) * factor;
            grads += load(g->grad_scores + at) * factor;
        }
        for (int i = 0; i < LANES && first + i < t->n_queries; i++) {
            t->row_sums[first + i][4] += weighted[i] / WEIGHT_UNIT;
            t->row_sums[first + i][5] += grads[i] / WEIGHT_UNIT;
        }
    }
}

typedef double doubles_of_lanes __attribute__((vector_size(LANES * 8)));
typedef double loose_doubles __attribute__((vector_size(LANES * 8), aligned(8)));

/* Add the gradients of one key and LANES queries to those of their relative biases. */
INLINE void add_to_distances(const Tile *t, ptrdiff_t first, ptrdiff_t key, vec x) {
    const real *base = t->relative_bias;
    double *to = t->grad_relative_bias + (relative_bias_at(t, first, key) - base);
    for (ptrdiff_t l = t->n_queries - first; l < LANES; l++) x[l] = 0; /* lanes without a query */
    loose_doubles *sum = (loose_doubles *)to;
    *sum += __builtin_convertvector(x, doubles_of_lanes) * (1 / WEIGHT_UNIT);
}

/* Add a sub-block's gradients to those of the relative bias. The places of neighbouring keys
 * overlap: keys that are LANES apart come one after another, so that no load waits for a store that
 * covers a part of it. Keys that are all farther than the table reaches are summed first. */
static void add_to_relative_bias(const Tile *t, const BackwardScratch *g, int p,
                                 const SubBlock *sub) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t first = p * MR + n * LANES, last = sub->key + sub->keys - 1;
        const real *grad = g->grad_scores + n * LANES;
        if (relative_bias_at(t, first, sub->key) == relative_bias_at(t, first, last)) {
            vec sum = splat(0);
            for (int j = 0; j < sub->keys; j++) sum += load(grad + j * MR);
            add_to_distances(t, first, last, sum);
            continue;
        }
        for (int begin = 0; begin < LANES; begin++)
            for (int j = begin; j < sub->keys; j += LANES)
                add_to_distances(t, first, sub->key + j, load(grad + j * MR));
    }
}

/* Turn the gradients of scores into those of the scores before the softcap. */
static void softcap_gradient(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *grad = g->grad_scores + j * MR + n * LANES;
            vec x = load(grad) * load(g->slope + j * MR + n * LANES);
            store(grad,
                  sub->visibility == PARTIAL ? choose(visible_lanes(sub, n, j), x, splat(0)) : x);
        }
}

/* One micropanel and one sub-block. */
static void differentiate_sub_block(Tile *t, const BackwardScratch *g, int p, SubBlock *sub,
                                    Accumulated *sums) {
    const Scratch *s = &g->forward;
    vec top[MR_VECS];
    s->engine->multiply_keys(t, s, p, sub, NULL);
    for (int j = 0; j < sub->keys && keeps_unscaled(t); j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++)
            store(g->unscaled + j * MR + n * LANES, load(sub->scores + j * MR + n * LANES));
    if (t->has_scales) multiply_by_scales(t, p, sub, sub->scores, top);
    for (int j = 0; j < sub->keys && t->softcap > 0; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            vec raw = load(sub->scores + j * MR + n * LANES);
            vec x = tanh_vec(raw * (real)(t->score_scale / t->softcap));
            store(g->slope + j * MR + n * LANES, 1 - x * x);
        }
    finish_scores(t, s, p, sub, top);
    real unit;
    bool fit = multiply_values(t, g, p, sub, &unit);
    if (t->has_dropout) {
        draw_kept(t, s, p, sub);
        drop(t, s, p, sub, g->grad_scores);
    }
    fit &= differentiate_scores(t, g, p, sub, unit * (real)t->keep_factor);
    if (t->wants_bias) add_to_bias(t, g, p, sub);
    if (t->wants_sums) add_to_row_sums(t, g, p, sub);
    if (t->wants_scale) add_to_scale_sums(t, g, p, sub);
    if (t->wants_relative_bias) add_to_relative_bias(t, g, p, sub);
    if (t->softcap > 0) softcap_gradient(t, g, p, sub);
    if (t->has_dropout) drop(t, s, p, sub, sub->scores);
    if (t->has_scales) fit &= multiply_by_scales(t, p, sub, g->grad_scores, top);
    sum_sub_block(t, g, p, sub, fit, sums);
}

/* Add the gradients of a sub-block from one tile to those of the block: each tile is summed from
 * zero, as blocks are. */
static void add_sub_block_grad(ptrdiff_t dims, ptrdiff_t key, int keys, const real *sub,
                               real *block) {
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++)
        for (int j = 0; j < keys; j++) {
            const real *from = sub + (m * SUB_BLOCK_K + j) * MR;
            real *to = block + (m * BLOCK_K + key % BLOCK_K + j) * MR;
            for (ptrdiff_t d = 0; d < dim_vecs(dims) * LANES; d += LANES)
                store(to + d, load(to + d) + load(from + d));
        }
}

/* The gradients of one tile and one block of keys. Returns whether any key is visible. */
static int differentiate(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    BackwardScratch g;
    Accumulated sums = {0};
    bool any = false;
    lay_out_backward(t, &g);
    begin_matmuls();
    begin_queries(t, &g);
    if (t->wants_sums) memset(t->row_sums, 0, sizeof *t->row_sums * (size_t)t->n_queries);
    for (ptrdiff_t key = begin; key < end; key += SUB_BLOCK_K) {
        /* Whole sub-blocks, so that each row of dK and dV has a fixed place. */
        int keys = fewer(end - key, SUB_BLOCK_K);
        sums.keys = false;
        for (int p = 0; p < t->micropanels; p++) {
            SubBlock sub = {key, keys, g.forward.scores, g.forward.visible, EMPTY, true};
            if (key >= t->micropanel[p].last || key + keys <= t->micropanel[p].first) continue;
            sub.visibility = classify(t, &g.forward, p, &sub);
            if (sub.visibility == EMPTY) continue;
            ensure_packed(t, &g.forward, key, &g.forward.packed->keys, g.forward.engine->pack_keys);
            ensure_packed(t, &g.forward, key, &g.forward.packed->values, pack_for_gradients);
            differentiate_sub_block(t, &g, p, &sub, &sums);
        }
        flush_pending(t, &g, keys, &sums);
        if (!sums.keys) continue;
        any = true;
        add_sub_block_grad(t->head_dim, key, keys, g.sub_grad_k, g.grad_k);
        add_sub_block_grad(t->value_dim, key, keys, g.sub_grad_v, g.grad_v);
    }
    end_matmuls();
    for (int p = 0; p < t->micropanels; p++)
        if (!sums.q[p])
            memset(g.grad_q + p * MR * g.q_rows_padded, 0, sizeof(real) * MR * (size_t)t->head_dim);
    return any;
}

/* Add the gradients from one block to those of the tile's queries. */
static void add_grad_q(Tile *t) {
    BackwardScratch g;
    lay_out_backward(t, &g);
    real scale = (real)(t->scale / WEIGHT_UNIT);
    for (ptrdiff_t first = 0; first < t->n_queries; first += LANES) {
        const real *from = g.grad_q + first / MR * MR * g.q_rows_padded + first % MR;
        int rows = fewer(t->n_queries - first, LANES);
        ptrdiff_t d = 0;
        for (; d + LANES <= t->head_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = load(from + (d + i) * MR);
            transpose(x);
            for (int i = 0; i < rows; i++) {
                real *to = (real *)t->out[first + i] + d; /* `out` holds the gradients here */
                store_unaligned(to, load_unaligned(to) + x[i] * scale);
            }
        }
        for (; d < t->head_dim; d++)
            for (int i = 0; i < rows; i++)
                ((real *)t->out[first + i])[d] += from[d * MR + i] * scale;
    }
}

static void store_key_rows(const real *block, ptrdiff_t dims, ptrdiff_t keys, ptrdiff_t first,
                           double scale, bool adds, char *to, ptrdiff_t key, NumberFormat format) {
    ptrdiff_t width = dim_vecs(dims) * LANES;
    real factor = (real)scale;
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++)
        for (ptrdiff_t j = 0; j < keys; j++) {
            const real *from = block + (m * BLOCK_K + first % BLOCK_K + j) * MR;
            char *row = to + (first + j) * key + m * width * format.bytes;
            ptrdiff_t d = 0, n = dims - m * width < width ? dims - m * width : width;
            for (; d + LANES <= n; d += LANES) {
                vec x = load(from + d) * factor;
                char *at = row + d * format.bytes;
                store_numbers(at, format, adds ? load_unaligned((const real *)at) + x : x);
            }
            for (; d < n; d++) {
                char *at = row + d * format.bytes;
                real x = from[d] * factor;
                write_number(at, format, adds ? *(const real *)at + x : x);
            }
        }
}

/* Store the gradients of the block of keys, or add them. */
static void store_keys(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    BackwardScratch g;
    lay_out_backward(t, &g);
    store_key_rows(g.grad_k, t->head_dim, end - begin, begin, t->scale / WEIGHT_UNIT, t->adds_k,
                   t->grad_k, t->grad_k_key, t->grad_k_format);
    store_key_rows(g.grad_v, t->value_dim, end - begin, begin, t->keep_factor / WEIGHT_UNIT,
                   t->adds_v, t->grad_v, t->grad_v_key, t->grad_v_format);
}
#endif
