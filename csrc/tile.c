/* The kernels of a tile: one body for every instruction set and dtype.
 *
 * Compiled once for each table of kernels, with the flags of its instruction set and
 * -DTABLE=<name>, and -DREAL_IS_DOUBLE for float64 or -DBF16_TERMS=<n> for bfloat16 hardware.
 *
 * The loop nest of the forward pass:
 *
 *   kernels.pyx, forward.pxi
 *     for each work item, on several threads            (batch entry, key head, tile, split)
 *     |  begin                                          pack Q, scaled
 *     |  for each block of BLOCK_K keys                 attend
 *   tile.c, block-inl.h, online_softmax_*-inl.h
 *     |  |  for each micropanel of MR queries           attend_block
 *     |  |  |  for each sub-block of SUB_BLOCK_K keys
 *     |  |  |  |  S^T = K Q^T                           multiply_keys: NR keys x MR queries
 *     |  |  |  |  softcap, bias, ALiBi, mask            finish_scores
 *     |  |  |  row_max = max(row_max, S)                rescale row_sum and O^T
 *     |  |  |  for each sub-block
 *     |  |  |  |  P^T = exp(S^T - row_max)              row_sum += P
 *     |  |  |  |  O^T += V^T P^T                        NR value dims x MR queries
 *     |  finish                                         out = O / row_sum, lse
 *     |  a second pass over the keys, if asked for      weights, bins or top k, from new scores
 *
 * This is FlashAttention (Dao et al. 2022, algorithm 1), except that the maximum is that of a whole
 * block. The backward pass (backward.pxi, backward-inl.h) has the same loops in another order: for
 * each block of keys, each tile of queries, each sub-block, each micropanel.
 *
 * Glossary:
 *
 *   tile          the queries of one work item, up to BLOCK_Q, of all heads that share a key head
 *   lane          an element of a vector; queries are in the lanes, except in decoding
 *   micropanel    MR queries: the lanes of MR_VECS vectors (BLIS's word)
 *   register tile NR rows x MR queries of sums, held in registers; rows are keys or value dims
 *   block         BLOCK_K keys, which stay in the cache while all micropanels read them
 *   sub-block     SUB_BLOCK_K keys, whose weights stay in the first-level cache
 *   split         a run of a key head's keys that is a work item by itself: split-KV, for decoding
 *   engine        an implementation of the matmuls: see matmul.h
 *   pack          to store an operand as an engine reads it
 *   term          one of the bfloat16 numbers whose sum is a float16 or float32 number
 *   special       a number, or a row with one, that an engine cannot represent
 *   decode        the engine for few queries: dims in the lanes
 *   metric        a score function that is not a dot product: distances, additive scores
 *   visible       a key is visible to a query unless a key range, a mask or a bias of -inf hides it
 *   EMPTY, PARTIAL, FULL   none, some or all keys of a sub-block are visible to a micropanel
 *   weight        WEIGHT_UNIT * exp(score - row_max); row_sum is their sum, and normalizes them
 *   rescale       to multiply sums by exp(old - new) when row_max grows
 *   lse, lse_rest the log-sum-exp of a row, and what its rounding lost
 *   rerun         a second run of a tile, for results that overflowed: see range-inl.h
 *   bin           a rectangle of queries x keys whose weights are summed for a weight map
 *   real          the type that a table computes in: float or double
 */
#include "block-inl.h"
#include "matmul.h"
#include "range-inl.h"
#include "top_k-inl.h"
#include "weight_map-inl.h"

#ifdef BF16_TERMS
#include "online_softmax_bf16-inl.h"
#else
#include "decode-inl.h"
#endif

_Static_assert(LANES <= MAX_LANES, "MAX_LANES bounds every vector");
_Static_assert(BLOCK_Q <= MAX_BLOCK_Q && BLOCK_Q % MR == 0, "a tile is whole micropanels");
_Static_assert(MICROPANELS <= MAX_MICROPANELS && MR <= 64, "a micropanel's queries are 64 bits");

static int micropanels_for(ptrdiff_t queries) { return (int)((queries + MR - 1) / MR); }

static size_t scratch_bytes(const Tile *t, ptrdiff_t queries) {
    Scratch s;
    return lay_out(t, t->differentiating ? MICROPANELS : micropanels_for(queries), NULL, &s);
}

