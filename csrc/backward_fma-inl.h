/* The scratch of the backward pass, and its matmuls of real numbers by multiply-adds.
 *
 * dQ^T = K^T dS^T has the form of the forward matmuls. For dV = P^T dO and dK = dS^T Q the rows of
 * P^T and dS^T are broadcast and dims are in the lanes: the same register tile. */
#ifndef FASTATTN_BACKWARD_FMA_INL_H
#define FASTATTN_BACKWARD_FMA_INL_H

#include "convert-inl.h"
#include "masking-inl.h"
#include "matmul.h"
#include "register_tile-inl.h"
#ifndef BF16_TERMS
#include "matmul_fma-inl.h"
#endif

/* How many micropanels are packed as real numbers: one at a time if that is the exception. */
#ifdef BF16_TERMS
#define REAL_MICROPANELS 1
#else
#define REAL_MICROPANELS MICROPANELS
#endif

/* Dims in the lanes are split into micropanels of at most MR_VECS vectors, as evenly as possible.
 */
static ptrdiff_t dim_vecs(ptrdiff_t dims) {
    ptrdiff_t vecs = round_up(dims, LANES) / LANES, micropanels = (vecs + MR_VECS - 1) / MR_VECS;
    return micropanels == 0 ? 1 : (vecs + micropanels - 1) / micropanels;
}
static ptrdiff_t dim_micropanels(ptrdiff_t dims) {
    return (dims + dim_vecs(dims) * LANES - 1) / (dim_vecs(dims) * LANES);
}

struct BackwardScratch {
    Scratch forward;
    ptrdiff_t q_rows_padded;       /* rows of a micropanel in grad_q */
    real *grad_q;                  /* [micropanel][head_dim][MR], from one block */
    real *grad_scores, *slope;     /* [SUB_BLOCK_K][MR] */
    real *unscaled;                /* likewise, the scores before their scale: see keeps_unscaled */
    real *sub_grad_k, *sub_grad_v; /* [dim micropanel][SUB_BLOCK_K][MR dims], from one tile */
    real *grad_k, *grad_v;         /* [dim micropanel][keys of the block][MR dims] */
    real *lse, *lse_rest,
        *delta;     /* [micropanel][MR]; lse in units of scores, and what its rounding lost */
    real *grad_out;  /* [real micropanel][value_dim][MR] */
    real *q_columns; /* [micropanel][head_dim][MR]; of metrics */
    real *q_rows, *grad_out_rows; /* [dim micropanel][query of the real micropanels][MR dims] */
    bool *finite;                 /* [real micropanel]: are its queries and grad_out finite? */
#ifdef BF16_TERMS
    real *real_keys, *real_values; /* [SUB_BLOCK_K][dim] */
    uint16_t
        *rows; /* [term][chunk of dims][query][CHUNK] of one micropanel; see backward_bf16-inl.h */
    uint16_t *value_rows, *key_columns, *weight_rows, *grad_rows;
    uint32_t *grad_out_lanes, *grad_lanes, *q_pairs, *grad_out_pairs;
    uint64_t *special_queries,
        *special_keys; /* [micropanel], [sub-block]: bits of the special ones */
#endif
};

/* Are the scores of a sub-block needed as they are before their scale and the options? */
static bool keeps_unscaled(const Tile *t) {
    return t->wants_scale || t->score_function == DISTANCE;
}

static size_t lay_out_backward(const Tile *t, BackwardScratch *g) {
    char *base = t->scratch;
    size_t bytes = lay_out(t, MICROPANELS, base, &g->forward);
    g->forward.engine = choose_engine(t);
    ptrdiff_t row = MICROPANELS * MR, real_row = REAL_MICROPANELS * MR;
    ptrdiff_t k = dim_micropanels(t->head_dim) * MR, v = dim_micropanels(t->value_dim) * MR;
    g->q_rows_padded = round_up(t->head_dim, ROW_PAD);
#define TAKE(field, count)                                                                         \
    g->field = (void *)((uintptr_t)base + bytes);                                                  \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *g->field * (count), 64);
    TAKE(grad_q, row * g->q_rows_padded)
    TAKE(grad_scores, SUB_BLOCK_K * MR)
    TAKE(slope, SUB_BLOCK_K * MR)
    TAKE(unscaled, keeps_unscaled(t) ? SUB_BLOCK_K * MR : 0)
    TAKE(sub_grad_k, SUB_BLOCK_K * k)
    TAKE(sub_grad_v, SUB_BLOCK_K * v)
    TAKE(grad_k, BLOCK_K * k)
    TAKE(grad_v, BLOCK_K * v)
    TAKE(lse, row)
    TAKE(lse_rest, row)
    TAKE(delta, row)
    TAKE(grad_out, real_row * t->value_dim)
    TAKE(q_columns, t->score_function == DOT ? 0 : row * t->head_dim)
    TAKE(q_rows, real_row * k)
    TAKE(grad_out_rows, real_row * v)
    TAKE(finite, REAL_MICROPANELS)
