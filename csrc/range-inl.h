/* Results that overflow though the inputs are finite.
 *
 * `finish` finds them, and a rerun of the tile with a margin computes them again, and stores
 * nothing else. If NaN or Inf among the inputs explains a result, it stays. */
#ifndef FASTATTN_RANGE_INL_H
#define FASTATTN_RANGE_INL_H

#include "score_options-inl.h"

/* Does this run deliver the lse and weights of a query? */
static bool delivers(const Tile *t, ptrdiff_t i) {
    return (t->micropanel[i / MR].rerun_scores >> i % MR & 1) == (t->margin > 0);
}

/* The same for the lanes of a vector. */
static ivec delivered(const Tile *t, int p, int n) {
    ivec own;
    if (!t->micropanel[p].rerun_scores) return splat_int(t->margin > 0 ? 0 : -1);
    for (int i = 0; i < LANES; i++)
        own[i] =
            -(lane_int)((t->micropanel[p].rerun_scores >> (n * LANES + i) & 1) == (t->margin > 0));
    return own;
}

/* May scores overflow without leaving an infinite maximum or a NaN in the sum? */
static bool may_overflow(const Tile *t) {
    bool some = t->margin > 0 || t->softcap > HUGE_CAP;
    for (ptrdiff_t i = 0; i < t->n_queries && t->has_alibi; i++)
        some |= fabs(t->slope[i]) > REAL_MAX * 0x1p-62; /* no key is further than that */
    return some;
}

static double clamp_finite(double x, bool finite) {
    return finite ? fmin(fmax(x, -REAL_MAX), REAL_MAX) : x;
}

/* The score of a query and a key before the scale, with both multiplied by 2**-down. */
static double exact_similarity(const Tile *t, ptrdiff_t i, ptrdiff_t key, int down, bool *finite) {
    const double unit = ldexp(1, -down);
    const float *scales = key_scales(t, key);
    const char *row = key_at(t, key);
    double sum = 0;
    *finite = true;
    for (ptrdiff_t d = 0; d < t->head_dim; d++) {
        double q = read_number(t->q[i] + d * t->q_dim, t->q_format);
        double k = read_dim(row, t->k_dim, d, t->k_format);
        k *= (double)scale_of_dim(scales, t->k_format, d);
        *finite &= isfinite(q) && isfinite(k);
        if (t->score_function == ADDITIVE) {
            sum += t->dim_weights[d] * unit * tanh(q + k);
        } else if (t->score_function == DISTANCE || t->score_function == SQUARED_DISTANCE) {
            double away = q * unit - k * unit;
            sum += away * away;
        } else sum += (q * unit) * (k * unit);
    }
    return t->score_function == DISTANCE ? sqrt(sum) : sum;
}

/* The score by its definition: after each step a number is clamped to the range of `real`, unless
 * NaN or Inf is among its inputs. */
static real exact_score(const Tile *t, ptrdiff_t i, ptrdiff_t key) {
    const int far = 540; /* only float64 reaches that on the way */
    bool finite;
    int up = 0, power = 0;
    double x = exact_similarity(t, i, key, 0, &finite);
    if (finite && !isfinite(x)) {
        x = exact_similarity(t, i, key, far, &finite);
        up = t->score_function == DOT || t->score_function == SQUARED_DISTANCE ? 2 * far : far;
    }
    double scale = t->has_scales ? t->scales[i] : t->scale;
    x = frexp(x, &power) * scale;
    double s = clamp_finite(ldexp(x, power + up), finite && isfinite(scale));
    if (t->softcap > 0) s = t->softcap * tanh(s / t->softcap);
    if (t->has_bias) {
        real bias = as_real(read_number(t->bias[i] + key * t->bias_key, t->bias_format));
        s = clamp_finite(s + bias, isfinite(s) && isfinite(bias));
    }
    if (t->relative_bias) {
        real bias = *relative_bias_at(t, i, key);
        s = clamp_finite(s + bias, isfinite(s) && isfinite(bias));
    }
    if (t->has_alibi) {
        double away = fabs((double)(t->position[i] - key));
        s = clamp_finite(fma(-t->slope[i], away, s), isfinite(s) && isfinite(t->slope[i]));
    }
    return (real)s;
}

/* Recompute the scores that may have overflowed; `top` becomes their maximum. */
static void clamp_scores(const Tile *t, int p, const SubBlock *sub, vec *top) {
    const vec most = splat(REAL_MAX / 8);
    int vecs = t->micropanel[p].vecs;
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            ivec out = ~(magnitude(load(s)) <= most) & visible_lanes(sub, n, j);
            if (!any_lane(out)) continue;
            for (int l = 0; l < LANES; l++) {
                ptrdiff_t i = p * MR + n * LANES + l;
                /* Lanes without a query repeat the last one and need not be right. */
                if (out[l] < 0 && i < t->n_queries) s[l] = exact_score(t, i, sub->key + j);
            }
        }
    for (int n = 0; n < vecs; n++) top[n] = splat(-INFINITY);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++)
            top[n] = larger(load(sub->scores + j * MR + n * LANES), top[n]);
}

