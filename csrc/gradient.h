/* Gradients of a tile: what its queries contribute to those of a block of keys, and to their own.
 *
 * The weights are made again from the rows' lse (Dao et al. 2022, "FlashAttention", algorithm 4). With
 * queries in the lanes, P^T = exp(S^T - lse) and dS^T = P^T * (V dO^T - delta); dQ^T = K^T dS^T has the
 * form of the forward products. For dV = P^T dO and dK = dS^T Q the rows of P^T and dS^T are broadcast
 * and dimensions lie in the lanes: the same register tile.
 */
#ifndef FASTATTN_GRADIENT_H
#define FASTATTN_GRADIENT_H

#include "product.h"

/* Dimensions in the lanes go by panels of no more than TILE_VECS vectors, as even as can be. */
static ptrdiff_t dim_vecs(ptrdiff_t dims) {
    ptrdiff_t vecs = round_up(dims, LANES) / LANES, panels = (vecs + TILE_VECS - 1) / TILE_VECS;
    return panels == 0 ? 1 : (vecs + panels - 1) / panels;
}
static ptrdiff_t dim_panels(ptrdiff_t dims) {
    return (dims + dim_vecs(dims) * LANES - 1) / (dim_vecs(dims) * LANES);
}

typedef struct {
    Scratch forward;
    real *grad_out;                  /* [panel][value_dim][PANEL] */
    real *grad_q;                    /* [panel][head_dim][PANEL], of the block */
    real *grad_scores, *slope;       /* [STRIP_KEYS][PANEL] */
    real *q_rows, *grad_out_rows;    /* [dim panel][query][PANEL dims] */
    real *strip_k, *strip_v;         /* [dim panel][STRIP_KEYS][PANEL dims], of one tile */
    real *grad_k, *grad_v;           /* [dim panel][keys of the block][PANEL dims] */
    real *lse, *lse_rest, *delta;    /* [panel][PANEL]; lse in units of scores, and what it was rounded by */
    bool *finite;                    /* [panel]: are its queries and their gradients finite? */
} GradientScratch;

static size_t lay_out_gradient(const Tile *t, GradientScratch *g) {
    char *base = t->scratch;
    size_t bytes = lay_out(t, PANELS, base, &g->forward);
    ptrdiff_t row = PANELS * PANEL, k = dim_panels(t->head_dim) * PANEL, v = dim_panels(t->value_dim) * PANEL;
#define TAKE(field, count)                                                                        \
    g->field = (void *)((uintptr_t)base + bytes);                                                 \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *g->field * (count), 64);
    TAKE(grad_out, row * t->value_dim)
    TAKE(grad_q, row * t->head_dim)
    TAKE(grad_scores, STRIP_KEYS * PANEL)
    TAKE(slope, STRIP_KEYS * PANEL)
    TAKE(q_rows, row * k)
    TAKE(grad_out_rows, row * v)
    TAKE(strip_k, STRIP_KEYS * k)
    TAKE(strip_v, STRIP_KEYS * v)
    TAKE(grad_k, PASS_KEYS * k)
    TAKE(grad_v, PASS_KEYS * v)
    TAKE(lse, row)
    TAKE(lse_rest, row)
    TAKE(delta, row)
    TAKE(finite, PANELS)
#undef TAKE
    return bytes;
}

static size_t gradient_scratch_bytes(const Tile *t) {
    GradientScratch g;
    return lay_out_gradient(t, &g);
}

/* rows[dim panel][query][PANEL dims], 0 behind the last dim. Returns whether all are finite. */
static bool load_rows(const char *const *at, ptrdiff_t dim, NumberFormat format, ptrdiff_t dims,
                      ptrdiff_t first, ptrdiff_t queries, real *rows) {
    ptrdiff_t width = dim_vecs(dims) * LANES;
    real sum = 0;
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        for (ptrdiff_t i = 0; i < queries; i++) {
            real *to = rows + (m * PANELS * PANEL + first + i) * PANEL;
            ptrdiff_t d = 0, from = m * width, n = dims - from < width ? dims - from : width;
            vec wrong = splat(0);
            if (dim == format.bytes)
                for (; d + LANES <= n; d += LANES) {
                    vec x = load_numbers(at[first + i] + (from + d) * dim, format);
                    store(to + d, x);
                    wrong += x * 0;
                }
            for (; d < width; d++) {
                to[d] = d < n ? (real)read_number(at[first + i] + (from + d) * dim, format) : 0;
                sum += to[d] * 0;
            }
            for (int l = 0; l < LANES; l++) sum += wrong[l];
        }
    return sum == 0;
}

