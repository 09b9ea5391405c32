/* Each query's strongest keys, collected while their scores pass by. */
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

/* Keys come in their order: one that equals the weakest loses to it. */
static void collect(const Tile *t, int p, const Strip *strip) {
    vec top[TILE_VECS];
    take_max(t->panel[p].vecs, strip, top);
    for (int i = 0; i < PANEL && p * PANEL + i < t->n_queries; i++) {
        Candidate *heap = t->best + (p * PANEL + i) * t->n_best;
        if (!(top[i / LANES][i % LANES] > heap->score)) continue;
        for (int j = 0; j < strip->keys; j++) {
            double score = strip->scores[j * PANEL + i];
            if (!(score > heap->score)) continue;
            *heap = (Candidate){score, strip->key + j};
            sink(heap, t->n_best);
        }
    }
}

/* A row that is not a number has no order. */
static void write_ranks(const Tile *t, const Scratch *s, ptrdiff_t i) {
    const Candidate *best = t->best + i * t->n_best;
    real top = s->row_max[i], sum = s->row_sum[i];
    bool wrong = top != INFINITY && (sum != sum || (sum == 0 && s->saw[i]));
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
