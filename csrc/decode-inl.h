/* The engine for decoding: few queries, with dims in the lanes.
 *
 * A decoding step has one query, or one for each head of a group, so its time is that of reading
 * all keys and values once. Numbers are widened in registers, and some queries share each load. The
 * sums over lanes of LANES keys are made together. Scores and weights have the same layout as with
 * queries in the lanes, so the steps between the matmuls are the same. */
#ifndef FASTATTN_DECODE_INL_H
#define FASTATTN_DECODE_INL_H

#include "convert-inl.h"
#include "distances-inl.h"
#include "masking-inl.h"
#include "matmul.h"
#include "matmul_fma-inl.h"
#include "online_softmax_fma-inl.h"
#include "tangents-inl.h"

/* Rows of contiguous numbers: in place, or widened. */
typedef struct {
    const char *data;
    ptrdiff_t row, ahead; /* bytes to the next, and to the one to prefetch */
} DecodeRows;

/* The key to prefetch with this one; beyond the last there may be no page. */
static ptrdiff_t prefetched_key(const Tile *t, ptrdiff_t key) {
    return key + DECODE_PREFETCH_ROWS < t->last ? key + DECODE_PREFETCH_ROWS : t->last - 1;
}

/* Rows whose numbers are not contiguous are widened, without their scales. */
static NumberFormat decode_format(ptrdiff_t dim, NumberFormat format) {
    return dim == format.bytes ? format : (NumberFormat){'f', sizeof(real), 0};
}
static DecodeRows decode_rows(const char *at, ptrdiff_t row, ptrdiff_t ahead, ptrdiff_t dim,
                              NumberFormat format, int rows, ptrdiff_t dims, real *to) {
    if (dim == format.bytes) return (DecodeRows){at, row, ahead};
    widen(at, row, dim, format, NULL, 0, rows, dims, to);
    return (DecodeRows){(const char *)to, dims * (ptrdiff_t)sizeof(real), 0};
}
static DecodeRows decode_keys(const Tile *t, const Scratch *s, ptrdiff_t key, int keys) {
    const char *at = key_at(t, key);
    ptrdiff_t ahead = DECODE_PREFETCH_ROWS * t->k_key;
    if (t->pages) ahead = key_at(t, prefetched_key(t, key)) - at;
    return decode_rows(at, t->k_key, ahead, t->k_dim, t->k_format, keys, t->head_dim,
                       s->decode_rows);
}
static DecodeRows decode_values(const Tile *t, const Scratch *s, ptrdiff_t key, int keys) {
    const char *at = value_at(t, key);
    ptrdiff_t ahead = DECODE_PREFETCH_ROWS * t->v_key;
    if (t->pages) ahead = value_at(t, prefetched_key(t, key)) - at;
    return decode_rows(at, t->v_key, ahead, t->v_dim, t->v_format, keys, t->value_dim,
                       s->decode_rows);
}

/* q[query][dims], padded with 0. */
static void decode_pack_queries(Tile *t, const Scratch *s, int p) {
    (void)p;
    ptrdiff_t padded = round_up(t->head_dim, LANES);
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        real *q = s->q + i * padded;
        for (ptrdiff_t d = t->head_dim; d < padded; d++) q[d] = 0;
        widen(t->q[i], 0, t->q_dim, t->q_format, NULL, 0, 1, t->head_dim, q);
        for (ptrdiff_t d = 0; d < t->head_dim; d++) q[d] *= (real)t->q_scale;
    }
    if (t->score_function == ADDITIVE) pack_dim_weights(t, s);
}

/* Keys and values are widened in the registers. */
static void decode_pack_nothing(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    (void)t, (void)s, (void)begin, (void)end;
}

/* One prefetch for each line of a row, whose next LANES numbers begin at these bytes. */
INLINE void decode_prefetch(const char *row, ptrdiff_t bytes, ptrdiff_t ahead) {
    if (bytes % 64 == 0) __builtin_prefetch(row + bytes + ahead, 0, 3);
}