/* Choose how products become scores, and scores become weights. The factor log2(e) of the exponent
 * goes into the queries, unless something in natural units is added to the scores, or scores may be
 * near the end of the range. */
static void choose_scaling(Tile *t, const MatmulEngine *engine) {
    double size = fabs(t->scale);
    t->check_range = may_overflow(t);
    bool natural = t->has_scales || t->has_bias || t->relative_bias || t->has_alibi ||
                   t->has_sinks || t->check_range || t->score_function == SQUARED_DISTANCE;
    t->score_scale = 1;
    t->exponent = natural ? LOG2_E : 1;
    t->q_scale = t->scale * (natural || t->softcap > 0 ? 1 : LOG2_E);
    if (t->score_function != DOT) {
        t->metric_scale = t->q_scale;
        t->q_scale = 1;
    } else if (engine->exact_queries && size > 0 && size < INFINITY) {
        /* Queries are scaled by a power of 2, which rounds nothing; the rest is applied to scores.
         */
        double power = exp2(floor(log2(size)));
        t->q_scale = t->scale < 0 ? -power : power;
        if (natural || t->softcap > 0) t->score_scale = size / power;
        else t->exponent = size / power * LOG2_E;
    }
}

/* Set the key ranges of a micropanel, and widen that of the tile. */
static void bound_micropanel(Tile *t, int p) {
    ptrdiff_t first = PTRDIFF_MAX, last = 0, inner_first = 0, inner_last = PTRDIFF_MAX;
    for (ptrdiff_t i = p * MR; i < t->n_queries && i < (p + 1) * MR; i++) {
        ptrdiff_t start = t->start[i], stop = t->stop[i];
        if (start < stop && start < first) first = start;
        if (start < stop && stop > last) last = stop;
        if (start > inner_first) inner_first = start;
        if (stop < inner_last) inner_last = stop;
    }
    t->micropanel[p].first = first;
    t->micropanel[p].last = last;
    t->micropanel[p].inner_first = inner_first;
    t->micropanel[p].inner_last = inner_last;
    t->micropanel[p].vecs = micropanel_vecs(t, p);
    t->micropanel[p].has_output = 0;
    if (first < t->first) t->first = first;
    if (last > t->last) t->last = last;
}

/* Store LANES rows of results: (row first + lane)[d] = columns[d][lane] * inv_sum[lane], but 0
 * where no key is visible, whatever the column holds. */
static void store_rows(const Tile *t, char *const *out, ptrdiff_t first, const real *columns,
                       vec inv_sum, ivec any_visible) {
    int rows = fewer(t->n_queries - first, LANES);
    ptrdiff_t d = 0;
    if (t->out_dim == t->out_format.bytes)
        for (; d + LANES <= t->value_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                x[i] = choose(any_visible, load(columns + (d + i) * MR) * inv_sum, splat(0));
            transpose(x);
            for (int i = 0; i < rows; i++)
                store_numbers(out[first + i] + d * t->out_dim, t->out_format, x[i]);
        }
    for (; d < t->value_dim; d++) {
        vec x = choose(any_visible, load(columns + d * MR) * inv_sum, splat(0));
        for (int i = 0; i < rows; i++)
            write_number(out[first + i] + d * t->out_dim, t->out_format, x[i]);
    }
}

/* A row starts with its sink, which is a score without a value, or empty. */
static void start_rows(const Tile *t, const Scratch *s, ptrdiff_t first) {
    for (ptrdiff_t i = first; i < first + LANES; i++) {
        double sink = t->has_sinks && i < t->n_queries ? t->sink[i] : -INFINITY;
        s->row_max[i] = (real)(sink + t->margin);
        s->row_sum[i] = sink == -INFINITY  ? 0
                        : sink == INFINITY ? 1
                                           : (real)(WEIGHT_UNIT * exp(sink - (sink + t->margin)));
        if (t->want_max) s->max_score[i] = -INFINITY;
        s->any_visible[i] = 0;
        s->nan_beside_inf[i] = 0;
    }
}

