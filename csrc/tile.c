/* The kernels of a tile, one body for every instruction set and dtype.
 *
 * Compiled once for each pair, with that instruction set's flags, -DTABLE=<the table's name> and
 * -DREAL_IS_DOUBLE for float64, or -DPARTS=<n> where the products are those of parts.h. A panel is
 * what one register tile holds: PANEL queries in TILE_VECS vectors. Within a block of keys,
 * S^T = K Q^T, the weights P^T = exp(S^T - max) and O^T = V^T P^T follow each other as in
 * FlashAttention (Dao et al. 2022, algorithm 1), except that the maximum is that of the whole block
 * and O^T is rescaled once per block; in parts otherwise: attend_parts.h.
 */
#include "simd.h"

/* Keys that all panels pass over in turn while they are in the cache, and whose values are summed from
 * zero before they join the running sum. One run over all keys would have 3 to 25 times NumPy's rounding
 * error; blocks of 128 make too many partial sums. */
#define PASS_KEYS 512
#ifdef PARTS
#define CHUNK 32 /* head dims or keys that one step of a product in parts sums up */
#define SCORE_KEYS STRIP_KEYS /* whose scores are kept: see attend_parts.h */
#else
#define SCORE_KEYS PASS_KEYS
#endif
#if !defined(PARTS) || defined(HAS_TILES)
#define HAS_GRADIENT /* parts without tiles leave gradients to float32 */
#endif

#include "product.h"
#define LN2 0.69314718055994530942

#ifdef PARTS
#include "parts.h"
#endif

static int panels_for(ptrdiff_t queries) { return (int)((queries + PANEL - 1) / PANEL); }

static size_t scratch_bytes(const Tile *t, ptrdiff_t queries) {
    Scratch s;
    return lay_out(t, t->differentiating ? PANELS : panels_for(queries), NULL, &s);
}

/* The scratch of a tile that has begun. */
static Scratch scratch_of(const Tile *t) { return *(const Scratch *)t->scratch; }

#include "range.h"
#include "strongest.h"

/* How products become scores and these become weights. Where nothing in natural units is added to
 * a score, nor may its scale be near the end of the range, the factor log2(e) of the exponent goes into
 * the queries. */
