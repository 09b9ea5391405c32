/* The kernels of a tile, one body for every instruction set and dtype.
 *
 * Compiled once for each pair, with that instruction set's flags, -DTABLE=<the table's name> and
 * -DREAL_IS_DOUBLE for float64. A panel is what one register tile holds: PANEL queries in
 * TILE_VECS vectors. Within a block of keys, S^T = K Q^T, the weights P^T = exp(S^T - max) and
 * O^T = V^T P^T follow each other as in FlashAttention (Dao et al. 2022, algorithm 1), except that
 * the maximum is that of the whole block and O^T is rescaled once per block.
 */
#include <stdbool.h>
#include <string.h>

#include "simd.h"
#include "tile.h"

#define PANEL (TILE_VECS * LANES)
#define TILE_QUERIES ((int)(TILE_BYTES / sizeof(real)))
#define PANELS (TILE_QUERIES / PANEL)

/* Keys whose weights stay in the first-level cache between the softmax and the second product. */
#ifndef STRIP_KEYS
#define STRIP_KEYS 64
#endif

/* The tile's scratch: [panel][row][PANEL] throughout, so that a panel is contiguous. */
typedef struct {
    real *row_max, *row_sum; /* [panel][PANEL] */
    real *q;                 /* [panel][head_dim][PANEL], scaled */
    real *out;               /* [panel][value_dim][PANEL], the running sum */
    real *block_out;         /* [panel][value_dim][PANEL], the sum of one block */
    real *scores;            /* [panel][keys of the block][PANEL], then the weights */
} Scratch;

static int panels_for(ptrdiff_t queries) { return (int)((queries + PANEL - 1) / PANEL); }

static int fewer(ptrdiff_t left, int most) { return left < most ? (int)left : most; }

static size_t scratch_bytes(ptrdiff_t queries, ptrdiff_t head_dim, ptrdiff_t value_dim,
                            ptrdiff_t n_keys) {
    size_t row = sizeof(real) * (size_t)(panels_for(queries) * PANEL);
    return row * (size_t)(2 + head_dim + 2 * value_dim + fewer(n_keys, BLOCK_KEYS));
}

static Scratch scratch_of(const Tile *t) {
    ptrdiff_t row = t->panels * PANEL;
    Scratch s;
    s.row_max = t->scratch;
    s.row_sum = s.row_max + row;
    s.q = s.row_sum + row;
    s.out = s.q + row * t->head_dim;
    s.block_out = s.out + row * t->value_dim;
    s.scores = s.block_out + row * t->value_dim;
    return s;
}

/* c[r][lane] = (accumulate ? c[r][lane] : 0) + sum over t of a[r * a_row + t * a_step] * b[t][lane],
 * and where `top` is given top[lane] = max(top[lane], c[r][lane]). Both products of attention have
 * this form; constant `rows`, `vecs` and one unit stride keep the accumulators in registers. Each
 * step fetches one line `ahead`: hardware prefetchers do not follow the narrow columns of V, nor
 * keep up with K once it lies in the third-level cache. */
INLINE void register_tile(const int rows, const int vecs, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,
                          bool accumulate, vec *top, const real *ahead, ptrdiff_t ahead_step) {
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++)
            sum[r][n] = accumulate ? load(c + r * PANEL + n * LANES) : splat(0);
    for (ptrdiff_t t = 0; t < steps; t++) {
        __builtin_prefetch(ahead, 0, 2);
        vec operand[TILE_VECS];
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) operand[n] = load(b + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec factor = splat(a[r * a_row]);
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) sum[r][n] = factor * operand[n] + sum[r][n];
        }
        a += a_step;
        b += PANEL;
        ahead += ahead_step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) store(c + r * PANEL + n * LANES, sum[r][n]);
    if (top)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) top[n] = larger(sum[r][n], top[n]);
}

#define PRODUCT_ARGS                                                                              \
    const real *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,    \
        bool accumulate, vec *top

INLINE void product_of_vecs(const int vecs, ptrdiff_t rows, PRODUCT_ARGS) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
        if (a_step == 1) {
            /* Rows of K, one behind the other: the same rows of the next strip. */
            bool packed = a_row == steps;
            register_tile(TILE_ROWS, vecs, a, a_row, 1, steps, b, c, accumulate, top,
                          packed ? a + STRIP_KEYS * a_row : a, packed ? TILE_ROWS : 0);
        } else if (a_row == 1)
            register_tile(TILE_ROWS, vecs, a, 1, a_step, steps, b, c, accumulate, top,
                          a + STRIP_KEYS * a_step, a_step);
        else
            register_tile(TILE_ROWS, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0);
        a += TILE_ROWS * a_row;
        c += TILE_ROWS * PANEL;
    }
    switch (rows) {
#define ROWS(n)                                                                                   \
    case n:                                                                                       \
        register_tile(n, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0);             \
        break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5)
