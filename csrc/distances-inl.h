/* Metrics: distances and additive scores.
 *
 * As in the matmul of queries and keys, each element of the left operand, read where it is, is
 * broadcast to the lanes of the right one: elements of a key to queries, or in decoding elements of
 * a query to keys. Sums over METRIC_BLOCK_D dims are added to a running sum: one sum over all would
 * have several times NumPy's rounding error. */
#ifndef FASTATTN_DISTANCES_INL_H
#define FASTATTN_DISTANCES_INL_H

#include "convert-inl.h"
#include "math-inl.h"
#include "scratch-inl.h"

/* What is summed over the dims. SQUARES of differences. FAR_SQUARES: of vectors SHRINK times as
 * long, because the squares of finite numbers may overflow. NEAR_SQUARES: of differences GROW times
 * as long, because squares of small ones lose digits, as sums below NEAR may have. TANH_TERMS:
 * weight * tanh(q + k). TANH_BY_EXP: the same from exponentials a = exp(-2 k) and b = exp(2 q):
 * tanh(q + k) = (b - a) / (b + a). */
typedef enum { SQUARES, FAR_SQUARES, NEAR_SQUARES, TANH_TERMS, TANH_BY_EXP } ScoreTerm;

#ifdef REAL_IS_DOUBLE
#define SHRINK 0x1p-520
#define GROW 0x1p700
#define NEAR 0x1p-900
#else
#define SHRINK 0x1p-66f
#define GROW 0x1p100f
#define NEAR 0x1p-100f
#endif

/* Rows of the left operand, a column of `dims` for each lane of the right one, and the weight of
 * each dim. The low parts of exponentials have the same layout. */
typedef struct {
    const real *a, *a_low;
    ptrdiff_t row, dim;
    const real *b, *b_low;
    const real *weights;
    ptrdiff_t dims;
} MetricOperands;