#ifdef BF16_TERMS
    ptrdiff_t widest = k > v ? k : v, block_k = g->forward.key_rows;
    TAKE(real_keys, SUB_BLOCK_K * t->head_dim)
    TAKE(real_values, SUB_BLOCK_K * t->value_dim)
    TAKE(rows, BF16_TERMS * MR * widest)
    TAKE(value_rows, BF16_TERMS * block_k * v)
    TAKE(key_columns, BF16_TERMS * block_k * g->q_rows_padded)
    TAKE(weight_rows, BF16_TERMS * PENDING_MICROPANELS * SUB_BLOCK_K * MR)
    TAKE(grad_rows, BF16_TERMS * PENDING_MICROPANELS * SUB_BLOCK_K * MR)
    TAKE(grad_out_lanes, BF16_TERMS * row * v / 2)
    TAKE(grad_lanes, BF16_TERMS * MR * SUB_BLOCK_K / 2)
    TAKE(q_pairs, BF16_TERMS * row * k / 2)
    TAKE(grad_out_pairs, BF16_TERMS * row * v / 2)
    TAKE(special_queries, MICROPANELS)
    TAKE(special_keys, BLOCK_K / SUB_BLOCK_K)
#endif
#undef TAKE
    return bytes;
}

static size_t backward_scratch_bytes(const Tile *t) {
    BackwardScratch g;
    return lay_out_backward(t, &g);
}

/* What has been added to the sums. */
struct Accumulated {
    bool q[MICROPANELS], keys; /* for each micropanel's queries, for the sub-block's keys */
    uint32_t
        pending; /* bits of the micropanels whose part of the sub-block's keys is to be added */
};

/* rows[dim micropanel][query][MR dims], 0 after the last dim. Returns whether all are finite. */
static bool load_rows(const char *const *at, ptrdiff_t dim, NumberFormat format, ptrdiff_t dims,
                      ptrdiff_t queries, real *rows) {
    ptrdiff_t width = dim_vecs(dims) * LANES;
    vec sums = splat(0);
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++)
        for (ptrdiff_t i = 0; i < queries; i++) {
            real *to = rows + (m * REAL_MICROPANELS * MR + i) * MR;
            ptrdiff_t from = m * width, n = dims - from < width ? dims - from : width;
            for (ptrdiff_t d = 0; d < width; d += LANES) {
                const char *row = at[i] + (from + d) * dim;
                vec x = splat(0);
                if (dim == format.bytes && d + LANES <= n) x = load_numbers(row, format);
                else if (d < n) x = load_strided(row, dim, n - d, format);
                store(to + d, x);
                sums += x * 0;
            }
        }
    return !any_lane(sums != splat(0));
}

/* Pack a micropanel's queries and grad_out as real numbers. */
static void pack_real_queries(const Tile *t, const BackwardScratch *g, int p) {
    ptrdiff_t first = p * MR, slot = p % REAL_MICROPANELS * MR;
    int queries = fewer(t->n_queries - first, MR);
    for (int n = 0; n < t->micropanel[p].vecs; n++)
        load_columns(t->grad_out, t->grad_out_dim, t->grad_out_format, t->value_dim, t->n_queries,
                     1, first + n * LANES, g->grad_out + slot * t->value_dim + n * LANES);
    bool q =
        load_rows(t->q + first, t->q_dim, t->q_format, t->head_dim, queries, g->q_rows + slot * MR);
    bool o = load_rows(t->grad_out + first, t->grad_out_dim, t->grad_out_format, t->value_dim,
                       queries, g->grad_out_rows + slot * MR);
    g->finite[p % REAL_MICROPANELS] = q && o;
}

/* grad_scores = V dO^T. */
static void multiply_real_values(const Tile *t, const BackwardScratch *g, int p,
                                 const SubBlock *sub, View v) {
    int vecs = t->micropanel[p].vecs;
    matmul(vecs, sub->keys, v.data, v.row, v.dim, t->value_dim, block_d(vecs, t->value_dim),
           g->grad_out + p % REAL_MICROPANELS * MR * t->value_dim, g->grad_scores, false, NULL);
}

