/* Attention under a sparse mask: the keys of a query are gathered, with dimensions in the lanes.
 *
 * Compiled once for each instruction set and dtype of sums, as tile.c is. The scores of a run of
 * listed keys are made at a time, then their weights, then the sum of their values (online softmax:
 * Milakov and Gimelshein 2018, algorithm 3). All score functions are symmetric, so the same loops
 * compare a key with the queries that see it: these make the gradients of keys, each by itself.
 * Products are scaled once they are summed, so that both ways make the same scores, bit for bit.
 */
#include "sparse.h"

#pragma GCC diagnostic ignored "-Wunused-function" /* of what tile.c alone needs */

#include "decode-inl.h"
#include "distances-inl.h"
#include "range-inl.h"

/* Listed rows whose scores are kept at a time, and whose sums start from zero: see BLOCK_K. */
#define LIST BLOCK_K

/* What is summed of a listed row: its numbers, those of its difference from another vector, or
 * 1 - tanh^2 of their sum. */
typedef enum { NUMBERS, DIFFERENCES, TANH_SLOPES } Term;

typedef struct {
    real *own, *own_v;             /* the vectors that others are compared with, padded by 0 */
    real *dim_weights;             /* of ADDITIVE, padded by 0 */
    real *sum, *sum_v;             /* of one list */
    real *total, *total_v;         /* of all */
    real *gathered;                /* [LANES][dims]: rows whose numbers have gaps between them */
    real *scores, *capped, *bias, *distance, *root, *weights, *grads; /* [LIST] */
    double *exact;                 /* [value_dim] */
    ptrdiff_t *index;              /* [LIST]: the listed rows that take part */
} SparseScratch;

static size_t lay_out_sparse(const Tile *t, char *base, SparseScratch *s) {
    size_t bytes = 0;
    ptrdiff_t dims = round_up(t->head_dim, LANES), value_dims = round_up(t->value_dim, LANES);
#define TAKE(field, count)                                                                         \
    s->field = (void *)((uintptr_t)base + bytes);                                                  \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *s->field * (count), 64);
    TAKE(own, dims)
    TAKE(own_v, value_dims)
    TAKE(dim_weights, dims)
    TAKE(sum, dims)
    TAKE(sum_v, value_dims)
    TAKE(total, dims)
    TAKE(total_v, value_dims)
    TAKE(gathered, LANES * (dims > value_dims ? dims : value_dims))
    TAKE(scores, LIST)
    TAKE(capped, LIST)
    TAKE(bias, LIST)
    TAKE(distance, LIST)
    TAKE(root, LIST)
    TAKE(weights, LIST)
    TAKE(grads, LIST)
    TAKE(exact, value_dims)
    TAKE(index, LIST)
#undef TAKE
    return bytes;
}

static size_t sparse_scratch_bytes(const Tile *t) {
    SparseScratch s;
    return lay_out_sparse(t, NULL, &s);
}

/* ---- Gathered rows ---- */

/* Rows of an operand. */
typedef struct {
    const char *data;
    ptrdiff_t row, dim, dims;
    NumberFormat format;
} Gather;

static Gather queries_of(const Tile *t, const SparseHead *h) {
    return (Gather){h->q, h->q_row, t->q_dim, t->head_dim, t->q_format};
}
static Gather keys_of(const Tile *t, const SparseHead *h) {
    return (Gather){h->k, t->k_key, t->k_dim, t->head_dim, t->k_format};
}
static Gather values_of(const Tile *t, const SparseHead *h) {
    return (Gather){h->v, t->v_key, t->v_dim, t->value_dim, t->v_format};
}
static Gather grad_outs_of(const Tile *t, const SparseHead *h) {
    return (Gather){h->grad_out, h->grad_out_row, t->grad_out_dim, t->value_dim,
                    t->grad_out_format};
}

/* One row as `real` numbers, padded by 0. */
static void load_row(Gather x, ptrdiff_t row, real *to) {
    for (ptrdiff_t d = x.dims; d < round_up(x.dims, LANES); d++) to[d] = 0;
    widen(x.data + row * x.row, 0, x.dim, x.format, NULL, 0, 1, x.dims, to);
}