/* Inf hides a NaN in the maximum, and makes Inf - Inf in the sum. Record where both are among the
 * scores of some sub-blocks, or where Inf is new (`fresh`) and the sums so far are NaN. */
static void record_nan(const Scratch *s, int p, int n, const SubBlock *sub_blocks, int count,
                       ivec fresh, vec sum) {
    ptrdiff_t lane = p * MR + n * LANES;
    ivec infinite = load(s->row_max + lane) == splat(INFINITY);
    if (!any_lane(infinite)) return;
    sum += load(s->row_sum + lane);
    ivec nan = fresh & (sum != sum);
    for (int i = 0; i < count; i++)
        for (int j = 0; j < sub_blocks[i].keys && sub_blocks[i].visibility != EMPTY; j++) {
            vec x = load(sub_blocks[i].scores + j * MR + n * LANES);
            nan |= x != x;
        }
    store(s->nan_beside_inf + lane,
          choose(nan & infinite, splat(NAN), load(s->nan_beside_inf + lane)));
}

static bool is_visible(const Tile *t, ptrdiff_t i, ptrdiff_t key) {
    return t->start[i] <= key && key < t->stop[i] &&
           (!t->has_mask || t->mask[i][key * t->mask_key]) &&
           (!t->has_bias ||
            read_number(t->bias[i] + key * t->bias_key, t->bias_format) != -INFINITY) &&
           (!t->hiding_relative_bias || *relative_bias_at(t, i, key) != -INFINITY);
}

/* Is any number of a row NaN or Inf? */
INLINE bool any_nonfinite(const char *at, ptrdiff_t dim, ptrdiff_t dims, NumberFormat format) {
    vec sum = splat(0);
    if (dim == format.bytes) {
        for (ptrdiff_t d = 0; d < dims; d += LANES)
            sum += load_some(at + dim_offset(format, d), dims - d, format) * 0;
        return any_lane(sum != splat(0));
    }
    for (ptrdiff_t d = 0; d < dims; d++)
        if (!isfinite(read_dim(at, dim, d, format))) return true;
    return false;
}

/* Clear the bits of queries with a NaN in a visible key. */
INLINE void discount_nonfinite_keys(const Tile *t, int p, uint64_t *rerun_scores,
                                    NumberFormat format) {
    for (ptrdiff_t key = t->micropanel[p].first; key < t->micropanel[p].last && *rerun_scores;
         key++) {
        const char *k = key_at(t, key);
        if (!any_nonfinite(k, t->k_dim, t->head_dim, format)) continue;
        bool nan = false;
        for (ptrdiff_t d = 0; d < t->head_dim; d++)
            nan |= isnan(read_dim(k, t->k_dim, d, format));
        for (uint64_t bits = nan ? *rerun_scores : 0; bits; bits &= bits - 1)
            if (is_visible(t, p * MR + __builtin_ctzll(bits), key))
                *rerun_scores &= ~(bits & -bits);
    }
}

/* Is the query, its sink or a bias of a visible key NaN or Inf? A softcap makes finite scores of an
 * infinite query. */
static bool has_nonfinite_input(const Tile *t, ptrdiff_t i) {
    for (ptrdiff_t d = 0; d < t->head_dim; d++) {
        double q = read_number(t->q[i] + d * t->q_dim, t->q_format);
        if (t->softcap > 0 ? isnan(q) : !isfinite(q)) return true;
    }
    if (t->has_sinks && isnan(t->sink[i])) return true;
    for (ptrdiff_t key = t->start[i]; key < t->stop[i] && t->has_bias; key++) {
        double bias = read_number(t->bias[i] + key * t->bias_key, t->bias_format);
        if (!isfinite(bias) && is_visible(t, i, key)) return true;
    }
    bool any_bias = t->relative_bias && !t->plain_relative_bias;
    for (ptrdiff_t key = t->start[i]; key < t->stop[i] && any_bias; key++)
        if (!isfinite(*relative_bias_at(t, i, key)) && is_visible(t, i, key)) return true;
    return false;
}