#if TILE_ROWS == 8
        ROWS(6) ROWS(7)
#endif
#undef ROWS
    }
}

/* The product above for any number of rows of the first `vecs` vectors of a panel. */
static void product(int vecs, ptrdiff_t rows, PRODUCT_ARGS) {
    switch (vecs) {
    case 1: product_of_vecs(1, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
    case 2: product_of_vecs(2, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#if TILE_VECS == 3
    case 3: product_of_vecs(3, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#endif
    }
}

/* The panel's share of the interval bookkeeping that the Tile explains. */
static void bound_panel(Tile *t, int p) {
    ptrdiff_t first = PTRDIFF_MAX, last = 0, inner_first = 0, inner_last = PTRDIFF_MAX;
    for (ptrdiff_t i = p * PANEL; i < t->n_queries && i < (p + 1) * PANEL; i++) {
        ptrdiff_t start = t->start[i], stop = t->stop[i];
        if (start < stop && start < first) first = start;
        if (start < stop && stop > last) last = stop;
        if (start > inner_first) inner_first = start;
        if (stop < inner_last) inner_last = stop;
    }
    t->panel[p].first = first;
    t->panel[p].last = last;
    t->panel[p].inner_first = inner_first;
    t->panel[p].inner_last = inner_last;
    t->panel[p].vecs = fewer((t->n_queries - p * PANEL + LANES - 1) / LANES, TILE_VECS);
    t->panel[p].started = 0;
    if (first < t->first) t->first = first;
    if (last > t->last) t->last = last;
}

/* columns[d][lane] = scale * (query `lane` of the LANES from `first` on)[d]. */
static void load_queries(const Tile *t, ptrdiff_t first, real *columns) {
    const real *rows[LANES];
    ptrdiff_t d = 0;
    for (int i = 0; i < LANES; i++) /* a lane without a query repeats the last one */
        rows[i] = t->q[first + i < t->n_queries ? first + i : t->n_queries - 1];
    vec scale = splat((real)t->scale);
    if (t->q_dim == 1)
        for (; d + LANES <= t->head_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = load_unaligned(rows[i] + d);
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(columns + (d + i) * PANEL, x[i] * scale);
        }
    for (; d < t->head_dim; d++)
        for (int i = 0; i < LANES; i++) columns[d * PANEL + i] = rows[i][d * t->q_dim] * scale[0];
}

/* The inverse: (row `lane` of the LANES from `first` on)[d] = columns[d][lane] * share[lane], but 0
 * where the query saw nothing, whatever is in its column. */
static void store_rows(const Tile *t, ptrdiff_t first, const real *columns, vec share, ivec saw) {
    int rows = fewer(t->n_queries - first, LANES);
    ptrdiff_t d = 0;
    if (t->out_dim == 1)
        for (; d + LANES <= t->value_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                x[i] = choose(saw, load(columns + (d + i) * PANEL) * share, splat(0));
            transpose(x);
            if (rows == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store_unaligned((real *)t->out[first + i] + d, x[i]);
            } else
                for (int i = 0; i < rows; i++) store_unaligned((real *)t->out[first + i] + d, x[i]);
        }
    for (; d < t->value_dim; d++) {
        vec x = choose(saw, load(columns + d * PANEL) * share, splat(0));
        for (int i = 0; i < rows; i++) ((real *)t->out[first + i])[d * t->out_dim] = x[i];
    }
}

static void begin(Tile *t) {
    t->panels = panels_for(t->n_queries);
    t->first = PTRDIFF_MAX;
    t->last = 0;
    Scratch s = scratch_of(t);
    for (int p = 0; p < t->panels; p++) {
        bound_panel(t, p);
        for (int n = 0; n < TILE_VECS; n++) {
            ptrdiff_t at = p * PANEL + n * LANES;
            store(s.row_max + at, splat(-INFINITY));
            store(s.row_sum + at, splat(0));
            if (n < t->panel[p].vecs)
                load_queries(t, at, s.q + p * PANEL * t->head_dim + n * LANES);
        }
    }
}

/* Which of the keys key, key + 1, ... a panel's queries see, as bounds relative to `key`. */
typedef struct {
    ivec start[TILE_VECS], stop[TILE_VECS];
} Bounds;

static Bounds bounds_from(const Tile *t, int panel, ptrdiff_t key) {
    lane_int start[PANEL] = {0}, stop[PANEL] = {0};
    for (int i = 0; i < PANEL && panel * PANEL + i < t->n_queries; i++) {
        ptrdiff_t from = t->start[panel * PANEL + i] - key, to = t->stop[panel * PANEL + i] - key;
        start[i] = (lane_int)(from < 0 ? 0 : from > BLOCK_KEYS ? BLOCK_KEYS : from);
        stop[i] = (lane_int)(to < 0 ? 0 : to > BLOCK_KEYS ? BLOCK_KEYS : to);
    }
    Bounds b;
    memcpy(b.start, start, sizeof b.start);
    memcpy(b.stop, stop, sizeof b.stop);
    return b;
}

INLINE ivec sees(const Bounds *b, int n, int j) {
    ivec key = splat_int(j);
    return (b->start[n] <= key) & (key < b->stop[n]);
}

/* Put -inf where a query does not see a key, and take the maximum of what is left. */
static void hide_unseen(const Bounds *bounds, int vecs, int keys, real *scores, vec *top) {
    for (int n = 0; n < vecs; n++) top[n] = splat(-INFINITY);
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * PANEL + n * LANES;
            vec x = choose(sees(bounds, n, j), load(s), splat(-INFINITY));
            store(s, x);
            top[n] = larger(x, top[n]);
        }
}

/* Scores to weights relative to `top`; their sum is added to `sum`. Subtracting before scaling by
 * log2(e) costs an instruction more than a multiply-add, but the largest weight is exactly 1 and no
 * finite score overflows. */
INLINE void weigh_vecs(const int vecs, int keys, real *scores, const vec *top, vec *sum) {
    vec shift[TILE_VECS], total[TILE_VECS];
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) shift[n] = top[n], total[n] = sum[n];
    for (int j = 0; j < keys; j++) {
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * PANEL + n * LANES;
            vec p = exp_negative(load(s) - shift[n]);
            store(s, p);
            total[n] += p;
        }
    }
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) sum[n] = total[n];
}

