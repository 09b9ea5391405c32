/* Each query's strongest keys. Where they may be shows while the scores pass by in attend; they are
 * collected when the scores are made once more, as for weights().
 */
#ifndef FASTATTN_STRONGEST_H
#define FASTATTN_STRONGEST_H

#include "scores.h"

static void clear_best(const Tile *t) {
    for (ptrdiff_t i = 0; i < t->n_queries * t->n_best; i++) t->best[i] = (Candidate){-INFINITY, -1};
}

static bool weaker(Candidate a, Candidate b) {
    return a.score < b.score || (a.score == b.score && a.key > b.key);
}

/* Let the root of a heap, whose weakest candidate belongs there, sink to its place. */
static void sink(Candidate *heap, ptrdiff_t n) {
    Candidate sinking = heap[0];
    ptrdiff_t at = 0;
    for (ptrdiff_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && weaker(heap[child + 1], heap[child])) child++;
        if (!weaker(heap[child], sinking)) break;
        heap[at] = heap[child];
    }
    heap[at] = sinking;
}

/* Candidates come in the order of their keys: one that equals the weakest loses to it. */
static void offer(Candidate *heap, ptrdiff_t n, double score, ptrdiff_t key) {
    if (!(score > heap->score)) return;
    *heap = (Candidate){score, key};
    sink(heap, n);
}

/* First, the sub-blocks whose largest scores are the largest: no other has one of the strongest keys. */
static void collect_sub_block_max(const Tile *t, int p, const SubBlock *sub) {
    vec top[MR_VECS];
    take_max(t->micropanel[p].vecs, sub, top);
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++)
        offer(t->best + (p * MR + i) * t->n_best, t->n_best, top[i / LANES][i % LANES], sub->key);
}

/* As many keys as sub-blocks have been collected are no weaker than the weakest of these. */
static void settle_least(Tile *t) {
    for (ptrdiff_t i = 0; i < t->n_queries && t->n_best > 0; i++)
        t->least[i] = t->best[i * t->n_best].score;
    clear_best(t);
}

/* Then keys. Without the sub-blocks a row whose scores rise from key to key would collect them all. */
static void collect_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    vec top[MR_VECS];
    take_max(t->micropanel[p].vecs, sub, top);
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++) {
        Candidate *heap = t->best + (p * MR + i) * t->n_best;
        double least = t->least[p * MR + i], most = top[i / LANES][i % LANES];
        if (!(most >= least && most > heap->score)) continue;
        for (int j = 0; j < sub->keys; j++) {
            double score = sub->scores[j * MR + i];
            if (score >= least) offer(heap, t->n_best, score, sub->key + j);
        }
    }
    (void)s;
}

/* A row that is not a number has no order. */
static void write_ranks(const Tile *t, const Scratch *s, ptrdiff_t i) {
    const Candidate *best = t->best + i * t->n_best;
    real top = s->row_max[i], sum = s->row_sum[i];
    bool wrong = top != INFINITY && (sum != sum || (sum == 0 && s->any_visible[i]));
    Softmax row = softmax_of(splat(top), splat(sum));
    for (ptrdiff_t first = 0; first < t->n_best; first += LANES) {
        int n = fewer(t->n_best - first, LANES);
        real scores[LANES] = {0};
        for (int l = 0; l < n; l++) scores[l] = (real)best[first + l].score;
        vec weight = weight_from(load_unaligned(scores), row.top, splat((real)t->exponent)) * row.share;
        for (int l = 0; l < n; l++) {
            ptrdiff_t key = best[first + l].key;
            t->keys[i][first + l] = wrong ? -1 : key;
            write_number(t->weights[i] + (first + l) * t->weights_key, t->out_format,
                         wrong ? (real)NAN : key < 0 ? 0 : weight[l]);
        }
    }
}

static void rank(Tile *t) {
    Scratch s = scratch_of(t);
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        if (!delivers(t, i)) continue;
        Candidate *heap = t->best + i * t->n_best;
        for (ptrdiff_t n = t->n_best - 1; n > 0; n--) {
            Candidate weakest = heap[0];
            heap[0] = heap[n];
            heap[n] = weakest;
            sink(heap, n);
        }
        write_ranks(t, &s, i);
    }
}
#endif