/* sum[query][key] += the products of LANES dims from `d` on, of which `dims` are there. */
INLINE void decode_multiply_dims(const int queries, const real *q, ptrdiff_t padded,
                                 const char *const rows[DECODE_KEYS], ptrdiff_t d, ptrdiff_t dims,
                                 ptrdiff_t ahead, const float *const scales[DECODE_KEYS],
                                 NumberFormat format, vec sum[DECODE_QUERIES][DECODE_KEYS]) {
    vec key[DECODE_KEYS];
    ptrdiff_t bytes = dim_offset(format, d);
#pragma GCC unroll 4
    for (int n = 0; n < DECODE_KEYS; n++) {
        decode_prefetch(rows[n], bytes, ahead);
        key[n] = load_some(rows[n] + bytes, dims, format);
        if (format.kind == '4') key[n] *= scales[n][d / INT4_GROUP];
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) {
        vec query = load(q + i * padded + d);
#pragma GCC unroll 4
        for (int n = 0; n < DECODE_KEYS; n++) sum[i][n] += query * key[n];
    }
}

/* scores[key][query] of LANES keys, whose scales are `groups` floats apart. */
INLINE void decode_score_group(const int queries, const real *q, DecodeRows k, int keys,
                               ptrdiff_t dims, const float *scales, ptrdiff_t groups, real *scores,
                               NumberFormat format) {
    ptrdiff_t padded = round_up(dims, LANES);
    vec x[DECODE_QUERIES][LANES];
    for (int j = 0; j < LANES; j += DECODE_KEYS) {
        const char *rows[DECODE_KEYS];
        const float *own_scales[DECODE_KEYS] = {NULL};
        vec sum[DECODE_QUERIES][DECODE_KEYS];
#pragma GCC unroll 4
        for (int n = 0; n < DECODE_KEYS; n++) {
            int key = j + n < keys ? j + n : keys - 1;
            rows[n] = k.data + key * k.row;
            if (format.kind == '4') own_scales[n] = scales + key * groups;
        }
        ptrdiff_t begin = 0;
        do { /* there is a dim */
            ptrdiff_t end = begin + fewer(dims - begin, DECODE_BLOCK_D), d = begin;
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
                for (int n = 0; n < DECODE_KEYS; n++) sum[i][n] = splat(0);
            for (; d + LANES <= end; d += LANES)
                decode_multiply_dims(queries, q, padded, rows, d, LANES, k.ahead, own_scales,
                                     format, sum);
            if (d < end)
                decode_multiply_dims(queries, q, padded, rows, d, end - d, k.ahead, own_scales,
                                     format, sum);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
                for (int n = 0; n < DECODE_KEYS; n++)
                    x[i][j + n] = begin > 0 ? x[i][j + n] + sum[i][n] : sum[i][n];
            begin += DECODE_BLOCK_D;
        } while (begin < dims);
    }
    for (int i = 0; i < queries; i++) {
        vec sums = sum_lanes(x[i]);
        bool scaled = scales && format.kind != '4';
        for (int j = 0; j < keys; j++)
            scores[j * MR + i] = scaled ? sums[j] * scales[j * groups] : sums[j];
    }
}

INLINE void decode_scores(const Tile *t, const Scratch *s, const SubBlock *sub,
                          NumberFormat format) {
    ptrdiff_t padded = round_up(t->head_dim, LANES), key = sub->key;
    for (int first = 0, keys; first < sub->keys; first += keys) {
        keys = adjacent_keys(t, key + first, fewer(sub->keys - first, LANES));
        int i = 0;
        real *scores = sub->scores + first * MR;
        const float *scales = key_scales(t, key + first);
        ptrdiff_t groups = key_scales_row(t);
        DecodeRows k = decode_keys(t, s, key + first, keys);
        for (int j = 0; j < keys; j++) store(scores + j * MR, splat(0));
#define GROUP(queries)                                                                             \
    for (; i + queries <= t->n_queries; i += queries)                                              \
        decode_score_group(queries, s->q + i * padded, k, keys, t->head_dim, scales, groups,       \
                           scores + i, format);
        GROUP(4)
        GROUP(2)
        GROUP(1)
#undef GROUP
    }
}

/* sums[query][dims] += the weighted sum of some rows, of `dims` of `vecs` vectors from dim `first`
 * on. The scales of int4 rows are `groups` floats apart. */