static void begin(Tile *t) {
    t->micropanels = micropanels_for(t->n_queries);
    t->first = PTRDIFF_MAX;
    t->last = 0;
    for (ptrdiff_t i = 0; i < t->n_queries && t->margin > 0; i++)
        if (!(t->micropanel[i / MR].rerun >> i % MR & 1)) t->start[i] = t->stop[i] = 0;
    const MatmulEngine *engine = choose_engine(t);
    choose_scaling(t, engine);
    clear_heaps(t);
    Scratch s;
    lay_out(t, t->differentiating ? MICROPANELS : t->micropanels, t->scratch, &s);
    s.engine = engine;
    *s.own = s;
    for (int p = 0; p < t->micropanels; p++) {
        bound_micropanel(t, p);
        for (int n = 0; n < t->micropanel[p].vecs; n++) start_rows(t, &s, p * MR + n * LANES);
        engine->pack_queries(t, &s, p);
    }
}

static void attend(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    Scratch s = scratch_of(t);
    begin_matmuls();
    *s.packed = (PackedSubBlocks){.end = end};
    for (int p = 0; p < t->micropanels; p++) s.engine->attend_block(t, &s, p, begin, end);
    end_matmuls();
}

/* Store the results that the rerun is for. */
static void store_rerun(const Tile *t, const Scratch *s, int p) {
    for (ptrdiff_t d = 0; d < t->value_dim && t->micropanel[p].rerun; d++)
        for (uint64_t bits = s->overflowed[p * t->value_dim + d]; bits; bits &= bits - 1) {
            int i = __builtin_ctzll(bits), at = p * MR + i;
            real sum = s->out[(p * s->out_rows + d) * MR + i], x = sum / s->row_sum[at];
            x *= (real)t->keep_factor;
            if (isfinite(sum) && isinf(x))
                x = copysign(REAL_MAX, x); /* the mean of finite values, rounded up */
            write_number(t->out[at] + d * t->out_dim, t->out_format, s->row_sum[at] == 0 ? NAN : x);
        }
}

static void store_micropanel(const Tile *t, const Scratch *s, int p) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t at = p * MR + n * LANES;
        ivec any_visible = *(const ivec *)(s->any_visible + at);
        /* A sum of 0 with a visible key: all scores are -inf, and the formula gives 0 / 0. */
        vec sum = load(s->row_sum + at);
        vec inv_sum = choose(sum == splat(0), splat(NAN), splat((real)t->keep_factor) / sum);
        store_rows(t, t->out, at, s->out + p * MR * s->out_rows + n * LANES, inv_sum, any_visible);
    }
}

/* Store the tangents of a micropanel's results. With the sums of tangents-inl.h, of values S, of
 * their tangents T and of score tangents, out = S / row_sum, d_lse = the last / row_sum and
 * d_out = (T - d_lse * S) / row_sum. A rerun replaces only what overflowed. */
static void store_tangents(const Tile *t, const Scratch *s, int p) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t at = p * MR + n * LANES, dims = t->value_dim;
        const real *out = s->out + p * MR * s->out_rows + n * LANES;
        real *d_out = s->out + (p * s->out_rows + dims) * MR + n * LANES;
        ivec any_visible = *(const ivec *)(s->any_visible + at);
        vec sum = load(s->row_sum + at);
        vec inv_sum = choose(sum == splat(0), splat(NAN), splat(1) / sum);
        vec d_lse = choose(any_visible, load(d_out + dims * MR) * inv_sum, splat(0));
        inv_sum *= (real)t->keep_factor;
        for (ptrdiff_t d = 0; d < dims; d++)
            store(d_out + d * MR, load(d_out + d * MR) - d_lse * load(out + d * MR));
        if (t->margin == 0) store_rows(t, t->d_out, at, d_out, inv_sum, any_visible);
        for (int i = 0; i < LANES && at + i < t->n_queries; i++) {
            bool again = t->micropanel[p].rerun >> (n * LANES + i) & 1;
            if (t->margin == 0) t->d_lse[at + i] = d_lse[i];
            if (t->margin == 0 || !again) continue;
            bool all = delivers(t, at + i);
            if (all || !isfinite(t->d_lse[at + i])) t->d_lse[at + i] = d_lse[i];
            for (ptrdiff_t d = 0; d < dims; d++) {
                char *to = t->d_out[at + i] + d * t->out_dim;
                if (all || !isfinite(read_number(to, t->out_format)))
                    write_number(to, t->out_format, d_out[d * MR + i] * inv_sum[i]);
            }
        }
    }
}

/* The largest score of a row. If scores are NaN the maximum may have missed them: then the sum is
 * NaN too, and so it is beside a sink that is no number, which tells nothing of the scores. */