static void weigh(int vecs, int keys, real *scores, const vec *top, vec *sum) {
    switch (vecs) {
    case 1: weigh_vecs(1, keys, scores, top, sum); break;
    case 2: weigh_vecs(2, keys, scores, top, sum); break;
#if TILE_VECS == 3
    case 3: weigh_vecs(3, keys, scores, top, sum); break;
#endif
    }
}

/* Is each value of these keys finite? x * 0 is 0 for finite x only. */
static bool all_finite(const Tile *t, const real *v, int keys) {
    vec sums[4] = {{0}}; /* independent, or the latency of one sum would be the time of the loop */
    real rest = 0;
    for (int j = 0; j < keys; j++) {
        const real *row = v + j * t->v_key;
        ptrdiff_t d = 0;
        if (t->v_dim == 1) {
            for (; d + 4 * LANES <= t->value_dim; d += 4 * LANES)
#pragma GCC unroll 4
                for (int n = 0; n < 4; n++) sums[n] += load_unaligned(row + d + n * LANES) * 0;
            for (; d + LANES <= t->value_dim; d += LANES) sums[0] += load_unaligned(row + d) * 0;
        }
        for (; d < t->value_dim; d++) rest += row[d * t->v_dim] * 0;
    }
    vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; i < LANES; i++) rest += sum[i];
    return rest == 0;
}

/* The second product where some query must not meet a NaN or an Inf in some v that it does not
 * see: 0 * NaN is a NaN, so unseen keys are left out lane by lane. */
static void careful_product(const Tile *t, const Bounds *bounds, int vecs, const real *v, int keys,
                            const real *weights, real *out) {
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            ivec seen = sees(bounds, n, j);
            vec p = load(weights + j * PANEL + n * LANES);
            for (ptrdiff_t d = 0; d < t->value_dim; d++) {
                real *o = out + d * PANEL + n * LANES;
                vec sum = load(o);
                store(o, choose(seen, splat(v[j * t->v_key + d * t->v_dim]) * p + sum, sum));
            }
        }
}

