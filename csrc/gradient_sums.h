/* Where gradients are summed, and their products by multiply-adds of real numbers.
 *
 * dQ^T = K^T dS^T has the form of the forward products. For dV = P^T dO and dK = dS^T Q the rows of P^T
 * and dS^T are broadcast and dimensions lie in the lanes: the same register tile.
 */
#ifndef FASTATTN_GRADIENT_SUMS_H
#define FASTATTN_GRADIENT_SUMS_H

#include "product.h"

/* The panels whose queries lie ready as real numbers: one at a time where that is the exception. */
#ifdef PARTS
#define REAL_PANELS 1
/* What so many panels give a strip's keys waits to be one product. */
#define WAITING_PANELS (PARTS == 1 ? 4 : 2)
#else
#define REAL_PANELS PANELS
#endif

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
    ptrdiff_t q_rows_of_panel;       /* in grad_q */
    real *grad_q;                    /* [panel][head_dim][PANEL], of the block */
    real *grad_scores, *slope;       /* [STRIP_KEYS][PANEL] */
    real *strip_k, *strip_v;         /* [dim panel][STRIP_KEYS][PANEL dims], of one tile */
    real *grad_k, *grad_v;           /* [dim panel][keys of the block][PANEL dims] */
    real *lse, *lse_rest, *delta;    /* [panel][PANEL]; lse in units of scores, and what it was rounded by */
    real *grad_out;                  /* [real panel][value_dim][PANEL] */
    real *q_rows, *grad_out_rows;    /* [dim panel][query of the real panels][PANEL dims] */
    bool *finite;                    /* [real panel]: are its queries and their gradients finite? */
#ifdef PARTS
    real *real_keys, *real_values;   /* [STRIP_KEYS][dim] */
    uint16_t *rows;                  /* [part][chunk of dims][query][CHUNK] of one panel; see gradient_parts.h */
    uint16_t *value_rows, *key_columns, *weight_rows, *grad_rows;
    uint32_t *grad_out_lanes, *grad_lanes, *q_pairs, *grad_out_pairs;
    uint64_t *odd_queries, *odd_keys; /* [panel], [strip]: bits of those that parts cannot express */
#endif
} GradientScratch;

static size_t lay_out_gradient(const Tile *t, GradientScratch *g) {
    char *base = t->scratch;
    size_t bytes = lay_out(t, PANELS, base, &g->forward);
    ptrdiff_t row = PANELS * PANEL, real_row = REAL_PANELS * PANEL;
    ptrdiff_t k = dim_panels(t->head_dim) * PANEL, v = dim_panels(t->value_dim) * PANEL;
    g->q_rows_of_panel = round_up(t->head_dim, ROW_GRAIN);
#define TAKE(field, count)                                                                        \
    g->field = (void *)((uintptr_t)base + bytes);                                                 \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *g->field * (count), 64);
    TAKE(grad_q, row * g->q_rows_of_panel)
    TAKE(grad_scores, STRIP_KEYS * PANEL)
    TAKE(slope, STRIP_KEYS * PANEL)
    TAKE(strip_k, STRIP_KEYS * k)
    TAKE(strip_v, STRIP_KEYS * v)
    TAKE(grad_k, PASS_KEYS * k)
    TAKE(grad_v, PASS_KEYS * v)
    TAKE(lse, row)
    TAKE(lse_rest, row)
    TAKE(delta, row)
    TAKE(grad_out, real_row * t->value_dim)
    TAKE(q_rows, real_row * k)
    TAKE(grad_out_rows, real_row * v)
    TAKE(finite, REAL_PANELS)
#ifdef PARTS
    ptrdiff_t widest = k > v ? k : v, pass_keys = g->forward.key_rows;
    TAKE(real_keys, STRIP_KEYS * t->head_dim)
    TAKE(real_values, STRIP_KEYS * t->value_dim)
    TAKE(rows, PARTS * PANEL * widest)
    TAKE(value_rows, PARTS * pass_keys * v)
    TAKE(key_columns, PARTS * pass_keys * g->q_rows_of_panel)
    TAKE(weight_rows, PARTS * WAITING_PANELS * STRIP_KEYS * PANEL)
    TAKE(grad_rows, PARTS * WAITING_PANELS * STRIP_KEYS * PANEL)
    TAKE(grad_out_lanes, PARTS * row * v / 2)
    TAKE(grad_lanes, PARTS * PANEL * STRIP_KEYS / 2)
    TAKE(q_pairs, PARTS * row * k / 2)
    TAKE(grad_out_pairs, PARTS * row * v / 2)
    TAKE(odd_queries, PANELS)
    TAKE(odd_keys, PASS_KEYS / STRIP_KEYS)
#endif
#undef TAKE
    return bytes;
}

static size_t gradient_scratch_bytes(const Tile *t) {
    GradientScratch g;
    return lay_out_gradient(t, &g);
}

/* What the sums hold already. */
typedef struct {
    bool q[PANELS], keys; /* of each panel's queries, of the strip's keys */
    uint32_t waiting;     /* bits of the panels whose shares of the strip's keys are to be added yet */
} Begun;