/* c[row][lane] = the sum of the terms over all dims. */
INLINE void metric_tile(const ScoreTerm terms, const int rows, const int vecs,
                        const MetricOperands *x, ptrdiff_t first_row, real *c) {
    for (ptrdiff_t begin = 0; begin < x->dims; begin += METRIC_BLOCK_D) {
        ptrdiff_t end = begin + fewer(x->dims - begin, METRIC_BLOCK_D);
        vec sum[NR][MR_VECS];
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) sum[r][n] = splat(0);
        for (ptrdiff_t d = begin; d < end; d++) {
            ptrdiff_t at = first_row * x->row + d * x->dim;
            const real *a = x->a + at, *a_low = terms == TANH_BY_EXP ? x->a_low + at : NULL;
            vec b[MR_VECS], b_low[MR_VECS], weight = splat(0);
            if (terms == TANH_TERMS || terms == TANH_BY_EXP) weight = splat(x->weights[d]);
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) {
                b[n] = load(x->b + d * MR + n * LANES);
                b_low[n] = terms == TANH_BY_EXP ? load(x->b_low + d * MR + n * LANES) : splat(0);
                if (terms == FAR_SQUARES) b[n] *= (real)SHRINK;
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vec one = splat(a[r * x->row]), low = splat(0);
                if (terms == TANH_BY_EXP) low = splat(a_low[r * x->row]);
                if (terms == FAR_SQUARES) one *= (real)SHRINK;
#pragma GCC unroll 4
                for (int n = 0; n < vecs; n++) {
                    if (terms == SQUARES || terms == FAR_SQUARES || terms == NEAR_SQUARES) {
                        vec away = one - b[n];
                        if (terms == NEAR_SQUARES) away *= GROW;
                        sum[r][n] = away * away + sum[r][n];
                    } else {
                        vec tanh = terms == TANH_TERMS
                                       ? tanh_vec(one + b[n])
                                       : quotient((b[n] - one) + (b_low[n] - low), b[n] + one);
                        sum[r][n] = weight * tanh + sum[r][n];
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int n = 0; n < vecs; n++) {
                real *to = c + (first_row + r) * MR + n * LANES;
                store(to, begin > 0 ? load(to) + sum[r][n] : sum[r][n]);
            }
    }
}

INLINE void metric_rows(const ScoreTerm terms, const int most, const int vecs,
                        const MetricOperands *x, ptrdiff_t rows, real *c) {
    ptrdiff_t row = 0;
    for (; row + most <= rows; row += most) metric_tile(terms, most, vecs, x, row, c);
    for (; row < rows; row++) metric_tile(terms, 1, vecs, x, row, c);
}

/* Any number of rows, for the first `vecs` vectors of a micropanel. */
static void metric_matrix(ScoreTerm terms, int vecs, const MetricOperands *x, ptrdiff_t rows,
                          real *c) {
#define VECS(n)                                                                                    \
    if (vecs == n && terms == SQUARES) metric_rows(SQUARES, NR, n, x, rows, c);                    \
    if (vecs == n && terms == FAR_SQUARES) metric_rows(FAR_SQUARES, 1, n, x, rows, c);             \
    if (vecs == n && terms == NEAR_SQUARES) metric_rows(NEAR_SQUARES, 1, n, x, rows, c);           \
    if (vecs == n && terms == TANH_TERMS) metric_rows(TANH_TERMS, 1, n, x, rows, c);               \
    if (vecs == n && terms == TANH_BY_EXP) metric_rows(TANH_BY_EXP, NR / 2, n, x, rows, c);
    VECS(1)
    VECS(2)
#if MR_VECS == 3
    VECS(3)
#endif
#undef VECS
}

/* exp(2 sign x) of `count` numbers, a multiple of LANES. */
static void exponentials(const real *x, ptrdiff_t count, real sign, real *high, real *low) {
    for (ptrdiff_t i = 0; i < count; i += LANES) {
        VecPair both = exp_of_twice(load(x + i) * sign);
        store(high + i, both.high);
        store(low + i, both.low);
    }
}

static void pack_dim_weights(const Tile *t, const Scratch *s) {
    for (ptrdiff_t d = 0; d < t->head_dim; d++)
        s->weights[d] = (real)(t->dim_weights[d] * t->metric_scale);
}

/* The weights of the dims, and the exponentials of the queries, with the lanes that are too large
 * for them. */
static void pack_additive_queries(Tile *t, const Scratch *s, int p) {
    pack_dim_weights(t, s);
    const vec most = splat(EXP2X_MOST);
    const real *q = s->q + p * MR * t->head_dim;
    exponentials(q, MR * t->head_dim, 1, s->q_high + p * MR * t->head_dim,
                 s->q_low + p * MR * t->head_dim);
    t->micropanel[p].special = 0;
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ivec special = splat_int(0);
        for (ptrdiff_t d = 0; d < t->head_dim; d++)
            special |= ~(magnitude(load(q + d * MR + n * LANES)) <= most);
        *(ivec *)(s->special_queries + p * MR + n * LANES) = special;
        for (int i = 0; i < LANES; i++)
            t->micropanel[p].special |= (uint64_t)(special[i] != 0) << (n * LANES + i);
    }
}

/* The exponentials of a sub-block's widened keys, and which keys are too large for them. */
static void pack_additive_keys(const Tile *t, const Scratch *s, ptrdiff_t first, ptrdiff_t keys) {
    ptrdiff_t dims = t->head_dim;
    const real *k = s->keys + first * dims;
    exponentials(k, round_up(keys * dims, LANES), -1, s->key_high + first * dims,
                 s->key_low + first * dims);
    for (ptrdiff_t j = 0; j < keys; j++) {
        int special = 0;
        for (ptrdiff_t d = 0; d < dims; d++) special |= !(fabs(k[j * dims + d]) <= EXP2X_MOST);
        s->special_keys[first + j] = special;
    }
}

/* to[key][query] = the sums of the terms for a sub-block; `k` begins with its first key. */
typedef void Metric(const Tile *, const Scratch *, int p, const SubBlock *, ScoreTerm, View k,
                    real *to);

static void metric_sub_block(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                             ScoreTerm terms, View k, real *to) {
    ptrdiff_t columns = p * MR * t->head_dim, rows = sub->key % BLOCK_K * t->head_dim;
    MetricOperands x = {.a = k.data,
                        .row = k.row,
                        .dim = k.dim,
                        .b = s->q + columns,
                        .weights = s->weights,
                        .dims = t->head_dim};
    if (terms == TANH_BY_EXP) {
        x.a = s->key_high + rows, x.a_low = s->key_low + rows;
        x.b = s->q_high + columns, x.b_low = s->q_low + columns;
    }
    metric_matrix(terms, t->micropanel[p].vecs, &x, sub->keys, to);
}