static bool all_see(const Tile *t, int p, ptrdiff_t key, int keys) {
    return t->panel[p].inner_first <= key && key + keys <= t->panel[p].inner_last;
}

/* One panel's scores for some keys, -inf where unseen; `top` takes part in their maximum. */
static void score(const Tile *t, int p, const real *q, ptrdiff_t key, int keys, real *scores,
                  vec *top) {
    int vecs = t->panel[p].vecs;
    vec strip_top[TILE_VECS];
    for (int n = 0; n < vecs; n++) strip_top[n] = splat(-INFINITY);
    product(vecs, keys, (const real *)t->k + key * t->k_key, t->k_key, t->k_dim, t->head_dim, q,
            scores, false, strip_top);
    if (!all_see(t, p, key, keys)) {
        Bounds bounds = bounds_from(t, p, key);
        hide_unseen(&bounds, vecs, keys, scores, strip_top);
    }
    for (int n = 0; n < vecs; n++) top[n] = larger(strip_top[n], top[n]);
}

/* The weighted sum of some keys' values, for one panel. */
static void sum_values(const Tile *t, int p, ptrdiff_t key, int keys, const real *weights,
                       real *out, bool accumulate) {
    int vecs = t->panel[p].vecs;
    const real *v = (const real *)t->v + key * t->v_key;
    if (!all_see(t, p, key, keys) && !all_finite(t, v, keys)) {
        Bounds bounds = bounds_from(t, p, key);
        if (!accumulate) memset(out, 0, sizeof(real) * PANEL * (size_t)t->value_dim);
        careful_product(t, &bounds, vecs, v, keys, weights, out);
        return;
    }
    product(vecs, t->value_dim, v, t->v_dim, t->v_key, keys, weights, out, accumulate, NULL);
}

/* What one panel knows of the block under way. */
typedef struct {
    ptrdiff_t begin, end; /* the keys that it sees some of */
    real *scores;         /* of key `begin` */
    vec top[TILE_VECS], sum[TILE_VECS], rescale[TILE_VECS];
} PanelBlock;

/* The keys of the strip [key, key + STRIP_KEYS) that the panel sees some of, as [from, to). */
static bool strip_of(const PanelBlock *b, ptrdiff_t key, ptrdiff_t *from, ptrdiff_t *to) {
    *from = key > b->begin ? key : b->begin;
    *to = key + STRIP_KEYS < b->end ? key + STRIP_KEYS : b->end;
    return *from < *to;
}

static void raise_max(PanelBlock *b, real *row_max, real margin) {
    for (int n = 0; n < TILE_VECS; n++) {
        vec before = load(row_max + n * LANES);
        vec now = larger(before, b->top[n] + margin);
        store(row_max + n * LANES, now);
        /* While a row has seen nothing its maximum is -inf; any finite one will do. */
        b->top[n] = choose(now == splat(-INFINITY), splat(0), now);
        b->rescale[n] = exp_negative(before - b->top[n]);
    }
}

static void join_block(const PanelBlock *b, int vecs, ptrdiff_t value_dim, real *row_sum,
                       const real *block_out, real *out) {
    for (int n = 0; n < vecs; n++) {
        real *sum = row_sum + n * LANES;
        store(sum, load(sum) * b->rescale[n] + b->sum[n]);
        if (block_out == out) continue; /* the first block */
        for (ptrdiff_t d = 0; d < value_dim; d++) {
            real *total = out + d * PANEL + n * LANES;
            store(total, load(total) * b->rescale[n] + load(block_out + d * PANEL + n * LANES));
        }
    }
}