INLINE void decode_add_rows(const int queries, const int vecs, DecodeRows v, int rows,
                            const real *weights, const float *scales, ptrdiff_t groups,
                            ptrdiff_t first, ptrdiff_t dims, ptrdiff_t padded, real *sums,
                            NumberFormat format) {
    v.data += dim_offset(format, first);
    sums += first;
    vec sum[DECODE_QUERIES][8];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int n = 0; n < vecs; n++) sum[i][n] = load(sums + i * padded + n * LANES);
    for (int j = 0; j < rows; j++, v.data += v.row, weights += MR) {
        vec value[8];
#pragma GCC unroll 8
        for (int n = 0; n < vecs; n++) {
            ptrdiff_t bytes = dim_offset(format, n * LANES);
            decode_prefetch(v.data, bytes, v.ahead);
            value[n] = load_some(v.data + bytes, dims - n * LANES, format);
            if (format.kind == '4')
                value[n] *= scales[j * groups + (first + n * LANES) / INT4_GROUP];
        }
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++) {
            vec weight = splat(weights[i]);
#pragma GCC unroll 8
            for (int n = 0; n < vecs; n++) sum[i][n] += weight * value[n];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int n = 0; n < vecs; n++) store(sums + i * padded + n * LANES, sum[i][n]);
}

/* decode_add_rows for all dims, in as many vectors at a time as the registers hold sums of. */
INLINE void decode_add_group(const int queries, DecodeRows v, int rows, const real *weights,
                             const float *scales, ptrdiff_t groups, ptrdiff_t dims, real *sums,
                             NumberFormat format) {
    const int vecs = NR * MR_VECS < 24 ? 8 / queries : queries > 2 ? 4 : 8;
    ptrdiff_t padded = round_up(dims, LANES), d = 0;
#define VECS(n)                                                                                    \
    for (; n <= vecs && d + n * LANES <= dims; d += n * LANES)                                     \
        decode_add_rows(queries, n, v, rows, weights, scales, groups, d, n *LANES, padded, sums,   \
                        format);
    VECS(8)
    VECS(4)
    VECS(2)
    VECS(1)
#undef VECS
    if (d < dims)
        decode_add_rows(queries, 1, v, rows, weights, scales, groups, d, dims - d, padded, sums,
                        format);
}

/* decode_sums[query][dims] += the weighted sum of a sub-block's values. If some keys are hidden,
 * each query adds only its visible ones, because a hidden value may be NaN or Inf. */
INLINE void decode_add_values(const Tile *t, const Scratch *s, const SubBlock *sub,
                              NumberFormat format) {
    ptrdiff_t padded = round_up(t->value_dim, LANES), key = sub->key;
    for (int first = 0, keys; first < sub->keys; first += keys) {
        keys = adjacent_keys(t, key + first, fewer(sub->keys - first, LANES));
        int i = 0;
        const float *scales = value_scales(t, key + first);
        ptrdiff_t groups = value_scales_row(t);
        const real *weights = sub->scores + first * MR;
        real scaled[LANES * MR] __attribute__((aligned(64)));
        if (scales && format.kind != '4') { /* a scale for each row */
            for (int j = 0; j < keys; j++)
                store(scaled + j * MR, load(weights + j * MR) * (real)scales[j * groups]);
            weights = scaled;
        }
        DecodeRows v = decode_values(t, s, key + first, keys);
        for (; i < t->n_queries && sub->visibility == PARTIAL; i++)
            for (int j = 0; j < keys; j++)
                if (visible_lanes(sub, 0, first + j)[i] < 0)
                    decode_add_group(1, (DecodeRows){v.data + j * v.row, 0, 0}, 1,
                                     weights + j * MR + i, scales ? scales + j * groups : NULL,
                                     groups, t->value_dim, s->decode_sums + i * padded, format);
#define GROUP(queries)                                                                             \
    for (; i + queries <= t->n_queries; i += queries)                                              \
        decode_add_group(queries, v, keys, weights + i, scales, groups, t->value_dim,              \
                         s->decode_sums + i * padded, format);
        GROUP(4)
        GROUP(2)
        GROUP(1)
#undef GROUP
    }
}

