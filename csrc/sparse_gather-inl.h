/* The rows that a sparse mask lists: what a vector compares with them as, and their weighted sums.
 *
 * Rows of contiguous `real` numbers are read where they are, others are widened first, so that the
 * loops over their numbers are compiled once. */
#ifndef FASTATTN_SPARSE_GATHER_INL_H
#define FASTATTN_SPARSE_GATHER_INL_H

#include "distances-inl.h"
#include "sparse.h"

/* Listed rows whose scores are kept at a time, and whose sums start from zero: see BLOCK_K. */
#define LIST BLOCK_K

typedef struct {
    real *own, *own_v; /* the vectors that others are compared with, padded by 0 */
    real *dim_weights; /* of ADDITIVE, padded by 0 */
    real *sum, *sum_v; /* of one list */
    real *total, *total_v; /* of all */
    real *gathered;        /* [LANES][dims]: widened rows */
    /* [LIST]; `unscaled` are scores before their scale, `capped` after the softcap. */
    real *scores, *unscaled, *capped, *bias, *relative_bias, *distance, *weights, *grads;
    lane_int *kept;   /* [LIST]: has dropout kept the weight? -1 or 0 */
    double *exact;    /* [value_dim] */
    ptrdiff_t *index; /* [LIST]: the listed rows that take part */
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
    TAKE(unscaled, LIST)
    TAKE(capped, LIST)
    TAKE(bias, LIST)
    TAKE(relative_bias, LIST)
    TAKE(distance, LIST)
    TAKE(weights, LIST)
    TAKE(grads, LIST)
    TAKE(kept, LIST)
    TAKE(exact, value_dims)
    TAKE(index, LIST)
#undef TAKE
    return bytes;
}

static size_t sparse_scratch_bytes(const Tile *t) {
    SparseScratch s;
    return lay_out_sparse(t, NULL, &s);
}

/* ---- Where rows are ---- */

/* Rows of an operand, which may be in pages, and may have scales. */
typedef struct {
    const Tile *paged; /* whose pages they are in, if it has any; NULL: none */
    const char *data, *scales;
    ptrdiff_t row, page, scales_row, scales_page, dim, dims;
    NumberFormat format;
} Gather;

static Gather queries_of(const Tile *t, const SparseHead *h) {
    return (Gather){.data = h->q, .row = h->q_row, .dim = t->q_dim, .dims = t->head_dim,
                    .format = t->q_format};
}
static Gather keys_of(const Tile *t, const SparseHead *h) {
    return (Gather){t, h->k, h->k_scales, t->k_key, t->k_page, t->k_scales_key, t->k_scales_page,
                    t->k_dim, t->head_dim, t->k_format};
}
static Gather values_of(const Tile *t, const SparseHead *h) {
    return (Gather){t, h->v, h->v_scales, t->v_key, t->v_page, t->v_scales_key, t->v_scales_page,
                    t->v_dim, t->value_dim, t->v_format};
}
static Gather grad_outs_of(const Tile *t, const SparseHead *h) {
    return (Gather){.data = h->grad_out, .row = h->grad_out_row, .dim = t->grad_out_dim,
                    .dims = t->value_dim, .format = t->grad_out_format};
}

static const char *row_at(const Gather *x, ptrdiff_t row) {
    return x->paged ? row_of_key(x->paged, x->data, x->row, x->page, row) : x->data + row * x->row;
}
static const float *scales_at(const Gather *x, ptrdiff_t row) {
    return x->scales ? (const float *)row_of_key(x->paged, x->scales, x->scales_row,
                                                 x->scales_page, row)
                     : NULL;
}
static bool in_place(const Gather *x) {
    return is_real(x->format) && x->dim == sizeof(real) && !x->scales;
}

/* One number of a row. */
static double number_at(const Gather *x, ptrdiff_t row, ptrdiff_t d) {
    return read_dim(row_at(x, row), x->dim, d, x->format) *
           (double)scale_of_dim(scales_at(x, row), x->format, d);
}

/* One row as `real` numbers, padded by 0. */
NOINLINE void load_row(const Gather *x, ptrdiff_t row, real *to) {
    for (ptrdiff_t d = x->dims; d < round_up(x->dims, LANES); d++) to[d] = 0;
    widen(row_at(x, row), 0, x->dim, x->format, scales_at(x, row), 0, 1, x->dims, to);
}

