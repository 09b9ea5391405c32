/* Which pairs of a query and a key a sparse mask and the other options show, their scores, and what
 * dropout keeps. */
#ifndef FASTATTN_SPARSE_SCORES_INL_H
#define FASTATTN_SPARSE_SCORES_INL_H

#include "dropout-inl.h"
#include "range-inl.h"
#include "sparse_gather-inl.h"

/* A query and the keys that are listed for it, or a key and the queries that list it. */
typedef struct {
    bool by_key;
    ptrdiff_t fixed; /* the query, or the key */
    const SparseLists *lists;
    ptrdiff_t at, end; /* the places in the lists that are left */
    Gather rows;       /* of what is listed */
} Pairs;

static ptrdiff_t query_of(const Pairs *x, ptrdiff_t item) { return x->by_key ? item : x->fixed; }
static ptrdiff_t key_of(const Pairs *x, ptrdiff_t item) { return x->by_key ? x->fixed : item; }

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
    if (begin == end || item_of(lists, begin) >= least) return begin;
    if (item_of(lists, end - 1) < least) return end;
    while (begin < end) {
        ptrdiff_t middle = begin + (end - begin) / 2;
        if (item_of(lists, middle) < least) begin = middle + 1;
        else end = middle;
    }
    return begin;
}

/* A query, and the keys of its list that are in its interval. */
NOINLINE Pairs pairs_of_query(const Tile *t, const SparseHead *h, const SparseLists *keys,
                              ptrdiff_t i) {
    Pairs x = {false, i, keys, keys->starts[i], keys->starts[i + 1], keys_of(t, h)};
    x.end = lower_bound(keys, x.at, x.end, end_of_keys(h, i));
    x.at = lower_bound(keys, x.at, x.end, first_key(h, i));
    return x;
}
static Pairs pairs_of_key(const Tile *t, const SparseHead *h, const SparseLists *queries,
                          ptrdiff_t key) {
    return (Pairs){true, key, queries, queries->starts[key], queries->starts[key + 1],
                   queries_of(t, h)};
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

/* How many places key j is before query i, but no farther than the relative bias reaches. */
INLINE ptrdiff_t places_before(const Tile *t, const SparseHead *h, ptrdiff_t i, ptrdiff_t j) {
    ptrdiff_t before = i + h->offset - j;
    return before < -t->reach ? -t->reach : before > t->reach ? t->reach : before;
}
INLINE bool read_relative_bias(const Tile *t, const SparseHead *h, const SparseScratch *s,
                               ptrdiff_t i, ptrdiff_t j, int n) {
    ptrdiff_t row = places_before(t, h, i, j) + t->reach + MAX_LANES;
    s->relative_bias[n] = ((const real *)h->relative_bias)[row * t->group];
    return s->relative_bias[n] != -INFINITY;
}

/* The next pairs that are seen, at most LIST of them. */
NOINLINE int next_pairs(const Tile *t, const SparseHead *h, const SparseScratch *s, Pairs *x) {
    int n = 0;
    if (!x->by_key && !t->has_bias && !h->relative_bias && !t->has_alibi) { /* all are */
        n = fewer(x->end - x->at, LIST);
        for (int j = 0; j < n; j++) s->index[j] = item_of(x->lists, x->at + j);
        x->at += n;
        return n;
    }
    for (; x->at < x->end && n < LIST; ++x->at) {
        ptrdiff_t item = item_of(x->lists, x->at), i = query_of(x, item), j = key_of(x, item);
        if (x->by_key && (j < first_key(h, i) || j >= end_of_keys(h, i))) continue;
        if (t->has_bias && !read_bias(t, h, s, i, j, n)) continue;
        if (h->relative_bias && !read_relative_bias(t, h, s, i, j, n)) continue;
        if (t->has_alibi) s->distance[n] = (real)fabs((double)(i + h->offset - j));
        s->index[n++] = item;
    }
    /* Whatever else were in the last vector might be taken for an overflow. */
    for (int j = n; j < round_up(n, LANES); j++)
        s->bias[j] = s->relative_bias[j] = s->distance[j] = 0;
    return n;
}

/* Fetch the rows of `x` that n pairs need. */
static void prefetch_listed(const Gather *x, const SparseScratch *s, int n) {
    for (int j = 0; j < n; j++) prefetch_number_row(x, s->index[j]);
}
/* Fetch the rows of `x` that are listed next: lists follow one another. */
static void prefetch_next(const Gather *x, const Pairs *pairs) {
    int64_t end = pairs->at + PREFETCHED_PAIRS;
    if (end > pairs->lists->count) end = pairs->lists->count;
    for (ptrdiff_t at = pairs->at; at < end; at++)
        prefetch_number_row(x, item_of(pairs->lists, at));
}

/* ---- Scores ---- */

/* The score of a pair as the definition has it. */
NOINLINE real exact_pair(Tile *t, const SparseHead *h, ptrdiff_t i, ptrdiff_t j) {
    t->q[0] = h->q + i * h->q_row;
    t->k = h->k;
    t->k_scales = (const float *)h->k_scales;
    t->scale = h->scale;
    if (h->bias) t->bias[0] = h->bias + i * h->bias_row;
    t->relative_bias = h->relative_bias; /* which begins with the column of the head */
    t->column[0] = 0;
    t->slope[0] = h->slope;
    t->position[0] = i + h->offset;
    return exact_score(t, 0, j);
}

/* |own - row| where its square is too small to have all its digits. */
NOINLINE real near_distance(const SparseScratch *s, const Gather *x, ptrdiff_t row) {
    double most = 0, sum = 0;
    for (int pass = 0; pass < 2; pass++)
        for (ptrdiff_t d = 0; d < x->dims; d++) {
            double away = fabs(s->own[d] - number_at(x, row, d));
            if (pass == 0) most = fmax(most, away);
            else if (most > 0) sum += away / most * (away / most);
        }
    return (real)(most * sqrt(sum));
}

/* From squares of n distances to distances. */
static void take_roots_of_list(const SparseScratch *s, const Gather *x, int n) {
    ivec near = splat_int(0);
    for (int j = 0; j < n; j += LANES) near |= load(s->scores + j) < splat(NEAR);
    bool any_near = any_lane(near);
    for (int j = 0; j < n; j += LANES) {
        vec square = load(s->scores + j);
        store(s->scores + j, root_of(square));
        for (int l = j; l < n && l < j + LANES && any_near; l++)
            if (square[l - j] < NEAR) s->scores[l] = near_distance(s, x, s->index[l]);
    }
}

/* The scores of n pairs: scale, softcap, biases and alibi; then -inf up to whole vectors. */
NOINLINE void score_pairs(Tile *t, const SparseHead *h, const SparseScratch *s, const Pairs *x,
                          int n) {
    const vec most = splat(REAL_MAX / 8), scale = splat((real)h->scale);
    const vec cap = splat((real)t->softcap), inverse = splat((real)(1 / t->softcap));
    const vec slope = splat((real)h->slope);
    ivec odd = splat_int(0);
    compare(t->score_function, s, s->own, &x->rows, n, s->scores);
    if (t->score_function == DISTANCE) take_roots_of_list(s, &x->rows, n);
    for (int j = 0; j < n; j += LANES) {
        vec score = load(s->scores + j);
        store(s->unscaled + j, score);
        score *= scale;
        odd |= ~(magnitude(score) <= most);
        if (t->softcap > 0) {
            score = cap * tanh_vec(score * inverse);
            store(s->capped + j, score);
        }
        if (t->has_bias) score += load(s->bias + j);
        if (h->relative_bias) score += load(s->relative_bias + j);
        if (t->has_alibi) score -= slope * load(s->distance + j);
        odd |= ~(magnitude(score) <= most);
        store(s->scores + j, score);
    }
    for (int j = 0; j < n && (any_lane(odd) || t->softcap > HUGE_CAP); j++)
        s->scores[j] = exact_pair(t, h, query_of(x, s->index[j]), key_of(x, s->index[j]));
    for (int j = n; j < round_up(n, LANES); j++) s->scores[j] = -INFINITY;
}

/* ---- Dropout ---- */

/* Which weights of n pairs are kept. */
NOINLINE void draw_pairs(const Tile *t, const SparseHead *h, const SparseScratch *s,
                         const Pairs *x, int n) {
    const int lanes = (int)(sizeof(wide) / sizeof(uint64_t));
    const wide low = (wide){0} + 0xffffffffu, fixed = (wide){0} + (uint64_t)x->fixed;
    for (int j = 0; j < n; j += lanes) {
        wide item, own, exchanged, kept;
        memcpy(&item, s->index + j, sizeof item);
        wide query = (x->by_key ? item : fixed) + h->drop_first_query;
        wide key = (x->by_key ? fixed : item) + t->drop_first_key;
        wide counter = key / KEYS_PER_COUNTER, place = key % KEYS_PER_COUNTER;
        wide c[4] = {counter & low, counter >> 32, query & low, query >> 32};
        philox_lanes(c, (wide){0} + h->drop_key[0], (wide){0} + h->drop_key[1]);
        own = c[0];
        for (uint64_t w = 1; w < 4; w++) {
            wide here = (wide)(place / 2 == w);
            own = (own & ~here) | (c[w] & here);
        }
        own &= low;
        exchanged = (own << 16 | own >> 16) & low;
        wide odd = (wide)((place & 1) == 1);
        own = (exchanged & odd) | (own & ~odd);
        kept = (wide)(own >= t->drop_threshold);
        for (int l = 0; l < lanes; l++) s->kept[j + l] = (lane_int)kept[l];
    }
}

/* 0 where the weight of a pair is dropped. */
static void drop_pairs(const SparseScratch *s, int n, real *x) {
    for (int j = 0; j < n; j += LANES)
        store(x + j, (vec)((ivec)load(x + j) & *(const ivec *)(s->kept + j)));
}
#endif