/* Where LANES listed rows are, or no more than are listed; the last is repeated. */
static NumberFormat point_to_rows(Gather x, const ptrdiff_t *index, int n, real *gathered,
                                  const char *rows[LANES]) {
    for (int j = 0; j < LANES; j++) rows[j] = x.data + index[j < n ? j : n - 1] * x.row;
    if (x.dim == x.format.bytes) return x.format;
    ptrdiff_t padded = round_up(x.dims, LANES);
    for (int j = 0; j < LANES; j++) {
        real *to = gathered + j * padded;
        if (j < n) widen(rows[j], 0, x.dim, x.format, NULL, 0, 1, x.dims, to);
        rows[j] = (const char *)(j < n ? to : gathered + (n - 1) * padded);
    }
    return (NumberFormat){'f', sizeof(real), 0};
}

/* to[j]: how a vector compares with each of LANES rows, before roots and scales. */
INLINE void compare_rows(const ScoreFunction function, const real *own, const real *dim_weights,
                         const char *const *rows, ptrdiff_t dims, real *to, NumberFormat format) {
    vec x[LANES] = {{0}};
#pragma GCC unroll 8
    for (int j = 0; j < LANES; j += DECODE_KEYS) {
        vec sum[DECODE_KEYS];
        for (ptrdiff_t begin = 0; begin < dims; begin += DECODE_BLOCK_D) {
            ptrdiff_t end = begin + fewer(dims - begin, DECODE_BLOCK_D);
#pragma GCC unroll 4
            for (int n = 0; n < DECODE_KEYS; n++) sum[n] = splat(0);
            for (ptrdiff_t d = begin; d < end; d += LANES) {
                vec a = load(own + d);
#pragma GCC unroll 4
                for (int n = 0; n < DECODE_KEYS; n++) {
                    vec b = load_some(rows[j + n] + d * format.bytes, dims - d, format);
                    if (function == DOT) sum[n] += a * b;
                    else if (function == ADDITIVE) sum[n] += load(dim_weights + d) * tanh_vec(a + b);
                    else sum[n] += (a - b) * (a - b);
                }
            }
#pragma GCC unroll 4
            for (int n = 0; n < DECODE_KEYS; n++)
                x[j + n] = begin > 0 ? x[j + n] + sum[n] : sum[n];
        }
    }
    store(to, sum_lanes(x));
}

INLINE void compare_products(const real *own, const real *w, const char *const *rows,
                             ptrdiff_t dims, real *to, NumberFormat format) {
    compare_rows(DOT, own, w, rows, dims, to, format);
}
INLINE void compare_tanhs(const real *own, const real *w, const char *const *rows, ptrdiff_t dims,
                          real *to, NumberFormat format) {
    compare_rows(ADDITIVE, own, w, rows, dims, to, format);
}
INLINE void compare_squares(const real *own, const real *w, const char *const *rows, ptrdiff_t dims,
                            real *to, NumberFormat format) {
    compare_rows(DISTANCE, own, w, rows, dims, to, format);
}

/* to[j] of n listed rows, padded to whole vectors. */
static void compare(ScoreFunction function, const SparseScratch *s, const real *own, Gather x,
                    int n, real *to) {
    for (int j = 0; j < n; j += LANES) {
        const char *rows[LANES];
        NumberFormat format = point_to_rows(x, s->index + j, fewer(n - j, LANES), s->gathered, rows);
        if (function == DOT)
            WITH_FORMAT(format, compare_products, own, s->dim_weights, rows, x.dims, to + j);
        else if (function == ADDITIVE)
            WITH_FORMAT(format, compare_tanhs, own, s->dim_weights, rows, x.dims, to + j);
        else WITH_FORMAT(format, compare_squares, own, s->dim_weights, rows, x.dims, to + j);
    }
}