/* Rows of at least LANES contiguous numbers without scales; the last vector of each overlaps. */
INLINE void widen_rows(const Gather *x, const ptrdiff_t *index, int n, real *to,
                       NumberFormat format) {
    ptrdiff_t last = x->dims - LANES;
    for (int j = 0; j < n; j++, to += round_up(x->dims, LANES)) {
        const char *row = row_at(x, index[j]);
        for (ptrdiff_t d = 0; d < last; d += LANES)
            store_unaligned(to + d, load_numbers(row + d * format.bytes, format));
        store_unaligned(to + last, load_numbers(row + last * format.bytes, format));
    }
}

/* Where LANES listed rows are, or no more than are listed; the last is repeated. */
static void point_to_rows(const Gather *x, const ptrdiff_t *index, int n, real *gathered,
                          const real *rows[LANES]) {
    bool direct = in_place(x);
    for (int j = 0; j < n; j++)
        rows[j] = direct ? (const real *)row_at(x, index[j])
                         : gathered + j * round_up(x->dims, LANES);
    for (int j = n; j < LANES; j++) rows[j] = rows[n - 1];
    if (direct) return;
    if (x->dim == x->format.bytes && !x->scales && x->dims >= LANES && x->format.kind != '8')
        WITH_FORMAT(x->format, widen_rows, x, index, n, gathered);
    else
        for (int j = 0; j < n; j++) load_row(x, index[j], gathered + j * round_up(x->dims, LANES));
}

/* Fetch a row of contiguous numbers into the cache, to be read or to be written. */
INLINE void prefetch_row(const char *row, ptrdiff_t bytes, const bool write) {
    for (ptrdiff_t at = 0; at < bytes; at += 64)
        if (write) __builtin_prefetch(row + at, 1, 2);
        else __builtin_prefetch(row + at, 0, 2);
}
INLINE void prefetch_number_row(const Gather *x, ptrdiff_t row) {
    if (x->dim == x->format.bytes) prefetch_row(row_at(x, row), x->dims * x->dim, false);
}

/* ---- Comparing ---- */

INLINE vec load_row_vec(const real *row, ptrdiff_t d, ptrdiff_t dims) {
    const NumberFormat as_real_numbers = {'f', sizeof(real), 0};
    return load_some((const char *)(row + d), dims - d, as_real_numbers);
}

/* sum[n] += what LANES dims from `d` on contribute to a vector and row n. */
INLINE void compare_dims(const ScoreFunction function, const bool some, const real *own,
                         const real *dim_weights, const real *const *rows, ptrdiff_t d,
                         ptrdiff_t dims, vec sum[DECODE_KEYS]) {
    vec a = load(own + d);
#pragma GCC unroll 4
    for (int n = 0; n < DECODE_KEYS; n++) {
        vec b = some ? load_row_vec(rows[n], d, dims) : load_unaligned(rows[n] + d);
        if (function == DOT) sum[n] += a * b;
        else if (function == ADDITIVE) sum[n] += load(dim_weights + d) * tanh_vec(a + b);
        else sum[n] += (a - b) * (a - b);
    }
}

/* to[j]: how a vector compares with each of LANES rows, before roots and scales. */
INLINE void compare_rows(const ScoreFunction function, const real *own, const real *dim_weights,
                         const real *const *rows, ptrdiff_t dims, real *to) {
    vec x[LANES];
    for (int j = 0; j < LANES; j += DECODE_KEYS) {
        for (int n = 0; n < DECODE_KEYS; n++) x[j + n] = splat(0);
        for (ptrdiff_t begin = 0; begin < dims; begin += DECODE_BLOCK_D) {
            ptrdiff_t end = begin + fewer(dims - begin, DECODE_BLOCK_D), d = begin;
            vec sum[DECODE_KEYS];
#pragma GCC unroll 4
            for (int n = 0; n < DECODE_KEYS; n++) sum[n] = splat(0);
            for (; d + LANES <= end; d += LANES)
                compare_dims(function, false, own, dim_weights, rows + j, d, dims, sum);
            if (d < end) compare_dims(function, true, own, dim_weights, rows + j, d, dims, sum);
#pragma GCC unroll 4
            for (int n = 0; n < DECODE_KEYS; n++) x[j + n] += sum[n];
        }
    }
    store(to, sum_lanes(x));
}