static void settle_units(Tile *t) {
    double size = fabs(t->scale);
    t->careful = may_overflow(t);
    bool natural = t->has_bias || t->has_alibi || t->has_sinks || t->careful ||
                   t->measure == SQUARED_DISTANCE;
    t->score_scale = 1;
    t->exponent = natural ? LOG2_E : 1;
    t->q_scale = t->scale * (natural || t->softcap > 0 ? 1 : LOG2_E);
    if (t->measure != DOT) {
        t->measure_scale = t->q_scale;
        t->q_scale = 1;
    } else if (EXACT_QUERIES && size > 0 && size < INFINITY) {
        /* Only by a power of 2, so that nothing is rounded; the rest of the scale comes later. */
        double power = exp2(floor(log2(size)));
        t->q_scale = t->scale < 0 ? -power : power;
        if (natural || t->softcap > 0)
            t->score_scale = size / power;
        else
            t->exponent = size / power * LOG2_E;
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

/* The inverse of load_queries: (row `lane` of the LANES from `first` on)[d] = columns[d][lane] *
 * share[lane], but 0 where the query saw nothing, whatever is in its column. */
static void store_rows(const Tile *t, ptrdiff_t first, const real *columns, vec share, ivec saw) {
    int rows = fewer(t->n_queries - first, LANES);
    ptrdiff_t d = 0;
    if (t->out_dim == t->out_format.bytes)
        for (; d + LANES <= t->value_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                x[i] = choose(saw, load(columns + (d + i) * PANEL) * share, splat(0));
            transpose(x);
            for (int i = 0; i < rows; i++)
                store_numbers(t->out[first + i] + d * t->out_dim, t->out_format, x[i]);
        }
    for (; d < t->value_dim; d++) {
        vec x = choose(saw, load(columns + d * PANEL) * share, splat(0));
        for (int i = 0; i < rows; i++)
            write_number(t->out[first + i] + d * t->out_dim, t->out_format, x[i]);
    }
}

/* A row starts with its sink, a score without a value, or with nothing. */
static void start_rows(const Tile *t, const Scratch *s, ptrdiff_t first) {
    for (ptrdiff_t i = first; i < first + LANES; i++) {
        double sink = t->has_sinks && i < t->n_queries ? t->sink[i] : -INFINITY;
        s->row_max[i] = (real)(sink + t->margin);
        s->row_sum[i] = sink == -INFINITY  ? 0
                        : sink == INFINITY ? 1
                                           : (real)(WEIGHT_UNIT * exp(sink - (sink + t->margin)));
        s->saw[i] = 0;
        s->wrong[i] = 0;
    }
}

static void begin(Tile *t) {
    t->panels = panels_for(t->n_queries);
    t->first = PTRDIFF_MAX;
    t->last = 0;
    for (ptrdiff_t i = 0; i < t->n_queries && t->margin > 0; i++)
        if (!(t->panel[i / PANEL].again >> i % PANEL & 1)) t->start[i] = t->stop[i] = 0;
    settle_units(t);
    clear_best(t);
    Scratch s;
    lay_out(t, t->differentiating ? PANELS : t->panels, t->scratch, &s);
    *s.own = s;
    for (int p = 0; p < t->panels; p++) {
        bound_panel(t, p);
        for (int n = 0; n < t->panel[p].vecs; n++) start_rows(t, &s, p * PANEL + n * LANES);
        ready_queries(t, &s, p);
    }
}

/* Make the strip of a key ready by `ready_keys` or `ready_values`, unless its bit says that it is. */
static void need(const Tile *t, const Scratch *s, ptrdiff_t key, uint64_t *done,
                 void (*ready)(const Tile *, const Scratch *, ptrdiff_t, ptrdiff_t)) {
    ptrdiff_t begin = key / STRIP_KEYS * STRIP_KEYS, end = begin + STRIP_KEYS;
    uint64_t bit = (uint64_t)1 << begin % PASS_KEYS / STRIP_KEYS;
    if (!(*done & bit)) ready(t, s, begin, end < s->ready->end ? end : s->ready->end);
    *done |= bit;
}

/* One panel's scores for a strip, -inf where unseen; `top` takes part in their maximum. Returns whether
 * anything is seen. */
static bool score(const Tile *t, const Scratch *s, int p, Strip *strip, vec *top) {
    int vecs = t->panel[p].vecs;
    strip->seen = strip->keys > 0 ? look(t, p, strip) : SEE_NONE;
    if (strip->seen == SEE_NONE) return false;

    vec strip_top[TILE_VECS];
    for (int n = 0; n < vecs; n++) strip_top[n] = splat(-INFINITY);
    need(t, s, strip->key, &s->ready->keys, ready_keys);
    multiply_keys(t, s, p, strip, strip_top);
    finish_scores(t, s, p, strip, strip_top);
    if (t->careful) draw_in_scores(t, p, strip, strip_top);
    for (int n = 0; n < vecs; n++) {
        ivec *saw = (ivec *)(s->saw + p * PANEL + n * LANES);
        for (int w = 0; w < WORDS && strip->seen == SEE_SOME; w++)
            *saw |= *(const ivec *)(strip->words + w * PANEL + n * LANES) != 0;
        if (strip->seen == SEE_ALL) *saw = splat_int(-1);
        top[n] = larger(strip_top[n], top[n]);
    }
    return true;
}

/* The panel's strips of the keys [begin, end): of each what the panel may see, in whole grains. Returns
 * their number. */
static int open_block(const Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end,
                       PanelBlock *b) {
    b->live = false;
    for (int n = 0; n < TILE_VECS; n++) b->top[n] = splat(-INFINITY), b->sum[n] = splat(0);
    for (int i = 0; begin + i * STRIP_KEYS < end; i++) {
        ptrdiff_t from = begin + i * STRIP_KEYS, to = from + STRIP_KEYS < end ? from + STRIP_KEYS : end;
        if (from < t->panel[p].first) from = t->panel[p].first / GRAIN * GRAIN;
        if (to > t->panel[p].last) to = round_up(t->panel[p].last, GRAIN);
        if (to > end) to = end;
        b->strips[i] = (Strip){
            .key = from,
            .keys = to > from ? (int)(to - from) : 0,
            .scores = s->scores + (from - begin) % SCORE_KEYS * PANEL,
            .words = s->seen + i * WORDS * PANEL,
            .seen = SEE_NONE,
        };
    }
    return (int)((end - begin + STRIP_KEYS - 1) / STRIP_KEYS);
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

/* Where there are no values to weigh. */
static void sum_weights(const Tile *t, int p, PanelBlock *b, const Strip *strip) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < t->panel[p].vecs; n++) {
        vec top = b->top[n], even = b->sum[n], odd = splat(0);
        int j = 0;
        for (; j + 2 <= strip->keys; j += 2) {
            const real *scores = strip->scores + j * PANEL + n * LANES;
            even += weight_from(load(scores), top, exponent);
            odd += weight_from(load(scores + PANEL), top, exponent);
        }
        if (j < strip->keys)
            even += weight_from(load(strip->scores + j * PANEL + n * LANES), top, exponent);
        b->sum[n] = even + odd;
    }
}

#ifdef PARTS
#include "attend_parts.h"
#else
static void raise_max(const Tile *t, int vecs, PanelBlock *b, real *row_max) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < vecs; n++) {
        vec before = load(row_max + n * LANES);
        vec now = larger(before, b->top[n] + (real)t->margin);
        store(row_max + n * LANES, now);
        /* While a row has seen nothing its maximum is -inf; any finite one will do. */
        b->top[n] = choose(now == splat(-INFINITY), splat(0), now);
        /* An unchanged maximum may be an infinite sink. */
        vec factor = weight_from(before, b->top[n], exponent) * (real)(1 / WEIGHT_UNIT);
        b->rescale[n] = choose(before == now, splat(1), factor);
    }
}