static void attend(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    Scratch s = scratch_of(t);
    PanelBlock blocks[PANELS];
    for (int p = 0; p < t->panels; p++) {
        PanelBlock *b = &blocks[p];
        b->begin = t->panel[p].first > begin ? t->panel[p].first : begin;
        b->end = t->panel[p].last < end ? t->panel[p].last : end;
        b->scores = s.scores + (p * (end - begin) + (b->begin - begin)) * PANEL;
        for (int n = 0; n < TILE_VECS; n++) b->top[n] = splat(-INFINITY), b->sum[n] = splat(0);
    }

    ptrdiff_t from, to;
    for (ptrdiff_t key = begin; key < end; key += STRIP_KEYS)
        for (int p = 0; p < t->panels; p++) {
            PanelBlock *b = &blocks[p];
            if (strip_of(b, key, &from, &to))
                score(t, p, s.q + p * PANEL * t->head_dim, from, (int)(to - from),
                      b->scores + (from - b->begin) * PANEL, b->top);
        }
    for (int p = 0; p < t->panels; p++)
        if (blocks[p].begin < blocks[p].end) raise_max(&blocks[p], s.row_max + p * PANEL, (real)t->margin);

    for (ptrdiff_t key = begin; key < end; key += STRIP_KEYS)
        for (int p = 0; p < t->panels; p++) {
            PanelBlock *b = &blocks[p];
            if (!strip_of(b, key, &from, &to)) continue;
            real *weights = b->scores + (from - b->begin) * PANEL;
            real *out = t->panel[p].started ? s.block_out : s.out;
            weigh(t->panel[p].vecs, (int)(to - from), weights, b->top, b->sum);
            sum_values(t, p, from, (int)(to - from), weights, out + p * PANEL * t->value_dim,
                       from > b->begin);
        }
    for (int p = 0; p < t->panels; p++) {
        if (blocks[p].begin >= blocks[p].end) continue;
        ptrdiff_t at = p * PANEL * t->value_dim;
        join_block(&blocks[p], t->panel[p].vecs, t->value_dim, s.row_sum + p * PANEL,
                   (t->panel[p].started ? s.block_out : s.out) + at, s.out + at);
        t->panel[p].started = 1;
    }
}

/* Is some sum of values not finite although the sum of its weights is? */
static bool overflowed(const Tile *t, const Scratch *s) {
    vec wrong = splat(0);
    for (int p = 0; p < t->panels; p++)
        for (int n = 0; n < t->panel[p].vecs && t->panel[p].started; n++) {
            const real *out = s->out + p * PANEL * t->value_dim + n * LANES;
            vec not_finite = splat(0); /* x * 0 is a NaN then, and so is every sum with it */
            for (ptrdiff_t d = 0; d < t->value_dim; d++) not_finite += load(out + d * PANEL) * 0;
            vec sum = load(s->row_sum + p * PANEL + n * LANES);
            wrong += choose(sum * 0 == splat(0), not_finite, splat(0));
        }
    real all = 0;
    for (int i = 0; i < LANES; i++) all += wrong[i];
    return all != 0;
}

static int finish(Tile *t) {
    Scratch s = scratch_of(t);
    if (t->margin == 0 && overflowed(t, &s)) return 0;
    for (int p = 0; p < t->panels; p++)
        for (int n = 0; n < t->panel[p].vecs; n++) {
            ptrdiff_t at = p * PANEL + n * LANES;
            ivec saw = {0};
            for (int i = 0; i < LANES && at + i < t->n_queries; i++)
                saw[i] = t->start[at + i] < t->stop[at + i] ? -1 : 0;
            /* A sum of 0 with a key in sight: all scores are -inf, 0 / 0 as the formula says. */
            vec sum = load(s.row_sum + at);
            vec share = choose(sum == splat(0), splat(NAN), splat(1) / sum);
            store_rows(t, at, s.out + p * PANEL * t->value_dim + n * LANES, share, saw);
        }
    if (t->want_lse)
        for (ptrdiff_t i = 0; i < t->n_queries; i++) {
            double top = s.row_max[i]; /* log(NaN) where the top is Inf: Inf - Inf was weighed */
            t->lse[i] = top == INFINITY ? top : top + log((double)s.row_sum[i]);
        }
    return 1;
}

/* Flops of `rounds` rounds of independent multiply-adds: what the machine can do at most. */
static double peak(ptrdiff_t rounds) {
    vec sum[TILE_ROWS][TILE_VECS], factor = splat((real)0.5), term = splat((real)1);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
        for (int n = 0; n < TILE_VECS; n++) {
            sum[r][n] = splat(1);
            HIDE_VALUE(sum[r][n]); /* or equal ones would be computed once */
        }
    HIDE_VALUE(factor);
    HIDE_VALUE(term);
    for (ptrdiff_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
            for (int n = 0; n < TILE_VECS; n++) sum[r][n] = sum[r][n] * factor + term;
    vec all = splat(0);
    for (int r = 0; r < TILE_ROWS; r++)
        for (int n = 0; n < TILE_VECS; n++) all += sum[r][n];
    HIDE_VALUE(all);
    return 2.0 * (double)rounds * TILE_ROWS * TILE_VECS * LANES;
}

const TileKernels TABLE = {TILE_QUERIES, scratch_bytes, begin, attend, finish, peak};
