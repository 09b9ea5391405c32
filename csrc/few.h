/* Both products for a few queries, with dimensions in the lanes.
 *
 * Decoding asks one query, or one for each head of a group, of all keys: the work is one pass over
 * keys and values at the speed of memory. Each key is multiplied dimension by dimension, LANES keys
 * at a time, so that their sums over the lanes come out together. Scores and weights lie as those of
 * many queries do, and so everything between the products is the same.
 */
#ifndef FASTATTN_FEW_H
#define FASTATTN_FEW_H

#include "scores.h"

#ifndef PARTS

static bool few(const Tile *t) { return t->n_queries <= FEW_QUERIES && !t->differentiating; }

/* x[l] summed over its lanes, for each l in lane l. */
INLINE vec sum_lanes(vec x[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            x[i] = zip_low(x[i], x[i + half]) + zip_high(x[i], x[i + half]);
    return x[0];
}

/* Up to LANES rows of `real` in whole vectors: where they lie, or widened into `to`, padded by 0. */
typedef struct {
    const real *data;
    ptrdiff_t row;
} FewRows;

INLINE FewRows few_rows(const char *at, ptrdiff_t row, ptrdiff_t dim, NumberFormat format,
                        const float *scales, int rows, ptrdiff_t dims, real *to) {
    ptrdiff_t padded = round_up(dims, LANES);
    if (is_real(format) && dim == sizeof(real) && padded == dims && !scales)
        return (FewRows){(const real *)at, row / (ptrdiff_t)sizeof(real)};
    for (int j = 0; j < rows; j++) {
        widen(at + j * row, 0, dim, format, scales ? scales + j : NULL, 1, dims, to + j * padded);
        for (ptrdiff_t d = dims; d < padded; d++) to[j * padded + d] = 0;
    }
    return (FewRows){to, padded};
}

/* q[query][dims], padded by 0. */
static void ready_few_queries(const Tile *t, const Scratch *s) {
    ptrdiff_t padded = round_up(t->head_dim, LANES);
    for (ptrdiff_t i = 0; i < t->n_queries; i++)
        for (ptrdiff_t d = 0; d < padded; d++)
            s->q[i * padded + d] =
                d < t->head_dim ? (real)read_number(t->q[i] + d * t->q_dim, t->q_format) * (real)t->q_scale
                                : 0;
}

#define FEW_KEYS (LANES < 4 ? LANES : 4) /* share a load of q */

INLINE void multiply_few(const Tile *t, const Scratch *s, const Strip *strip, NumberFormat format) {
    ptrdiff_t padded = round_up(t->head_dim, LANES), key = strip->key;
    for (int first = 0; first < strip->keys; first += LANES) {
        int keys = fewer(strip->keys - first, LANES);
        real *scores = strip->scores + first * PANEL, sums[LANES] __attribute__((aligned(64)));
        FewRows k = few_rows(t->k + (key + first) * t->k_key, t->k_key, t->k_dim, format,
                             t->k_scales ? t->k_scales + key + first : NULL, keys, t->head_dim,
                             s->few_rows);
        for (int j = 0; j < keys; j++) store(scores + j * PANEL, splat(0));
        for (ptrdiff_t i = 0; i < t->n_queries; i++) {
            const real *q = s->q + i * padded;
            vec x[LANES];
            int j = 0;
            for (; j + FEW_KEYS <= keys; j += FEW_KEYS) {
                vec sum[FEW_KEYS] = {{0}};
                for (ptrdiff_t d = 0; d < padded; d += LANES)
#pragma GCC unroll 4
                    for (int n = 0; n < FEW_KEYS; n++)
                        sum[n] += load(q + d) * load_unaligned(k.data + (j + n) * k.row + d);
#pragma GCC unroll 4
                for (int n = 0; n < FEW_KEYS; n++) x[j + n] = sum[n];
            }
            for (; j < LANES; j++) {
                x[j] = splat(0);
                for (ptrdiff_t d = 0; d < padded && j < keys; d += LANES)
                    x[j] += load(q + d) * load_unaligned(k.data + j * k.row + d);
            }
            store(sums, sum_lanes(x));
            for (j = 0; j < keys; j++) scores[j * PANEL + i] = sums[j];
        }
    }
}

/* sums[dims] += the weighted sum of some rows, `vecs` vectors at a time. */
INLINE void add_rows(const int vecs, FewRows v, int rows, const real *weights, real *sums) {
    vec sum[8];
#pragma GCC unroll 8
    for (int n = 0; n < vecs; n++) sum[n] = load(sums + n * LANES);
    for (int j = 0; j < rows; j++) {
        vec weight = splat(weights[j * PANEL]);
#pragma GCC unroll 8
        for (int n = 0; n < vecs; n++)
            sum[n] += weight * load_unaligned(v.data + j * v.row + n * LANES);
    }
#pragma GCC unroll 8
    for (int n = 0; n < vecs; n++) store(sums + n * LANES, sum[n]);
}

/* few_sums[query][dims] += the weighted sum of a strip's values. Where some query must not meet a NaN
 * or an Inf that it does not see, each takes its own keys only. */
INLINE void add_few_values(const Tile *t, const Scratch *s, const Strip *strip, NumberFormat format) {
    ptrdiff_t padded = round_up(t->value_dim, LANES), key = strip->key;
    for (int first = 0; first < strip->keys; first += LANES) {
        int keys = fewer(strip->keys - first, LANES);
        FewRows v = few_rows(t->v + (key + first) * t->v_key, t->v_key, t->v_dim, format,
                             t->v_scales ? t->v_scales + key + first : NULL, keys, t->value_dim,
                             s->few_rows);
        for (ptrdiff_t i = 0; i < t->n_queries; i++) {
            const real *weights = strip->scores + first * PANEL + i;
            real *sums = s->few_sums + i * padded;
            ptrdiff_t d = 0;
            if (strip->seen == SEE_SOME) {
                for (int j = 0; j < keys; j++)
                    for (d = 0; d < padded && sees(strip, 0, first + j)[i] < 0; d += LANES)
                        add_rows(1, (FewRows){v.data + j * v.row + d, 0}, 1, weights + j * PANEL,
                                 sums + d);
                continue;
            }
            for (; d + 8 * LANES <= padded; d += 8 * LANES)
                add_rows(8, (FewRows){v.data + d, v.row}, keys, weights, sums + d);
            for (; d + 4 * LANES <= padded; d += 4 * LANES)
                add_rows(4, (FewRows){v.data + d, v.row}, keys, weights, sums + d);
            for (; d < padded; d += LANES)
                add_rows(1, (FewRows){v.data + d, v.row}, keys, weights, sums + d);
        }
    }
}

/* few_sums as columns: out[d][query]. */
static void transpose_few(const Tile *t, const Scratch *s, real *out) {
    ptrdiff_t padded = round_up(t->value_dim, LANES);
    for (ptrdiff_t d = 0; d < t->value_dim; d++) {
        store(out + d * PANEL, splat(0));
        for (ptrdiff_t i = 0; i < t->n_queries; i++) out[d * PANEL + i] = s->few_sums[i * padded + d];
    }
}
#endif
#endif