/* One panel's attention to one block. */
static void attend_block(Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end) {
    PanelBlock b;
    int strips = open_block(t, s, p, begin, end, &b);
    for (int i = 0; i < strips; i++) b.live |= score(t, s, p, &b.strips[i], b.top);
    if (!b.live) return;
    real *out = s->out + p * PANEL * s->out_rows;
    real *block_out = t->panel[p].started ? s->block_out : out;
    raise_max(t, t->panel[p].vecs, &b, s->row_max + p * PANEL);
    for (int n = 0; n < t->panel[p].vecs; n++)
        note_nan(s, p, n, b.strips, strips, b.rescale[n] != 1, splat(0));
    for (int i = 0; i < strips; i++) {
        if (b.strips[i].seen == SEE_NONE) continue;
        if (t->n_best > 0) collect_strip(t, p, &b.strips[i]);
        if (t->value_dim > 0)
            need(t, s, b.strips[i].key, &s->ready->values, ready_values);
        else
            sum_weights(t, p, &b, &b.strips[i]);
    }
    if (t->value_dim > 0) sum_values(t, s, p, &b, strips, block_out);
    join_block(&b, t->panel[p].vecs, t->value_dim, s->row_sum + p * PANEL, block_out, out);
    t->panel[p].started = 1;
}
#endif

static void attend(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    Scratch s = scratch_of(t);
    OPEN_TILES();
    *s.ready = (Ready){.end = end};
    for (int p = 0; p < t->panels; p++) attend_block(t, &s, p, begin, end);
    CLOSE_TILES();
}

/* Results of the rows and columns that a second run is for. */
static void store_lost(const Tile *t, const Scratch *s, int p) {
    for (ptrdiff_t d = 0; d < t->value_dim && t->panel[p].again; d++)
        for (uint64_t bits = s->lost[p * t->value_dim + d]; bits; bits &= bits - 1) {
            int i = __builtin_ctzll(bits), at = p * PANEL + i;
            real sum = s->out[(p * s->out_rows + d) * PANEL + i], x = sum / s->row_sum[at];
            if (isfinite(sum) && isinf(x)) x = copysign(REAL_MAX, x); /* a mean, rounded up */
            write_number(t->out[at] + d * t->out_dim, t->out_format, s->row_sum[at] == 0 ? NAN : x);
        }
}

static void store_panel(const Tile *t, const Scratch *s, int p) {
    for (int n = 0; n < t->panel[p].vecs; n++) {
        ptrdiff_t at = p * PANEL + n * LANES;
        ivec saw = *(const ivec *)(s->saw + at);
        /* A sum of 0 with a key in sight: all scores are -inf, 0 / 0 as the formula says. */
        vec sum = load(s->row_sum + at);
        vec share = choose(sum == splat(0), splat(NAN), splat(1) / sum);
        store_rows(t, at, s->out + p * PANEL * s->out_rows + n * LANES, share, saw);
    }
}

static int finish(Tile *t) {
    Scratch s = scratch_of(t);
    bool again = t->margin == 0 && find_lost(t, &s);
    settle_least(t);
    for (int p = 0; p < t->panels; p++)
        if (t->margin > 0) store_lost(t, &s, p);
        else store_panel(t, &s, p);
    double unit = t->exponent == LOG2_E ? 1 : t->exponent * LN2;
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        s.row_max[i] += s.wrong[i];
        double top = s.row_max[i] * unit; /* log(NaN) where the top is Inf: Inf - Inf was weighed */
        if (t->want_lse && delivers(t, i))
            t->lse[i] = top == INFINITY ? top : top + log((double)s.row_sum[i] / WEIGHT_UNIT);
    }
    return !again;
}