/* Turn squared distances into scores: roots times `factor`. Also the smallest and the largest
 * square. */
static void take_roots(int vecs, const SubBlock *sub, real factor, vec *least, vec *most) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec square = load(s);
            *least = smaller(square, *least);
            *most = larger(square, *most);
            store(s, root_of(square) * factor);
        }
}

/* Recompute the distances whose squares are out of range, on the side that `terms` says. */
static void recompute_distances(const Tile *t, const Scratch *s, int p, const SubBlock *sub, View k,
                                Metric *metric, ScoreTerm terms) {
    bool far = terms == FAR_SQUARES;
    vec factor = splat((real)(t->metric_scale / (far ? SHRINK : GROW)));
    metric(t, s, p, sub, terms, k, s->metrics);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *score = sub->scores + j * MR + n * LANES;
            vec square = load(s->metrics + j * MR + n * LANES), x = load(score);
            ivec other = far ? magnitude(x) == splat(INFINITY) : square < splat(NEAR * GROW * GROW);
            store(score, choose(other, root_of(square) * factor, x));
        }
}

static void distance_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub, View k,
                            Metric *metric) {
    vec least = splat(INFINITY), most = splat(0);
    metric(t, s, p, sub, SQUARES, k, sub->scores);
    take_roots(t->micropanel[p].vecs, sub, (real)t->metric_scale, &least, &most);
    if (any_lane(most == splat(INFINITY)))
        recompute_distances(t, s, p, sub, k, metric, FAR_SQUARES);
    if (any_lane(least < splat(NEAR))) recompute_distances(t, s, p, sub, k, metric, NEAR_SQUARES);
}

/* Turn squared distances into scores: times `factor`, which is negative. Scores out of range become
 * its end. Returns whether any distance is infinite. */
static bool scale_squares(int vecs, const SubBlock *sub, real factor) {
    const vec least = splat(-REAL_MAX);
    vec most = splat(0);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec square = load(s);
            most = larger(square, most);
            store(s, larger(least, square * factor)); /* NaN stays NaN */
        }
    bool some = false;
    for (int i = 0; i < LANES; i++) some |= most[i] == INFINITY;
    return some;
}

static void squared_distance_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                                    View k, Metric *metric) {
    metric(t, s, p, sub, SQUARES, k, sub->scores);
    if (!scale_squares(t->micropanel[p].vecs, sub, (real)t->metric_scale)) return;
    /* Where the inputs are infinite the score is -Inf. */
    metric(t, s, p, sub, FAR_SQUARES, k, s->metrics);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *score = sub->scores + j * MR + n * LANES;
            vec far = load(s->metrics + j * MR + n * LANES);
            store(score, choose(far == splat(INFINITY), splat(-INFINITY), load(score)));
        }
}

static void additive_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub, View k) {
    metric_sub_block(t, s, p, sub, TANH_BY_EXP, k, sub->scores);
    const lane_int *special_keys = s->special_keys + sub->key % BLOCK_K;
    bool special = t->micropanel[p].special != 0;
    for (int j = 0; j < sub->keys; j++) special |= special_keys[j] != 0;
    if (!special) return;
    metric_sub_block(t, s, p, sub, TANH_TERMS, k, s->metrics);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            real *score = sub->scores + j * MR + n * LANES;
            ivec special = *(const ivec *)(s->special_queries + p * MR + n * LANES);
            if (special_keys[j]) special = splat_int(-1);
            store(score, choose(special, load(s->metrics + j * MR + n * LANES), load(score)));
        }
}

/* The scores of a sub-block by any score function but DOT. */
static void metric_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub, View k,
                          Metric *metric) {
    if (t->score_function == DISTANCE) distance_scores(t, s, p, sub, k, metric);
    else if (t->score_function == SQUARED_DISTANCE)
        squared_distance_scores(t, s, p, sub, k, metric);
    else if (metric == metric_sub_block) additive_scores(t, s, p, sub, k);
    else metric(t, s, p, sub, TANH_TERMS, k, sub->scores);
}
#endif
