/* From the products of queries and keys to scores and weights: scale, softcap, bias, ALiBi, mask.
 *
 * The order of the options is that of reference.py, which defines them. */
#ifndef FASTATTN_SCORE_OPTIONS_INL_H
#define FASTATTN_SCORE_OPTIONS_INL_H

#include "masking-inl.h"
#include "math-inl.h"
#include "scratch-inl.h"

#ifdef REAL_IS_DOUBLE
#define HUGE_CAP 0x1p990
#define EPSILON_ROOT 0x1p-28
#else
#define HUGE_CAP 0x1p100
#define EPSILON_ROOT 0x1p-13f
#endif

/* A sum of finite numbers that overflows becomes the largest number. */
INLINE vec add_in_range(vec score, vec bias) {
    const vec most = splat(REAL_MAX);
    vec sum = score + bias;
    ivec finite = (magnitude(score) <= most) & (magnitude(bias) <= most);
    vec bound = choose(magnitude(sum) > most, with_sign_of(most, sum), sum);
    return choose(finite, bound, sum);
}

/* Add the biases of a sub-block, and take the maximum. */
INLINE void add_bias_as(const bool in_range, int vecs, const SubBlock *sub, const real *bias,
                        vec *top) {
    for (int n = 0; n < vecs; n++) {
        vec most = splat(-INFINITY);
        for (int j = 0; j < sub->keys; j++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec b = load(bias + j * MR + n * LANES);
            vec sum = in_range ? load(s) + b : add_in_range(load(s), b);
            store(s, sum);
            most = larger(sum, most);
        }
        top[n] = most;
    }
}
static void add_bias(int vecs, const SubBlock *sub, const real *bias, vec *top) {
    if (sub->bias_in_range) add_bias_as(true, vecs, sub, bias, top);
    else add_bias_as(false, vecs, sub, bias, top);
}

/* Add the relative biases of a sub-block, and take the maximum. */
static void add_plain_relative_bias(const Tile *t, int p, const SubBlock *sub, vec *top) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        vec most = splat(-INFINITY);
        for (int j = 0; j < sub->keys; j++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec bias = load_unaligned(relative_bias_at(t, p * MR + n * LANES, sub->key + j));
            vec sum = load(s) + bias;
            store(s, sum);
            most = larger(sum, most);
        }
        top[n] = most;
    }
}

/* The same for any biases. One of -inf masks its key. Returns the new visibility. */
static Visibility add_any_relative_bias(const Tile *t, int p, const SubBlock *sub) {
    int vecs = t->micropanel[p].vecs;
    if (sub->visibility == FULL)
        for (int i = 0; i < vecs * LANES; i++)
            set_mask_words(sub->mask_words, i, first_bits(sub->keys));
    ivec any_hidden = splat_int(0);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            ivec *word = (ivec *)(sub->mask_words + j / LANE_BITS * MR + n * LANES);
            vec bias = load_unaligned(relative_bias_at(t, p * MR + n * LANES, sub->key + j));
            ivec hidden = bias == splat(-INFINITY);
            *word &= ~(hidden & splat_int((lane_int)((lane_uint)1 << j % LANE_BITS)));
            any_hidden |= hidden;
            store(s, add_in_range(load(s), bias));
        }
    return any_lane(any_hidden) ? PARTIAL : sub->visibility;
}

static void multiply_scores(real factor, int vecs, const SubBlock *sub) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            store(s, load(s) * factor);
        }
}

/* s = size * tanh(s * inverse). With a huge size, whose quotients may be subnormal, s stays as it
 * is where tanh would change it by less than rounding does. Where s has overflowed, tanh would hide
 * that: if `marked` the result is NaN, which find_overflow finds. */
INLINE void cap(const bool huge, const bool marked, real size, real inverse, int vecs,
                const SubBlock *sub, vec *top) {
    const vec same = splat(size * EPSILON_ROOT);
    for (int n = 0; n < vecs; n++) top[n] = splat(-INFINITY);
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec x = size * tanh_vec(load(s) * inverse);
            if (marked) x += load(s) * 0;
            if (huge) x = choose(magnitude(load(s)) < same, load(s), x);
            store(s, x);
            top[n] = larger(x, top[n]);
        }
}

/* The distances of LANES queries from a key; each later key is one less. Counting keys from 0 in
 * float32 would be wrong from 2**24 on. */
static vec alibi_distances(const Tile *t, ptrdiff_t first, ptrdiff_t key) {
    real x[LANES] = {0};
    for (int i = 0; i < LANES && first + i < t->n_queries; i++)
        x[i] = (real)(t->position[first + i] - key);
    return load_unaligned(x);
}