/* Start on a block of keys. */
static void open_keys(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    GradientScratch g;
    lay_out_gradient(t, &g);
    memset(g.grad_k, 0, sizeof(real) * (size_t)(PASS_KEYS * dim_panels(t->head_dim) * PANEL));
    memset(g.grad_v, 0, sizeof(real) * (size_t)(PASS_KEYS * dim_panels(t->value_dim) * PANEL));
    (void)begin;
    *g.forward.ready = (Ready){.end = end};
}

/* Read what the tile's queries bring along. */
static void open_queries(Tile *t, const GradientScratch *g) {
    double unit = t->exponent == LOG2_E ? 1 : 1 / (t->exponent * LN2);
    for (ptrdiff_t i = 0; i < t->panels * PANEL; i++) {
        bool real_query = i < t->n_queries;
        double lse = !real_query ? INFINITY : t->lse[i] == -INFINITY ? 0 : t->lse[i] * unit;
        g->lse[i] = (real)lse;
        g->lse_rest[i] = isfinite(lse) ? (real)(lse - g->lse[i]) : 0;
        g->delta[i] = real_query ? (real)t->delta[i] : 0;
    }
    for (int p = 0; p < t->panels; p++) {
        ptrdiff_t first = p * PANEL, queries = fewer(t->n_queries - first, PANEL);
        for (int n = 0; n < t->panel[p].vecs; n++)
            load_columns(t->grad_out, t->grad_out_dim, t->q_format, t->value_dim, t->n_queries, 1,
                         first + n * LANES, g->grad_out + first * t->value_dim + n * LANES);
        bool q = load_rows(t->q, t->q_dim, t->q_format, t->head_dim, first, queries, g->q_rows);
        bool o = load_rows(t->grad_out, t->grad_out_dim, t->q_format, t->value_dim, first, queries,
                           g->grad_out_rows);
        g->finite[p] = q && o;
    }
}

/* c[key][dims] of some dim panels (+)= sum over queries of a[key][query] * rows[query][dims]. */
static void sum_queries(ptrdiff_t dims, int keys, int queries, const real *a, const real *rows,
                        real *c, bool accumulate) {
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        product((int)dim_vecs(dims), keys, a, PANEL, 1, queries, rows + m * PANELS * PANEL * PANEL,
                c + m * STRIP_KEYS * PANEL, accumulate, NULL);
}

/* The same where NaN or Inf must not reach a key that does not see it. */
static void sum_queries_carefully(ptrdiff_t dims, const Strip *strip, int queries, const real *a,
                                  const real *rows, real *c, bool accumulate) {
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        for (int j = 0; j < strip->keys; j++) {
            real *to = c + (m * STRIP_KEYS + j) * PANEL;
            for (ptrdiff_t d = 0; d < PANEL && !accumulate; d++) to[d] = 0;
            for (int i = 0; i < queries; i++)
                for (ptrdiff_t d = 0; d < PANEL && sees(strip, i / LANES, j)[i % LANES] < 0; d++)
                    to[d] += a[j * PANEL + i] * rows[(m * PANELS * PANEL + i) * PANEL + d];
        }
}

/* Weights, in place of the scores, and grad_scores of the product with v. */
static void differentiate_scores(const Tile *t, const GradientScratch *g, int p, const Strip *strip) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < t->panel[p].vecs; n++) {
        ptrdiff_t lane = p * PANEL + n * LANES;
        vec lse = load(g->lse + lane), rest = load(g->lse_rest + lane), delta = load(g->delta + lane);
        for (int j = 0; j < strip->keys; j++) {
            ptrdiff_t at = j * PANEL + n * LANES;
            vec weight = weight_from(load(strip->scores + at) - lse, rest, exponent);
            vec grad = weight * (load(g->grad_scores + at) - delta);
            if (strip->seen == SEE_SOME) {
                ivec seen = sees(strip, n, j);
                weight = choose(seen, weight, splat(0));
                grad = choose(seen, grad, splat(0));
            }
            store(strip->scores + at, weight);
            store(g->grad_scores + at, grad);
        }
    }
}