/* The bits of a micropanel's queries whose scores have overflowed. */
static uint64_t queries_to_rerun(const Tile *t, const Scratch *s, int p) {
    uint64_t rerun_scores = 0;
    for (int l = 0; l < MR && p * MR + l < t->n_queries; l++) {
        ptrdiff_t i = p * MR + l;
        bool sunk = t->has_sinks && t->sink[i] == INFINITY;
        bool fine = isfinite(s->row_sum[i]) && (isfinite(s->row_max[i]) || sunk);
        if (t->want_max) fine &= s->max_score[i] != -INFINITY; /* which a sink hides in row_max */
        if (s->any_visible[i] && !fine && !has_nonfinite_input(t, i))
            rerun_scores |= (uint64_t)1 << l;
    }
    if (rerun_scores) WITH_STORED_FORMAT(t->k_format, discount_nonfinite_keys, t, p, &rerun_scores);
    return rerun_scores;
}

/* Clear the bits of sums that a NaN or Inf among the values explains. */
INLINE void discount_nonfinite_values(const Tile *t, const Scratch *s, int p, uint64_t *overflowed,
                                      NumberFormat format) {
    const real *out = s->out + p * MR * s->out_rows;
    for (ptrdiff_t key = t->micropanel[p].first; key < t->micropanel[p].last; key++) {
        const char *v = value_at(t, key);
        if (!any_nonfinite(v, t->v_dim, t->value_dim, format)) continue;
        for (ptrdiff_t d = 0; d < t->value_dim; d++) {
            double x = read_dim(v, t->v_dim, d, format);
            for (uint64_t bits = isfinite(x) ? 0 : overflowed[d]; bits; bits &= bits - 1) {
                int i = __builtin_ctzll(bits);
                bool same = isnan(x) || out[d * MR + i] == x;
                if (same && is_visible(t, p * MR + i, key)) overflowed[d] &= ~(bits & -bits);
            }
        }
    }
}

/* Are all sums of a vector of queries finite? */
static bool all_sums_finite(ptrdiff_t sums, const real *out) {
    /* x * 0 is NaN unless x is finite. Four sums, to hide latency. */
    vec zero_or_nan[4] = {{0}};
    ptrdiff_t d = 0;
    for (; d + 4 <= sums; d += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) zero_or_nan[i] += load(out + (d + i) * MR) * 0;
    for (; d < sums; d++) zero_or_nan[0] += load(out + d * MR) * 0;
    vec any = (zero_or_nan[0] + zero_or_nan[1]) + (zero_or_nan[2] + zero_or_nan[3]);
    return !any_lane(any != splat(0));
}

/* Record which results of a micropanel have overflowed. Returns whether any has. */
static bool find_micropanel_overflow(Tile *t, const Scratch *s, int p) {
    uint64_t *overflowed = s->overflowed + p * t->value_dim, good = 0;
    const real *out = s->out + p * MR * s->out_rows;
    bool fine = true;
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t at = p * MR + n * LANES;
        ivec any_visible = *(const ivec *)(s->any_visible + at);
        vec most = load(s->row_max + at) * 0;
        if (t->want_max) most += load(s->max_score + at) * 0;
        vec zero_or_nan = load(s->row_sum + at) * 0 + choose(any_visible, most, splat(0));
        fine &= !any_lane(zero_or_nan != splat(0)) && all_sums_finite(s->sums, out + n * LANES);
    }
    if (fine) return false;
    t->micropanel[p].rerun = t->micropanel[p].rerun_scores = queries_to_rerun(t, s, p);
    for (int l = 0; l < MR && p * MR + l < t->n_queries; l++) {
        ptrdiff_t i = p * MR + l;
        good |= (uint64_t)(s->any_visible[i] && isfinite(s->row_sum[i])) << l;
    }
    uint64_t any = 0;
    for (ptrdiff_t d = 0; d < t->value_dim; d++) {
        overflowed[d] = 0;
        for (int l = 0; l < MR; l++) overflowed[d] |= (uint64_t)!isfinite(out[d * MR + l]) << l;
        any |= overflowed[d] &= good;
    }
    if (any) WITH_STORED_FORMAT(t->v_format, discount_nonfinite_values, t, s, p, overflowed);
    for (ptrdiff_t d = 0; d < t->value_dim; d++)
        t->micropanel[p].rerun |= overflowed[d] |= t->micropanel[p].rerun_scores;
    for (ptrdiff_t d = t->value_dim; d < s->sums; d++) /* of tangents: see store_tangents */
        for (int l = 0; l < MR; l++)
            t->micropanel[p].rerun |= good & (uint64_t)!isfinite(out[d * MR + l]) << l;
    return t->micropanel[p].rerun != 0;
}

/* Record which results have overflowed though no input explains it. Returns whether any has. */
static bool find_overflow(Tile *t, const Scratch *s) {
    bool some = false;
    for (int p = 0; p < t->micropanels; p++) {
        t->micropanel[p].rerun = t->micropanel[p].rerun_scores = 0;
        if (t->micropanel[p].has_output) some |= find_micropanel_overflow(t, s, p);
    }
    return some;
}
#endif