/* rows[dim panel][query][PANEL dims], 0 behind the last dim. Returns whether all are finite. */
static bool load_rows(const char *const *at, ptrdiff_t dim, NumberFormat format, ptrdiff_t dims,
                      ptrdiff_t queries, real *rows) {
    ptrdiff_t width = dim_vecs(dims) * LANES;
    vec sums = splat(0);
    real sum = 0;
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        for (ptrdiff_t i = 0; i < queries; i++) {
            real *to = rows + (m * REAL_PANELS * PANEL + i) * PANEL;
            ptrdiff_t d = 0, from = m * width, n = dims - from < width ? dims - from : width;
            if (dim == format.bytes)
                for (; d + LANES <= n; d += LANES) {
                    vec x = load_numbers(at[i] + (from + d) * dim, format);
                    store(to + d, x);
                    sums += x * 0;
                }
            for (; d < width; d++) {
                to[d] = d < n ? (real)read_number(at[i] + (from + d) * dim, format) : 0;
                sum += to[d] * 0;
            }
        }
    return sum == 0 && !any_lane(sums != splat(0));
}

/* Read a panel's queries and their gradients as real numbers. */
static void ready_real_queries(const Tile *t, const GradientScratch *g, int p) {
    ptrdiff_t first = p * PANEL, slot = p % REAL_PANELS * PANEL;
    int queries = fewer(t->n_queries - first, PANEL);
    for (int n = 0; n < t->panel[p].vecs; n++)
        load_columns(t->grad_out, t->grad_out_dim, t->grad_out_format, t->value_dim, t->n_queries,
                     1, first + n * LANES, g->grad_out + slot * t->value_dim + n * LANES);
    bool q = load_rows(t->q + first, t->q_dim, t->q_format, t->head_dim, queries, g->q_rows + slot * PANEL);
    bool o = load_rows(t->grad_out + first, t->grad_out_dim, t->grad_out_format, t->value_dim,
                       queries, g->grad_out_rows + slot * PANEL);
    g->finite[p % REAL_PANELS] = q && o;
}

/* grad_scores = V dO^T. */
static void multiply_real_values(const Tile *t, const GradientScratch *g, int p, const Strip *strip,
                                 View v) {
    product(t->panel[p].vecs, strip->keys, v.data, v.row, v.dim, t->value_dim,
            g->grad_out + p % REAL_PANELS * PANEL * t->value_dim, g->grad_scores, false, NULL);
}

/* c[key][dims] of some dim panels (+)= sum over queries of a[key][query] * rows[query][dims]. */
static void sum_queries(ptrdiff_t dims, int keys, int queries, const real *a, const real *rows,
                        real *c, bool accumulate) {
    for (ptrdiff_t m = 0; m < dim_panels(dims); m++)
        product((int)dim_vecs(dims), keys, a, PANEL, 1, queries, rows + m * REAL_PANELS * PANEL * PANEL,
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
                    to[d] += a[j * PANEL + i] * rows[(m * REAL_PANELS * PANEL + i) * PANEL + d];
        }
}

/* Add what the weights and the gradients of the scores make of k, the queries and their gradients. */
static void sum_real_strip(const Tile *t, const GradientScratch *g, int p, const Strip *strip, View k,
                           Begun *begun) {
    int vecs = t->panel[p].vecs, queries = fewer(t->n_queries - p * PANEL, PANEL);
    ptrdiff_t slot = p % REAL_PANELS * PANEL;
    const real *q_rows = g->q_rows + slot * PANEL, *grad_out_rows = g->grad_out_rows + slot * PANEL;
    real *grad_q = g->grad_q + p * PANEL * g->q_rows_of_panel;
    if (strip->seen == SEE_SOME &&
        !(g->finite[p % REAL_PANELS] && all_finite(k, strip->keys, t->head_dim))) {
        Strip grads = *strip;
        grads.scores = g->grad_scores;
        if (!begun->q[p]) memset(grad_q, 0, sizeof(real) * PANEL * (size_t)t->head_dim);
        careful_product(&grads, vecs, k, t->head_dim, grad_q);
        sum_queries_carefully(t->value_dim, strip, queries, strip->scores, grad_out_rows, g->strip_v,
                              begun->keys);
        sum_queries_carefully(t->head_dim, strip, queries, g->grad_scores, q_rows, g->strip_k,
                              begun->keys);
    } else {
        product(vecs, t->head_dim, k.data, k.dim, k.row, strip->keys, g->grad_scores, grad_q, begun->q[p],
                NULL);
        sum_queries(t->value_dim, strip->keys, queries, strip->scores, grad_out_rows, g->strip_v, begun->keys);
        sum_queries(t->head_dim, strip->keys, queries, g->grad_scores, q_rows, g->strip_k, begun->keys);
    }
    begun->q[p] = begun->keys = true;
}

#ifndef PARTS
static void open_panel(const Tile *t, const GradientScratch *g, int p) { ready_real_queries(t, g, p); }

static void ready_for_gradients(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    ready_values(t, s, begin, end);
}

static bool multiply_values(const Tile *t, const GradientScratch *g, int p, const Strip *strip, real *unit) {
    *unit = 1;
    multiply_real_values(t, g, p, strip, values_from(t, &g->forward, strip->key));
    return true;
}

static void sum_strip(const Tile *t, const GradientScratch *g, int p, const Strip *strip, bool fit,
                      Begun *begun) {
    (void)fit;
    sum_real_strip(t, g, p, strip, keys_from(t, &g->forward, strip->key), begun);
}

static void sum_waiting(const Tile *t, const GradientScratch *g, int keys, Begun *begun) {
    (void)t, (void)g, (void)keys, (void)begun;
}
#endif
#endif