/* Add a strip's gradients to those of the bias. */
static void add_to_bias(const Tile *t, const GradientScratch *g, int p, const Strip *strip) {
    const real unit = (real)(1 / WEIGHT_UNIT);
    int rows = fewer(t->n_queries - p * PANEL, PANEL);
    for (int i = 0; i < rows; i += LANES) {
        char *const *to = t->grad_bias + p * PANEL + i;
        const real *from = g->grad_scores + i;
        int some = fewer(rows - i, LANES), j = 0;
        for (; j + LANES <= strip->keys && !t->rows_share_bias; j += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++) x[l] = load(from + (j + l) * PANEL);
            transpose(x);
            for (int l = 0; l < some; l++) { /* heads of a group may have one row */
                real *row = (real *)to[l] + strip->key + j;
                store_unaligned(row, load_unaligned(row) + x[l] * unit);
            }
        }
        for (int l = 0; l < some; l++)
            for (int key = j; key < strip->keys; key++) {
                real x = from[key * PANEL + l] * unit;
                if (t->rows_share_bias)
                    ((double *)to[l])[strip->key + key] += x;
                else
                    ((real *)to[l])[strip->key + key] += x;
            }
    }
}

/* Add what a strip has to say of the slopes: see Tile. */
static void add_to_slopes(Tile *t, const GradientScratch *g, int p, const Strip *strip) {
    for (int n = 0; n < t->panel[p].vecs; n++) {
        ptrdiff_t first = p * PANEL + n * LANES;
        vec distance = distances(t, first, strip->key);
        vec slope = splat(0), sum = splat(0), mean = splat(0);
        for (int j = 0; j < strip->keys; j++) {
            vec grad = load(g->grad_scores + j * PANEL + n * LANES);
            slope += grad * magnitude(distance);
            sum += grad;
            mean += load(strip->scores + j * PANEL + n * LANES) * magnitude(distance);
            distance -= 1;
        }
        for (int i = 0; i < LANES && first + i < t->n_queries; i++) {
            t->grad_slope[first + i][0] -= slope[i] / WEIGHT_UNIT;
            t->grad_slope[first + i][1] += sum[i] / WEIGHT_UNIT;
            t->grad_slope[first + i][2] += mean[i] / WEIGHT_UNIT;
        }
    }
}

/* From the gradients of scores to those of the scores before the softcap. */
static void uncap(const Tile *t, const GradientScratch *g, int p, const Strip *strip) {
    for (int j = 0; j < strip->keys; j++)
        for (int n = 0; n < t->panel[p].vecs; n++) {
            real *grad = g->grad_scores + j * PANEL + n * LANES;
            vec x = load(grad) * load(g->slope + j * PANEL + n * LANES);
            store(grad, strip->seen == SEE_SOME ? choose(sees(strip, n, j), x, splat(0)) : x);
        }
}

/* One panel and one strip. */
static void differentiate_strip(Tile *t, const GradientScratch *g, int p, Strip *strip,
                                bool begun_q, bool begun_keys) {
    const Scratch *s = &g->forward;
    int vecs = t->panel[p].vecs, queries = fewer(t->n_queries - p * PANEL, PANEL);
    View k = keys_from(t, s, strip->key), v = values_from(t, s, strip->key);
    real *grad_q = g->grad_q + p * PANEL * t->head_dim;
    const real *q_rows = g->q_rows + p * PANEL * PANEL, *grad_out_rows = g->grad_out_rows + p * PANEL * PANEL;
    vec top[TILE_VECS];
    multiply_keys(t, s, p, strip, NULL);
    for (int j = 0; j < strip->keys && t->softcap > 0; j++)
        for (int n = 0; n < vecs; n++) {
            vec raw = load(strip->scores + j * PANEL + n * LANES);
            vec x = tanh_vec(raw * (real)(t->score_scale / t->softcap));
            store(g->slope + j * PANEL + n * LANES, 1 - x * x);
        }
    finish_scores(t, s, p, strip, top);
    product(vecs, strip->keys, v.data, v.row, v.dim, t->value_dim,
            g->grad_out + p * PANEL * t->value_dim, g->grad_scores, false, NULL);
    differentiate_scores(t, g, p, strip);
    if (t->wants_bias) add_to_bias(t, g, p, strip);
    if (t->wants_slope) add_to_slopes(t, g, p, strip);
    if (t->softcap > 0) uncap(t, g, p, strip);
    bool careful = strip->seen == SEE_SOME &&
                   !(g->finite[p] && all_finite(k, strip->keys, t->head_dim));
    if (careful) {
        Strip grads = *strip;
        grads.scores = g->grad_scores;
        if (!begun_q) memset(grad_q, 0, sizeof(real) * PANEL * (size_t)t->head_dim);
        careful_product(&grads, vecs, k, t->head_dim, grad_q);
        sum_queries_carefully(t->value_dim, strip, queries, strip->scores, grad_out_rows, g->strip_v, begun_keys);
        sum_queries_carefully(t->head_dim, strip, queries, g->grad_scores, q_rows, g->strip_k, begun_keys);
        return;
    }
    product(vecs, t->head_dim, k.data, k.dim, k.row, strip->keys, g->grad_scores, grad_q, begun_q, NULL);
    sum_queries(t->value_dim, strip->keys, queries, strip->scores, grad_out_rows, g->strip_v, begun_keys);
    sum_queries(t->head_dim, strip->keys, queries, g->grad_scores, q_rows, g->strip_k, begun_keys);
}