/* c[key][dims] of some dim micropanels (+)= sum over queries of a[key][query] * rows[query][dims].
 */
static void sum_queries(ptrdiff_t dims, int keys, int queries, const real *a, const real *rows,
                        real *c, bool accumulate) {
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++)
        matmul((int)dim_vecs(dims), keys, a, MR, 1, queries, queries,
               rows + m * REAL_MICROPANELS * MR * MR, c + m * SUB_BLOCK_K * MR, accumulate, NULL);
}

/* The same, leaving out queries that a key is hidden from, which may be NaN or Inf. */
static void sum_queries_masked(ptrdiff_t dims, const SubBlock *sub, int queries, const real *a,
                               const real *rows, real *c, bool accumulate) {
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++)
        for (int j = 0; j < sub->keys; j++) {
            real *to = c + (m * SUB_BLOCK_K + j) * MR;
            for (ptrdiff_t d = 0; d < MR && !accumulate; d++) to[d] = 0;
            for (int i = 0; i < queries; i++)
                for (ptrdiff_t d = 0; d < MR && visible_lanes(sub, i / LANES, j)[i % LANES] < 0;
                     d++)
                    to[d] += a[j * MR + i] * rows[(m * REAL_MICROPANELS * MR + i) * MR + d];
        }
}

/* Add K^T dS^T, P^T dO and dS^T Q of real numbers. */
static void sum_real_sub_block(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub,
                               View k, Accumulated *sums) {
    int vecs = t->micropanel[p].vecs, queries = fewer(t->n_queries - p * MR, MR);
    ptrdiff_t slot = p % REAL_MICROPANELS * MR;
    const real *q_rows = g->q_rows + slot * MR, *grad_out_rows = g->grad_out_rows + slot * MR;
    real *grad_q = g->grad_q + p * MR * g->q_rows_padded;
    if (sub->visibility == PARTIAL &&
        !(g->finite[p % REAL_MICROPANELS] && all_finite(k, sub->keys, t->head_dim))) {
        SubBlock grads = *sub;
        grads.scores = g->grad_scores;
        if (!sums->q[p]) memset(grad_q, 0, sizeof(real) * MR * (size_t)t->head_dim);
        masked_matmul(&grads, vecs, k, t->head_dim, grad_q);
        sum_queries_masked(t->value_dim, sub, queries, sub->scores, grad_out_rows, g->sub_grad_v,
                           sums->keys);
        sum_queries_masked(t->head_dim, sub, queries, g->grad_scores, q_rows, g->sub_grad_k,
                           sums->keys);
    } else {
        matmul(vecs, t->head_dim, k.data, k.dim, k.row, sub->keys, sub->keys, g->grad_scores,
               grad_q, sums->q[p], NULL);
        sum_queries(t->value_dim, sub->keys, queries, sub->scores, grad_out_rows, g->sub_grad_v,
                    sums->keys);
        sum_queries(t->head_dim, sub->keys, queries, g->grad_scores, q_rows, g->sub_grad_k,
                    sums->keys);
    }
    sums->q[p] = sums->keys = true;
}

#ifndef BF16_TERMS
#include "metric_gradients-inl.h"

static void begin_micropanel(const Tile *t, const BackwardScratch *g, int p) {
    pack_real_queries(t, g, p);
    for (int n = 0; n < t->micropanel[p].vecs && t->score_function != DOT; n++)
        load_columns(t->q, t->q_dim, t->q_format, t->head_dim, t->n_queries, 1,
                     p * MR + n * LANES, g->q_columns + p * MR * t->head_dim + n * LANES);
}

static void pack_for_gradients(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    fma_pack_values(t, s, begin, end);
}

static bool multiply_values(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub,
                            real *unit) {
    *unit = 1;
    multiply_real_values(t, g, p, sub, values_from(t, &g->forward, sub->key));
    return true;
}

static void sum_sub_block(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub,
                          bool fit, Accumulated *sums) {
    (void)fit;
    View k = keys_from(t, &g->forward, sub->key);
    if (t->score_function == DOT) sum_real_sub_block(t, g, p, sub, k, sums);
    else sum_metric_sub_block(t, g, p, sub, k, sums);
}

static void flush_pending(const Tile *t, const BackwardScratch *g, int keys, Accumulated *sums) {
    (void)t, (void)g, (void)keys, (void)sums;
}
#endif
#endif