/* to[j] of n listed rows, padded to whole vectors. */
NOINLINE void compare(ScoreFunction function, const SparseScratch *s, const real *own,
                      const Gather *x, int n, real *to) {
    for (int j = 0; j < n; j += LANES) {
        const real *rows[LANES];
        point_to_rows(x, s->index + j, fewer(n - j, LANES), s->gathered, rows);
        if (function == DOT) compare_rows(DOT, own, NULL, rows, x->dims, to + j);
        else if (function == ADDITIVE)
            compare_rows(ADDITIVE, own, s->dim_weights, rows, x->dims, to + j);
        else compare_rows(DISTANCE, own, NULL, rows, x->dims, to + j);
    }
}

/* ---- Weighted sums ---- */

/* What is summed of a listed row: its numbers, those of its difference from another vector, or
 * 1 - tanh^2 of their sum. */
typedef enum { NUMBERS, DIFFERENCES, TANH_SLOPES } Term;

/* sum[d] += the weighted terms of n rows, of `vecs` vectors of dims. */
INLINE void add_vecs(const Term term, const int vecs, const bool some, const real *own,
                     const real *const *rows, int n, const real *weights, ptrdiff_t d,
                     ptrdiff_t dims, real *sum) {
    vec total[8];
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) total[i] = load(sum + d + i * LANES);
    for (int j = 0; j < n; j++) {
        vec weight = splat(weights[j]);
#pragma GCC unroll 8
        for (int i = 0; i < vecs; i++) {
            ptrdiff_t at = d + i * LANES;
            vec x = some ? load_row_vec(rows[j], at, dims) : load_unaligned(rows[j] + at);
            if (term == DIFFERENCES) x = load(own + at) - x;
            if (term == TANH_SLOPES) {
                vec tanh = tanh_vec(load(own + at) + x);
                x = 1 - tanh * tanh;
            }
            total[i] += weight * x;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < vecs; i++) store(sum + d + i * LANES, total[i]);
}

INLINE void add_rows(const Term term, const real *own, const real *const *rows, int n,
                     const real *weights, ptrdiff_t dims, real *sum) {
    ptrdiff_t d = 0;
#define VECS(vecs)                                                                                 \
    for (; d + vecs * LANES <= dims; d += vecs * LANES)                                            \
        add_vecs(term, vecs, false, own, rows, n, weights, d, dims, sum);
    if (term != TANH_SLOPES) { /* of which one at a time keeps the processor busy */
        VECS(8)
        VECS(4)
    }
    VECS(1)
#undef VECS
    if (d < dims) add_vecs(term, 1, true, own, rows, n, weights, d, dims, sum);
}

/* sum = the weighted terms of n listed rows. */
NOINLINE void weighted_sum(Term term, const SparseScratch *s, const real *own, const Gather *x,
                           int n, const real *weights, real *sum) {
    memset(sum, 0, sizeof(real) * (size_t)round_up(x->dims, LANES));
    for (int j = 0; j < n; j += LANES) {
        int some = fewer(n - j, LANES);
        const real *rows[LANES];
        point_to_rows(x, s->index + j, some, s->gathered, rows);
        if (term == NUMBERS) add_rows(NUMBERS, own, rows, some, weights + j, x->dims, sum);
        else if (term == DIFFERENCES)
            add_rows(DIFFERENCES, own, rows, some, weights + j, x->dims, sum);
        else add_rows(TANH_SLOPES, own, rows, some, weights + j, x->dims, sum);
    }
}

/* total = total * factor + sum. */
static void add_sum(ptrdiff_t dims, real factor, const real *sum, real *total) {
    for (ptrdiff_t d = 0; d < dims; d += LANES)
        store(total + d, load(total + d) * factor + load(sum + d));
}

/* Store a row of `real` numbers times a factor. */
NOINLINE void store_row(const real *from, real factor, ptrdiff_t dims, char *to, ptrdiff_t dim,
                        NumberFormat format) {
    ptrdiff_t d = 0;
    for (; d + LANES <= dims && dim == format.bytes; d += LANES)
        store_numbers(to + d * dim, format, load(from + d) * factor);
    for (; d < dims; d++) write_number(to + d * dim, format, from[d] * factor);
}
#endif