/* Add what one tile gave a strip of keys: each tile is summed from zero, as blocks are. */
static void join_strip(ptrdiff_t dims, ptrdiff_t key, int keys, const real *strip, real *block) {
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        for (int j = 0; j < keys; j++) {
            const real *from = strip + (m * STRIP_KEYS + j) * PANEL;
            real *to = block + (m * PASS_KEYS + key % PASS_KEYS + j) * PANEL;
            for (ptrdiff_t d = 0; d < dim_vecs(dims) * LANES; d += LANES)
                store(to + d, load(to + d) + load(from + d));
        }
}

/* The gradients of one tile's queries and one block of keys. Returns whether some query sees any. */
static int differentiate(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    GradientScratch g;
    bool begun[PANELS] = {false}, any = false;
    lay_out_gradient(t, &g);
    open_queries(t, &g);
    if (t->wants_slope) memset(t->grad_slope, 0, sizeof *t->grad_slope * (size_t)t->n_queries);
    for (ptrdiff_t key = begin; key < end; key += STRIP_KEYS) {
        /* Whole strips, so that a row of dK or dV has one place. */
        int keys = fewer(end - key, STRIP_KEYS);
        bool begun_keys = false;
        for (int p = 0; p < t->panels; p++) {
            Strip strip = {key, keys, g.forward.scores, g.forward.seen, SEE_NONE};
            if (key >= t->panel[p].last || key + keys <= t->panel[p].first) continue;
            strip.seen = look(t, p, &strip);
            if (strip.seen == SEE_NONE) continue;
            need(t, &g.forward, key, &g.forward.ready->keys, ready_keys);
            need(t, &g.forward, key, &g.forward.ready->values, ready_values);
            differentiate_strip(t, &g, p, &strip, begun[p], begun_keys);
            begun[p] = begun_keys = any = true;
        }
        if (!begun_keys) continue;
        join_strip(t->head_dim, key, keys, g.strip_k, g.grad_k);
        join_strip(t->value_dim, key, keys, g.strip_v, g.grad_v);
    }
    for (int p = 0; p < t->panels; p++)
        if (!begun[p])
            memset(g.grad_q + p * PANEL * t->head_dim, 0, sizeof(real) * PANEL * (size_t)t->head_dim);
    return any;
}

/* Add the block's share to the gradients of the tile's queries. */
static void add_grad_q(Tile *t) {
    GradientScratch g;
    lay_out_gradient(t, &g);
    real scale = (real)(t->scale / WEIGHT_UNIT);
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        const real *from = g.grad_q + i / PANEL * PANEL * t->head_dim + i % PANEL;
        real *to = (real *)t->out[i]; /* here their gradients */
        for (ptrdiff_t d = 0; d < t->head_dim; d++) to[d] += from[d * PANEL] * scale;
    }
}

static void store_keys(const real *block, ptrdiff_t dims, ptrdiff_t keys, ptrdiff_t first,
                       double scale, real *to) {
    ptrdiff_t width = dim_vecs(dims) * LANES;
    for (ptrdiff_t j = 0; j < keys; j++)
        for (ptrdiff_t d = 0; d < dims; d++)
            to[j * dims + d] =
                block[(d / width * PASS_KEYS + first + j) * PANEL + d % width] * (real)scale;
}

/* Write the gradients of the block of keys. */
static void close_keys(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    GradientScratch g;
    lay_out_gradient(t, &g);
    store_keys(g.grad_k, t->head_dim, end - begin, begin % PASS_KEYS, t->scale / WEIGHT_UNIT,
               (real *)t->grad_k + begin * t->head_dim);
    store_keys(g.grad_v, t->value_dim, end - begin, begin % PASS_KEYS, 1 / WEIGHT_UNIT,
               (real *)t->grad_v + begin * t->value_dim);
}
#endif