/* sum[d] += the weighted terms of n rows, of `vecs` vectors of dims. */
INLINE void add_vecs(const Term term, const int vecs, const real *own, const char *const *rows,
                     int n, const real *weights, ptrdiff_t d, ptrdiff_t dims, real *sum,
                     NumberFormat format) {
    vec total[8];
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) total[i] = load(sum + d + i * LANES);
    for (int j = 0; j < n; j++) {
        vec weight = splat(weights[j]);
        const char *row = rows[j] + d * format.bytes;
#pragma GCC unroll 8
        for (int i = 0; i < vecs; i++) {
            ptrdiff_t at = i * LANES;
            vec x = load_some(row + at * format.bytes, dims - d - at, format);
            if (term == DIFFERENCES) x = load(own + d + at) - x;
            if (term == TANH_SLOPES) {
                vec tanh = tanh_vec(load(own + d + at) + x);
                x = 1 - tanh * tanh;
            }
            total[i] += weight * x;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) store(sum + d + i * LANES, total[i]);
}

INLINE void add_rows_of(const Term term, const real *own, const char *const *rows, int n,
                        const real *weights, ptrdiff_t dims, real *sum, NumberFormat format) {
    ptrdiff_t d = 0;
    for (; d + 8 * LANES <= dims; d += 8 * LANES)
        add_vecs(term, 8, own, rows, n, weights, d, dims, sum, format);
    for (; d + 4 * LANES <= dims; d += 4 * LANES)
        add_vecs(term, 4, own, rows, n, weights, d, dims, sum, format);
    for (; d < dims; d += LANES) add_vecs(term, 1, own, rows, n, weights, d, dims, sum, format);
}
INLINE void add_numbers(const real *own, const char *const *rows, int n, const real *weights,
                        ptrdiff_t dims, real *sum, NumberFormat format) {
    add_rows_of(NUMBERS, own, rows, n, weights, dims, sum, format);
}
INLINE void add_differences(const real *own, const char *const *rows, int n, const real *weights,
                            ptrdiff_t dims, real *sum, NumberFormat format) {
    add_rows_of(DIFFERENCES, own, rows, n, weights, dims, sum, format);
}
INLINE void add_tanh_slopes(const real *own, const char *const *rows, int n, const real *weights,
                            ptrdiff_t dims, real *sum, NumberFormat format) {
    add_rows_of(TANH_SLOPES, own, rows, n, weights, dims, sum, format);
}

/* sum = the weighted terms of n listed rows. */
static void weighted_sum(Term term, const SparseScratch *s, const real *own, Gather x, int n,
                         const real *weights, real *sum) {
    memset(sum, 0, sizeof(real) * (size_t)round_up(x.dims, LANES));
    for (int j = 0; j < n; j += LANES) {
        int some = fewer(n - j, LANES);
        const char *rows[LANES];
        NumberFormat format = point_to_rows(x, s->index + j, some, s->gathered, rows);
        if (term == NUMBERS)
            WITH_FORMAT(format, add_numbers, own, rows, some, weights + j, x.dims, sum);
        else if (term == DIFFERENCES)
            WITH_FORMAT(format, add_differences, own, rows, some, weights + j, x.dims, sum);
        else WITH_FORMAT(format, add_tanh_slopes, own, rows, some, weights + j, x.dims, sum);
    }
}

/* total = total * factor + sum. */
static void add_sum(ptrdiff_t dims, real factor, const real *sum, real *total) {
    for (ptrdiff_t d = 0; d < dims; d += LANES)
        store(total + d, load(total + d) * factor + load(sum + d));
}

/* ---- Which pairs are seen ---- */

static ptrdiff_t item_of(const SparseLists *lists, ptrdiff_t at) {
    const char *item = lists->items + at * lists->item_bytes;
    return lists->item_bytes == 4 ? *(const int32_t *)item : (ptrdiff_t) * (const int64_t *)item;
}

static ptrdiff_t first_key(const SparseHead *h, ptrdiff_t i) {
    ptrdiff_t first = i + h->offset - h->left;
    if (h->start) {
        ptrdiff_t start = *(const int64_t *)(h->start + i * h->start_row);
        if (start > first) first = start;
    }
    return first;
}
static ptrdiff_t end_of_keys(const SparseHead *h, ptrdiff_t i) {
    ptrdiff_t end = i + h->offset + h->right + 1;
    if (h->length < end) end = h->length;
    if (h->stop) {
        ptrdiff_t stop = *(const int64_t *)(h->stop + i * h->stop_row);
        if (stop < end) end = stop;
    }
    return end;
}