static double max_score_of(const Tile *t, const Scratch *s, ptrdiff_t i, double unit) {
    double most = s->max_score[i] * unit, sink = t->has_sinks ? t->sink[i] : -INFINITY;
    if (!isnan(s->row_sum[i]) && !isnan(s->nan_beside_inf[i])) return most;
    if (!isnan(sink) && sink != INFINITY)
        return most == INFINITY && !isnan(s->nan_beside_inf[i]) ? most : NAN;
    for (ptrdiff_t key = t->start[i]; key < t->stop[i] && !isnan(most); key++)
        if (is_visible(t, i, key)) {
            double score = exact_score(t, i, key);
            if (isnan(score) || score > most) most = score;
        }
    return most;
}

static int finish(Tile *t) {
    Scratch s = scratch_of(t);
    bool rerun = t->margin == 0 && find_overflow(t, &s);
    set_top_k_thresholds(t);
    for (int p = 0; p < t->micropanels; p++) {
        if (t->forward_mode) store_tangents(t, &s, p);
        if (t->tangents_alone) continue;
        if (t->margin > 0) store_rerun(t, &s, p);
        else store_micropanel(t, &s, p);
    }
    double unit = t->exponent == LOG2_E ? 1 : t->exponent * LN2;
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        s.row_max[i] += s.nan_beside_inf[i];
        double top =
            s.row_max[i] * unit; /* if the top is Inf the sum has Inf - Inf, and its log is NaN */
        if (t->want_lse && delivers(t, i))
            t->lse[i] = top == INFINITY ? top : top + log((double)s.row_sum[i] / WEIGHT_UNIT);
        if (t->want_max && delivers(t, i)) t->max_score[i] = max_score_of(t, &s, i, unit);
    }
    return !rerun;
}

static void collect_top_k(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    each_sub_block(t, begin, end, collect_top_k_keys);
}

static double combine_splits(char *partial, ptrdiff_t splits, ptrdiff_t bytes, ptrdiff_t rows,
                             ptrdiff_t row, ptrdiff_t value_dim, char *out, ptrdiff_t out_dim,
                             NumberFormat format) {
    double top = -INFINITY, sum = 0;
#define WEIGHT(split) ((double *)(partial + (split)*bytes))[row]
    for (ptrdiff_t i = 0; i < splits; i++)
        if (WEIGHT(i) > top) top = WEIGHT(i);
    for (ptrdiff_t i = 0; i < splits; i++) {
        WEIGHT(i) = WEIGHT(i) == top ? 1 : exp(WEIGHT(i) - top); /* the top may be infinite */
        sum += WEIGHT(i);
    }
    for (ptrdiff_t d = 0; d < value_dim; d++) {
        double mean = 0;
        bool finite = true;
        for (ptrdiff_t i = 0; i < splits; i++) {
            const real *results =
                (const real *)(partial + i * bytes + rows * (ptrdiff_t)sizeof top);
            double x = results[row * value_dim + d];
            /* A split whose scores are all -inf is NaN, but adds nothing to the others. */
            if (WEIGHT(i) != 0) mean += WEIGHT(i) / sum * x, finite &= isfinite(x);
        }
        mean = finite ? fmin(fmax(mean, -REAL_MAX), REAL_MAX) : mean;
        write_number(out + d * out_dim, format, (real)mean);
    }
#undef WEIGHT
    return top + log(sum);
}

#ifdef HAS_BACKWARD
#include "backward-inl.h"

static const BackwardKernels BACKWARD_KERNELS = {
    .scratch_bytes = backward_scratch_bytes,
    .prepare = prepare,
    .normalize = normalize,
    .begin_keys = begin_keys,
    .differentiate = differentiate,
    .add = add_grad_q,
    .store_keys = store_keys,
};
#endif

const TileKernels TABLE = {
    .block_q = BLOCK_Q,
    .mr = MR,
    .block_k = BLOCK_K,
    .scratch_bytes = scratch_bytes,
    .begin = begin,
    .attend = attend,
    .finish = finish,
    .weights = weights,
    .accumulate_bins = accumulate_bins,
    .collect_top_k = collect_top_k,
    .rank_top_k = rank_top_k,
    .combine_splits = combine_splits,
    .real_bytes = sizeof(real),
#ifdef HAS_BACKWARD
    .backward = &BACKWARD_KERNELS,
#endif
    .peak = peak,
};