/* Scores to the weights of the result, in place. */
static void settle_weights(const Tile *t, const Scratch *s, int p, const Strip *strip) {
    vec exponent = splat((real)t->exponent);
    for (int n = 0; n < t->panel[p].vecs; n++) {
        ptrdiff_t lane = p * PANEL + n * LANES;
        Softmax row = softmax_of(load(s->row_max + lane), load(s->row_sum + lane));
        ivec own = delivered(t, p, n);
        for (int j = 0; j < strip->keys; j++) {
            real *score = strip->scores + j * PANEL + n * LANES;
            vec weight = weight_from(load(score), row.top, exponent) * row.share;
            store(score, choose(sees(strip, n, j) & own, weight, splat(0)));
        }
    }
}

static void store_weights(const Tile *t, const Scratch *s, int p, const Strip *strip) {
    settle_weights(t, s, p, strip);
    for (int i = 0; i < PANEL && p * PANEL + i < t->n_queries; i++)
        for (int j = 0, keys = delivers(t, p * PANEL + i) ? strip->keys : 0; j < keys; j++)
            write_number(t->weights[p * PANEL + i] + (strip->key + j) * t->weights_key, t->out_format,
                         strip->scores[j * PANEL + i]);
}

/* Make the scores of the keys [begin, end) once more, now that the sums are known. */
static void each_strip(Tile *t, ptrdiff_t begin, ptrdiff_t end,
                       void (*use)(const Tile *, const Scratch *, int, const Strip *)) {
    Scratch s = scratch_of(t);
    OPEN_TILES();
    *s.ready = (Ready){.end = end};
    for (int p = 0; p < t->panels; p++) {
        PanelBlock b;
        int strips = open_block(t, &s, p, begin, end, &b);
        for (int i = 0; i < strips; i++)
            if (score(t, &s, p, &b.strips[i], b.top)) use(t, &s, p, &b.strips[i]);
    }
    CLOSE_TILES();
}

static void weights(Tile *t, ptrdiff_t begin, ptrdiff_t end) { each_strip(t, begin, end, store_weights); }

static void collect(Tile *t, ptrdiff_t begin, ptrdiff_t end) { each_strip(t, begin, end, collect_keys); }

#include "maps.h"

static double join(char *partial, ptrdiff_t parts, ptrdiff_t bytes, ptrdiff_t rows, ptrdiff_t row,
                   ptrdiff_t value_dim, char *out, ptrdiff_t out_dim, NumberFormat format) {
    double top = -INFINITY, sum = 0;
#define SHARE(part) ((double *)(partial + (part) * bytes))[row]
    for (ptrdiff_t i = 0; i < parts; i++)
        if (SHARE(i) > top) top = SHARE(i);
    for (ptrdiff_t i = 0; i < parts; i++) {
        SHARE(i) = SHARE(i) == top ? 1 : exp(SHARE(i) - top); /* the top may be infinite */
        sum += SHARE(i);
    }
    for (ptrdiff_t d = 0; d < value_dim; d++) {
        double mean = 0;
        bool finite = true;
        for (ptrdiff_t i = 0; i < parts; i++) {
            const real *results = (const real *)(partial + i * bytes + rows * (ptrdiff_t)sizeof top);
            double x = results[row * value_dim + d];
            /* A part whose scores are all -inf is NaN, and nothing to a part with others. */
            if (SHARE(i) != 0) mean += SHARE(i) / sum * x, finite &= isfinite(x);
        }
        mean = finite ? fmin(fmax(mean, -REAL_MAX), REAL_MAX) : mean;
        write_number(out + d * out_dim, format, (real)mean);
    }
#undef SHARE
    return top + log(sum);
}

#ifdef HAS_GRADIENT
#include "gradient.h"

static const GradientKernels GRADIENT_KERNELS = {gradient_scratch_bytes, prepare, normalize, open_keys,
                                                 differentiate, add_grad_q, close_keys};
#define GRADIENT &GRADIENT_KERNELS
#else
#define GRADIENT NULL
#endif

const TileKernels TABLE = {TILE_QUERIES, PANEL,   PASS_KEYS, scratch_bytes, begin, attend,       finish,
                           weights,      pool,    collect,   rank,          join,  sizeof(real), GRADIENT,
                           peak};