/* The first place of [begin, end) in the lists whose item is `least` or more. */
static ptrdiff_t lower_bound(const SparseLists *lists, ptrdiff_t begin, ptrdiff_t end,
                             ptrdiff_t least) {
    while (begin < end) {
        ptrdiff_t middle = begin + (end - begin) / 2;
        if (item_of(lists, middle) < least) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

/* Read the bias of a pair into the list; false if it hides the key. */
INLINE bool read_bias(const Tile *t, const SparseHead *h, const SparseScratch *s, ptrdiff_t i,
                      ptrdiff_t j, int n) {
    const char *at = h->bias + i * h->bias_row + j * t->bias_key;
    real b;
    if (is_real(t->bias_format)) memcpy(&b, at, sizeof b);
    else b = as_real(read_number(at, t->bias_format));
    s->bias[n] = b;
    return b != -INFINITY;
}

/* The next pairs of a list that are seen, at most LIST of them, from `*at` on. Of a query `fixed` the
 * keys are listed, which `*at` to `end` are within its interval; or the queries of a key. */
static int next_pairs(const Tile *t, const SparseHead *h, const SparseScratch *s,
                      const SparseLists *lists, bool by_key, ptrdiff_t fixed, ptrdiff_t *at,
                      ptrdiff_t end) {
    int n = 0;
    for (; *at < end && n < LIST; ++*at) {
        ptrdiff_t item = item_of(lists, *at);
        ptrdiff_t i = by_key ? item : fixed, j = by_key ? fixed : item;
        if (by_key && (j < first_key(h, i) || j >= end_of_keys(h, i))) continue;
        if (t->has_bias && !read_bias(t, h, s, i, j, n)) continue;
        if (t->has_alibi) s->distance[n] = (real)fabs((double)(i + h->offset - j));
        s->index[n++] = item;
    }
    return n;
}

/* ---- Scores ---- */

/* The score of a pair as the definition has it. */
static real exact_pair(Tile *t, const SparseHead *h, ptrdiff_t i, ptrdiff_t j) {
    t->q[0] = h->q + i * h->q_row;
    t->k = h->k;
    t->k_scales = h->k_scales;
    if (h->bias) t->bias[0] = h->bias + i * h->bias_row;
    t->slope[0] = h->slope;
    t->position[0] = i + h->offset;
    return exact_score(t, 0, j);
}

/* |own - row| where its square is too small to have all its digits. */
static real near_distance(const SparseScratch *s, Gather x, ptrdiff_t row) {
    double most = 0, sum = 0;
    for (int pass = 0; pass < 2; pass++)
        for (ptrdiff_t d = 0; d < x.dims; d++) {
            const char *at = x.data + row * x.row + d * x.dim;
            double away = fabs(s->own[d] - read_number(at, x.format));
            if (pass == 0) most = fmax(most, away);
            else if (most > 0) sum += away / most * (away / most);
        }
    return (real)(most * sqrt(sum));
}

/* The scores of n pairs, of which `x` are the listed rows: scale, softcap, bias and alibi. */
static void score_pairs(Tile *t, const SparseHead *h, const SparseScratch *s, Gather x, bool by_key,
                        ptrdiff_t fixed, int n) {
    const vec most = splat(REAL_MAX / 8), scale = splat((real)t->scale);
    const vec cap = splat((real)t->softcap), inverse = splat((real)(1 / t->softcap));
    const vec slope = splat((real)h->slope);
    ivec odd = splat_int(0);
    compare(t->score_function, s, s->own, x, n, s->scores);
    if (t->score_function == DISTANCE) {
        ivec near = splat_int(0);
        for (int j = 0; j < n; j += LANES) {
            vec square = load(s->scores + j);
            near |= square < splat(NEAR);
            store(s->root + j, root_of(square));
        }
        for (int j = 0; j < n && any_lane(near); j++)
            if (s->scores[j] < NEAR) s->root[j] = near_distance(s, x, s->index[j]);
        memcpy(s->scores, s->root, sizeof(real) * (size_t)round_up(n, LANES));
    }
    for (int j = 0; j < n && h->k_scales; j++) s->scores[j] *= (real)h->k_scales[s->index[j]];
    for (int j = 0; j < n; j += LANES) {
        vec score = load(s->scores + j) * scale;
        odd |= ~(magnitude(score) <= most);
        if (t->softcap > 0) {
            score = cap * tanh_vec(score * inverse);
            store(s->capped + j, score);
        }
        if (t->has_bias) score += load(s->bias + j);
        if (t->has_alibi) score -= slope * load(s->distance + j);
        odd |= ~(magnitude(score) <= most);
        store(s->scores + j, score);
    }
    bool all = t->softcap > HUGE_CAP;
    if (!all && !any_lane(odd)) return;
    for (int j = 0; j < n; j++) /* where scores are huge, or not finite: seldom */
        s->scores[j] = by_key ? exact_pair(t, h, s->index[j], fixed)
                              : exact_pair(t, h, fixed, s->index[j]);
}

/* ---- Forward ---- */

/* The softmax of a row: weights are exp(score - top) / sum. */
typedef struct {
    real top, sum;
    bool any, nan;
} RowSoftmax;

static real shift_of(real top) { return top == -INFINITY ? 0 : top; }

/* Weights of the listed scores relative to `shift`, in WEIGHT_UNITs; returns their sum. */
static real weigh_list(const SparseScratch *s, int n, real shift) {
    vec sum = splat(0);
    for (int j = n; j < round_up(n, LANES); j++) s->scores[j] = -INFINITY;
    for (int j = 0; j < n; j += LANES) {
        vec weight = weight_of((load(s->scores + j) - splat(shift)) * splat((real)LOG2_E));
        if (n - j < LANES)
            for (int l = n - j; l < LANES; l++) weight[l] = 0;
        store(s->weights + j, weight);
        sum += weight;
    }
    vec lanes[LANES] = {sum};
    return sum_lanes(lanes)[0];
}

/* The keys of a query's list that are in its interval. */
static void bound_list(const SparseHead *h, const SparseLists *keys, ptrdiff_t i, ptrdiff_t *at,
                       ptrdiff_t *end) {
    *end = lower_bound(keys, keys->starts[i], keys->starts[i + 1], end_of_keys(h, i));
    *at = lower_bound(keys, keys->starts[i], *end, first_key(h, i));
}

/* The softmax of row i, whose query is in `own`; total_v becomes the weighted sum of values. */
static RowSoftmax attend_row(Tile *t, const SparseHead *h, const SparseScratch *s,
                             const SparseLists *keys, ptrdiff_t i, ptrdiff_t value_dim) {
    ptrdiff_t at, end;
    RowSoftmax row = {.top = t->has_sinks ? as_real(h->sink) : -INFINITY};
    row.sum = row.top == -INFINITY ? 0 : (real)WEIGHT_UNIT;
    Gather v = values_of(t, h);
    v.dims = value_dim;
    bound_list(h, keys, i, &at, &end);
    memset(s->total_v, 0, sizeof(real) * (size_t)round_up(value_dim, LANES));
    while (at < end) {
        int n = next_pairs(t, h, s, keys, false, i, &at, end);
        if (n == 0) break;
        for (int j = 0; j < n && value_dim > 0 && v.dim == v.format.bytes; j++)
            for (ptrdiff_t d = 0; d < value_dim * v.dim; d += 64)
                __builtin_prefetch(v.data + s->index[j] * v.row + d, 0, 2);
        score_pairs(t, h, s, keys_of(t, h), false, i, n);
        real before = row.top;
        row.any = true;
        for (int j = 0; j < n; j++) {
            row.nan |= s->scores[j] != s->scores[j];
            if (s->scores[j] > row.top) row.top = s->scores[j];
        }
        real shift = row.nan ? (real)NAN : shift_of(row.top);
        real factor = before == row.top ? 1 : before == -INFINITY ? 0 : (real)exp(before - row.top);
        row.sum = row.sum * factor + weigh_list(s, n, shift);
        if (value_dim == 0) continue;
        for (int j = 0; j < n && h->v_scales; j++) s->weights[j] *= (real)h->v_scales[s->index[j]];
        weighted_sum(NUMBERS, s, NULL, v, n, s->weights, s->sum_v);
        add_sum(value_dim, factor, s->sum_v, s->total_v);
    }
    return row;
}

/* Once the sums of a row are known: its weights, where wanted, and its result in doubles. */
static void attend_row_again(Tile *t, const SparseHead *h, const SparseScratch *s,
                             const SparseLists *keys, ptrdiff_t i, RowSoftmax row) {
    ptrdiff_t at, end;
    real shift = row.nan ? (real)NAN : shift_of(row.top);
    double sum = row.top == INFINITY ? WEIGHT_UNIT : row.sum;
    bool finite = true;
    bound_list(h, keys, i, &at, &end);
    for (ptrdiff_t d = 0; d < t->value_dim; d++) s->exact[d] = 0;
    while (at < end) {
        int n = next_pairs(t, h, s, keys, false, i, &at, end);
        score_pairs(t, h, s, keys_of(t, h), false, i, n);
        weigh_list(s, n, shift);
        for (int j = 0; j < n; j++) {
            ptrdiff_t key = s->index[j];
            double weight = (real)(s->weights[j] / sum), scale = h->v_scales ? h->v_scales[key] : 1;
            if (h->weights)
                write_number(h->weights + i * h->weights_row + key * t->weights_key, t->out_format,
                             (real)weight);
            for (ptrdiff_t d = 0; d < t->value_dim; d++) {
                double x = read_number(h->v + key * t->v_key + d * t->v_dim, t->v_format) * scale;
                s->exact[d] += weight * x;
            }
        }
    }
    for (ptrdiff_t d = 0; d < t->value_dim; d++) finite &= isfinite(s->exact[d]) != 0;
    if (finite) return;
    /* A mean of the largest numbers that was rounded up is finite still. */
    for (ptrdiff_t d = 0; d < t->value_dim; d++) {
        bool all = isinf(s->exact[d]) != 0;
        bound_list(h, keys, i, &at, &end);
        for (; at < end && all; at++)
            all &= isfinite(read_number(h->v + item_of(keys, at) * t->v_key + d * t->v_dim,
                                        t->v_format)) != 0;
        if (all) s->exact[d] = clamp_finite(s->exact[d], true);
    }
}

/* Store a row of `real` numbers times a factor. */
static void store_row(const real *from, real factor, ptrdiff_t dims, char *to, ptrdiff_t dim,
                      NumberFormat format) {
    ptrdiff_t d = 0;
    for (; d + LANES <= dims && dim == format.bytes; d += LANES)
        store_numbers(to + d * dim, format, load(from + d) * factor);
    for (; d < dims; d++) write_number(to + d * dim, format, from[d] * factor);
}

static void store_lse_of(const SparseHead *h, ptrdiff_t i, RowSoftmax row) {
    double lse = row.nan ? NAN
                 : row.top == -INFINITY || row.top == INFINITY
                     ? row.top
                     : row.top + log((double)row.sum / WEIGHT_UNIT);
    *(real *)(h->lse + i * h->lse_row) = (real)lse;
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
    for (ptrdiff_t i = begin; i < end; i++) {
        char *out = h->out + i * h->out_row;
        load_row(queries_of(t, h), i, s.own);
        RowSoftmax row = attend_row(t, h, &s, keys, i, t->value_dim);
        real share = row.any ? 1 / row.sum : 0;
        bool lost = !row_is_finite(s.total_v, t->value_dim) || !isfinite(share);
        if (row.any && (lost || h->weights)) attend_row_again(t, h, &s, keys, i, row);
        if (row.any && lost)
            for (ptrdiff_t d = 0; d < t->value_dim; d++)
                write_number(out + d * t->out_dim, t->out_format, as_real(s.exact[d]));
        else store_row(s.total_v, share, t->value_dim, out, t->out_dim, t->out_format);
        if (h->lse) store_lse_of(h, i, row);
    }
}

/* ---- Backward: Dao et al. (2022), "FlashAttention", algorithm 4 ---- */

static double real_number(const char *at) { return *(const real *)at; }

/* Weights and the gradients of scores of n listed pairs, in WEIGHT_UNITs: from the scores, and the
 * products of grad_out and v in `grads`. */
static void differentiate_pair(const SparseScratch *s, int j, double lse, double rest,
                               real delta) {
    real shifted = s->scores[j] - (real)lse;
    s->scores[j] = shifted - (real)rest;
    s->grads[j] -= delta;
}
static void differentiate_list(const SparseScratch *s, int n) {
    for (int j = n; j < round_up(n, LANES); j++) s->scores[j] = -INFINITY, s->grads[j] = 0;
    for (int j = 0; j < n; j += LANES) {
        vec weight = weight_of(load(s->scores + j) * splat((real)LOG2_E));
        store(s->weights + j, weight);
        store(s->grads + j, weight * load(s->grads + j));
    }
}

/* From the gradients of scores to what the terms of the listed rows are multiplied by. */
static void differentiate_scores(const Tile *t, const SparseScratch *s, int n) {
    vec inverse = splat((real)(1 / t->softcap));
    for (int j = 0; j < n; j += LANES) {
        vec grad = load(s->grads + j);
        if (t->softcap > 0) {
            vec x = load(s->capped + j) * inverse;
            grad *= 1 - x * x;
        }
        if (t->score_function == SQUARED_DISTANCE) grad *= 2;
        if (t->score_function == DISTANCE) {
            vec root = load(s->root + j);
            grad = choose(root == splat(0), splat(0), grad / root);
        }
        store(s->grads + j, grad);
    }
}

static Term term_of(const Tile *t) {
    return t->score_function == DOT ? NUMBERS
           : t->score_function == ADDITIVE ? TANH_SLOPES
                                           : DIFFERENCES;
}

/* The sum of the terms to the gradient of a vector. */
static void store_gradient(const Tile *t, const SparseScratch *s, const real *total, char *to,
                           ptrdiff_t dim, NumberFormat format) {
    real *x = s->sum;
    for (ptrdiff_t d = 0; d < t->head_dim; d += LANES) {
        vec sum = load(total + d);
        store(x + d, t->score_function == ADDITIVE ? sum * load(s->dim_weights + d) : sum);
    }
    store_row(x, (real)(t->scale / WEIGHT_UNIT), t->head_dim, to, dim, format);
}

/* What row i brings along; its gradient of the result is in own_v. */
static SparseRow prepare_row(Tile *t, const SparseHead *h, const SparseScratch *s,
                             const SparseLists *keys, ptrdiff_t i) {
    double lse = real_number(h->lse + i * h->lse_row);
    const double eps = sizeof(real) == 8 ? DBL_EPSILON : FLT_EPSILON;
    Gather result = {h->result, h->result_row, t->result_dim, t->value_dim, t->grad_out_format};
    SparseRow row = {.lse = lse};
    s->index[0] = i; /* summed as the products of grad_out and v are */
    compare(DOT, s, s->own_v, result, 1, s->grads);
    row.mean = s->grads[0];
    if (!(h->coarse < fabs(lse) && fabs(lse) < INFINITY)) return row;
    RowSoftmax own = attend_row(t, h, s, keys, i, 0);
    double rest = log((double)own.sum / WEIGHT_UNIT), apart = fabs((own.top - lse) + rest);
    if (own.any && !own.nan && (apart <= 4 * eps * fabs(lse) || fabs(lse) > 1 / eps))
        row.lse = own.top, row.lse_rest = isinf(own.top) ? 0 : rest;
    return row;
}

static real delta_of(const SparseHead *h, ptrdiff_t i) {
    double grad_lse = h->grad_lse ? real_number(h->grad_lse + i * h->grad_lse_row) : 0;
    return (real)(h->rows[i].mean - grad_lse);
}

static void add_row_sums(const Tile *t, const SparseScratch *s, int n, double *sums) {
    for (int j = 0; j < n; j++) {
        double weight = s->weights[j] / WEIGHT_UNIT, grad = s->grads[j] / WEIGHT_UNIT;
        double distance = t->has_alibi ? s->distance[j] : 0;
        sums[0] += weight, sums[1] += grad;
        sums[2] += weight * distance, sums[3] += grad * distance;
    }
}

static void differentiate_queries(Tile *t, const SparseHead *h, const SparseLists *keys,
                                  ptrdiff_t begin, ptrdiff_t end) {
    SparseScratch s;
    const NumberFormat as_real_numbers = {'f', sizeof(real), 0};
    lay_out_sparse(t, t->scratch, &s);
    load_dim_weights(t, &s);
    for (ptrdiff_t i = begin; i < end; i++) {
        ptrdiff_t at, stop;
        load_row(queries_of(t, h), i, s.own);
        load_row(grad_outs_of(t, h), i, s.own_v);
        SparseRow row = h->rows[i] = prepare_row(t, h, &s, keys, i);
        double lse = row.lse == -INFINITY ? 0 : row.lse;
        memset(s.total, 0, sizeof(real) * (size_t)round_up(t->head_dim, LANES));
        bound_list(h, keys, i, &at, &stop);
        while (at < stop) {
            int n = next_pairs(t, h, &s, keys, false, i, &at, stop);
            if (n == 0) break;
            score_pairs(t, h, &s, keys_of(t, h), false, i, n);
            compare(DOT, &s, s.own_v, values_of(t, h), n, s.grads);
            for (int j = 0; j < n; j++)
                differentiate_pair(&s, j, lse, row.lse_rest, delta_of(h, i));
            differentiate_list(&s, n);
            if (h->row_sums) add_row_sums(t, &s, n, h->row_sums[i]);
            for (int j = 0; j < n && h->grad_bias; j++)
                *(real *)(h->grad_bias + i * h->grad_bias_row + s.index[j] * h->grad_bias_key) +=
                    s.grads[j] * (real)(1 / WEIGHT_UNIT);
            differentiate_scores(t, &s, n);
            weighted_sum(term_of(t), &s, s.own, keys_of(t, h), n, s.grads, s.sum);
            add_sum(t->head_dim, 1, s.sum, s.total);
        }
        store_gradient(t, &s, s.total, h->out + i * h->out_row, sizeof(real), as_real_numbers);
    }
}

static void differentiate_keys(Tile *t, const SparseHead *heads, ptrdiff_t group,
                               const SparseLists *queries, ptrdiff_t begin, ptrdiff_t end) {
    SparseScratch s;
    lay_out_sparse(t, t->scratch, &s);
    load_dim_weights(t, &s);
    for (ptrdiff_t key = begin; key < end; key++) {
        load_row(keys_of(t, heads), key, s.own);
        load_row(values_of(t, heads), key, s.own_v);
        memset(s.total, 0, sizeof(real) * (size_t)round_up(t->head_dim, LANES));
        memset(s.total_v, 0, sizeof(real) * (size_t)round_up(t->value_dim, LANES));
        for (const SparseHead *h = heads; h < heads + group; h++) {
            ptrdiff_t at = queries->starts[key], stop = queries->starts[key + 1];
            while (at < stop) {
                int n = next_pairs(t, h, &s, queries, true, key, &at, stop);
                if (n == 0) break;
                score_pairs(t, h, &s, queries_of(t, h), true, key, n);
                compare(DOT, &s, s.own_v, grad_outs_of(t, h), n, s.grads);
                for (int j = 0; j < n; j++) {
                    const SparseRow *row = h->rows + s.index[j];
                    double lse = row->lse == -INFINITY ? 0 : row->lse;
                    differentiate_pair(&s, j, lse, row->lse_rest, delta_of(h, s.index[j]));
                }
                differentiate_list(&s, n);
                weighted_sum(NUMBERS, &s, NULL, grad_outs_of(t, h), n, s.weights, s.sum_v);
                add_sum(t->value_dim, 1, s.sum_v, s.total_v);
                differentiate_scores(t, &s, n);
                weighted_sum(term_of(t), &s, s.own, queries_of(t, h), n, s.grads, s.sum);
                add_sum(t->head_dim, 1, s.sum, s.total);
            }
        }
        store_gradient(t, &s, s.total, heads->grad_k + key * t->grad_k_key, t->grad_k_format.bytes,
                       t->grad_k_format);
        store_row(s.total_v, (real)(1 / WEIGHT_UNIT), t->value_dim,
                  heads->grad_v + key * t->grad_v_key, t->grad_v_format.bytes, t->grad_v_format);
    }
}

const SparseKernels TABLE = {
    .real_bytes = sizeof(real),
    .scratch_bytes = sparse_scratch_bytes,
    .attend = sparse_attend,
    .differentiate_queries = differentiate_queries,
    .differentiate_keys = differentiate_keys,
};