static void subtract_alibi(const Tile *t, int p, const SubBlock *sub, vec *top) {
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        ptrdiff_t first = p * MR + n * LANES;
        real slopes[LANES] = {0};
        for (int i = 0; i < LANES && first + i < t->n_queries; i++)
            slopes[i] = (real)t->slope[first + i];
        vec slope = load_unaligned(slopes), distance = alibi_distances(t, first, sub->key);
        vec most = splat(-INFINITY), step = splat(0);
        for (int j = 0; j < sub->keys; j++) {
            real *s = sub->scores + j * MR + n * LANES;
            vec x = load(s) - slope * magnitude(distance - step);
            store(s, x);
            most = larger(x, most);
            step += 1;
        }
        top[n] = most;
    }
}

static void take_max(int vecs, const SubBlock *sub, vec *top) {
    for (int n = 0; n < vecs && top; n++) {
        const real *s = sub->scores + n * LANES;
        vec even = splat(-INFINITY), odd = even; /* two chains, to hide latency */
        int j = 0;
        for (; j + 2 <= sub->keys; j += 2) {
            even = larger(load(s + j * MR), even);
            odd = larger(load(s + (j + 1) * MR), odd);
        }
        if (j < sub->keys) even = larger(load(s + j * MR), even);
        top[n] = larger(even, odd);
    }
}

/* The scales of LANES queries. */
INLINE vec load_scales(const Tile *t, ptrdiff_t first) {
    real x[LANES] = {0};
    for (int i = 0; i < LANES && first + i < t->n_queries; i++) x[i] = (real)t->scales[first + i];
    return load_unaligned(x);
}

/* Multiply what belongs to the scores of a sub-block by the scales of its queries, and take the
 * maximum. Returns whether all are finite. */
static bool multiply_by_scales(const Tile *t, int p, const SubBlock *sub, real *scores, vec *top) {
    vec not_finite = splat(0);
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        vec scale = load_scales(t, p * MR + n * LANES), most = splat(-INFINITY);
        for (int j = 0; j < sub->keys; j++) {
            real *s = scores + j * MR + n * LANES;
            vec x = load(s) * scale;
            store(s, x);
            most = larger(x, most);
            not_finite += x * 0;
        }
        top[n] = most;
    }
    return !any_lane(not_finite != splat(0));
}

/* All steps after the product and its scale: softcap, bias, ALiBi, mask. `top` is the maximum of
 * the scores, before and after. */
static void finish_scores(const Tile *t, const Scratch *s, int p, SubBlock *sub, vec *top) {
    int vecs = t->micropanel[p].vecs;
    if (t->softcap > 0) {
        double size = t->softcap * (t->exponent == 1 ? LOG2_E : 1);
        real inverse = (real)(t->score_scale / t->softcap);
        if (t->softcap > HUGE_CAP) {
            multiply_scores((real)t->score_scale, vecs, sub);
            cap(true, false, (real)size, (real)(1 / t->softcap), vecs, sub, top);
        } else if (t->differentiating) cap(false, false, (real)size, inverse, vecs, sub, top);
        else cap(false, true, (real)size, inverse, vecs, sub, top);
    } else if (t->score_scale != 1) {
        multiply_scores((real)t->score_scale, vecs, sub);
        take_max(vecs, sub, top);
    }
    if (t->has_bias) add_bias(vecs, sub, s->bias, top);
    if (t->relative_bias) {
        if (t->plain_relative_bias) {
            add_plain_relative_bias(t, p, sub, top);
        } else {
            sub->visibility = add_any_relative_bias(t, p, sub);
            take_max(vecs, sub, top);
        }
    }
    if (t->has_alibi) subtract_alibi(t, p, sub, top);
    if (sub->visibility == PARTIAL) apply_mask(vecs, sub, top);
}

/* The weights of scores relative to `top`. Subtracting before scaling takes one instruction more
 * than a multiply-add, but the largest weight is exact and no finite score overflows. */
INLINE vec weight_from(vec score, vec top, vec exponent) {
    return weight_of((score - top) * exponent);
}

/* What turns scores into normalized weights: the maximum of the row, and 1 / its sum. */
typedef struct {
    vec top, inv_sum;
} Softmax;

INLINE Softmax softmax_of(vec row_max, vec row_sum) {
    return (Softmax){
        choose(row_max == splat(-INFINITY), splat(0), row_max),
        /* Beside an infinite score other weights are 0, though the sum is NaN. */
        choose(row_max == splat(INFINITY), splat(1), splat(1) / row_sum),
    };
}
#endif