/* out[d][query] = decode_sums[query][d]. */
static void transpose_decode_sums(const Tile *t, const Scratch *s, real *out) {
    ptrdiff_t padded = round_up(t->value_dim, LANES);
    for (ptrdiff_t d = 0; d < t->value_dim; d++) {
        store(out + d * MR, splat(0));
        for (ptrdiff_t i = 0; i < t->n_queries; i++)
            out[d * MR + i] = s->decode_sums[i * padded + d];
    }
}

/* A Metric with MR keys at a time in the lanes: metrics[query][key]. */
static void decode_metric(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                          ScoreTerm terms, View k, real *to) {
    (void)p, (void)k;
    ptrdiff_t padded = round_up(t->head_dim, LANES);
    real metrics[MAX_DECODE_ROWS * MR] __attribute__((aligned(64)));
    for (int first = 0; first < sub->keys; first += MR) {
        int keys = fewer(sub->keys - first, MR), vecs = (keys + LANES - 1) / LANES;
        const char *rows[MR];
        for (int j = 0; j < keys; j++) rows[j] = key_at(t, sub->key + first + j);
        for (int n = 0; n < vecs; n++)
            load_columns(rows, t->k_dim, t->k_format, t->head_dim, keys, 1, n * LANES,
                         s->key_columns + n * LANES);
        MetricOperands x = {.a = s->q,
                            .row = padded,
                            .dim = 1,
                            .b = s->key_columns,
                            .weights = s->weights,
                            .dims = t->head_dim};
        metric_matrix(terms, vecs, &x, t->n_queries, metrics);
        for (int j = 0; j < keys; j++) {
            store(to + (first + j) * MR,
                  splat(1)); /* any number will do for lanes without a query */
            for (ptrdiff_t i = 0; i < t->n_queries; i++)
                to[(first + j) * MR + i] = metrics[i * MR + j];
        }
    }
}

static void decode_multiply_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                                 vec *top) {
    if (t->score_function == DOT)
        WITH_STORED_FORMAT(decode_format(t->k_dim, t->k_format), decode_scores, t, s, sub);
    else metric_scores(t, s, p, sub, (View){0}, decode_metric);
    take_max(1, sub, top);
}

static void decode_sum_values(const Tile *t, const Scratch *s, int p, BlockState *b, int sub_blocks,
                              real *out) {
    memset(s->decode_sums, 0,
           sizeof(real) * (size_t)(t->n_queries * round_up(t->value_dim, LANES)));
    for (int i = 0; i < sub_blocks; i++) {
        const SubBlock *sub = &b->sub_blocks[i];
        if (sub->visibility == EMPTY) continue;
        weigh(1, t->exponent, sub, b->top, b->sum);
        if (t->has_dropout) drop_weights(t, s, p, sub);
        WITH_STORED_FORMAT(decode_format(t->v_dim, t->v_format), decode_add_values, t, s, sub);
    }
    transpose_decode_sums(t, s, out);
}

static void decode_attend_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end) {
    attend_whole_block(t, s, p, begin, end, decode_sum_values);
}

static const MatmulEngine DECODE_ENGINE = {
    .pack_queries = decode_pack_queries,
    .pack_keys = decode_pack_nothing,
    .pack_values = decode_pack_nothing,
    .multiply_keys = decode_multiply_keys,
    .attend_block = decode_attend_block,
};

/* Gradients recompute the weights as exp(score - lse), so their scores must be the same bit for
 * bit. The other matmuls have queries in the lanes. */
static const MatmulEngine DECODE_SCORES_ENGINE = {
    .pack_queries = decode_pack_queries,
    .pack_keys = fma_pack_keys,
    .pack_values = fma_pack_values,
    .multiply_keys = decode_multiply_keys,
    .attend_block = decode_attend_block,
};

static const MatmulEngine *choose_engine(const Tile *t) {
    if (t->forward_mode) return &TANGENTS_ENGINE;
    if (t->n_queries > MAX_DECODE_ROWS) return &FMA_ENGINE;
    return t->differentiating ? &DECODE_SCORES_ENGINE : &DECODE_ENGINE;
}
#endif
