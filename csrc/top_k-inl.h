/* The top k keys of each query.
 *
 * While attend makes the scores, the maxima of sub-blocks give a threshold that the top k reach. A
 * second pass over the scores collects the keys that do. */
#ifndef FASTATTN_TOP_K_INL_H
#define FASTATTN_TOP_K_INL_H

#include "range-inl.h"
#include "score_options-inl.h"

static void clear_heaps(const Tile *t) {
    for (ptrdiff_t i = 0; i < t->n_queries * t->top_k; i++)
        t->heaps[i] = (Candidate){-INFINITY, -1};
}

static bool less(Candidate a, Candidate b) {
    return a.score < b.score || (a.score == b.score && a.key > b.key);
}

/* Restore a heap, with the least candidate at its root, whose root has been replaced. */
static void sift_down(Candidate *heap, ptrdiff_t n) {
    Candidate moving = heap[0];
    ptrdiff_t at = 0;
    for (ptrdiff_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && less(heap[child + 1], heap[child])) child++;
        if (!less(heap[child], moving)) break;
        heap[at] = heap[child];
    }
    heap[at] = moving;
}

/* Candidates come in the order of their keys, so one that equals the least comes after it. */
static void heap_push(Candidate *heap, ptrdiff_t n, double score, ptrdiff_t key) {
    if (!(score > heap->score)) return;
    *heap = (Candidate){score, key};
    sift_down(heap, n);
}

/* In attend: collect the sub-blocks with the largest maxima, as the top k of sub-blocks. */
static void collect_sub_block_max(const Tile *t, int p, const SubBlock *sub) {
    vec top[MR_VECS];
    take_max(t->micropanel[p].vecs, sub, top);
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++)
        heap_push(t->heaps + (p * MR + i) * t->top_k, t->top_k, top[i / LANES][i % LANES],
                  sub->key);
}

/* At least top_k keys reach the least of the collected maxima. */
static void set_top_k_thresholds(Tile *t) {
    for (ptrdiff_t i = 0; i < t->n_queries && t->top_k > 0; i++)
        t->top_k_threshold[i] = t->heaps[i * t->top_k].score;
    clear_heaps(t);
}

/* In the second pass: collect keys. Without the threshold, a row whose scores rise from key to key
 * would push each of them. */
static void collect_top_k_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    vec top[MR_VECS];
    take_max(t->micropanel[p].vecs, sub, top);
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++) {
        Candidate *heap = t->heaps + (p * MR + i) * t->top_k;
        double threshold = t->top_k_threshold[p * MR + i], most = top[i / LANES][i % LANES];
        if (!(most >= threshold && most > heap->score)) continue;
        for (int j = 0; j < sub->keys; j++) {
            double score = sub->scores[j * MR + i];
            if (score >= threshold) heap_push(heap, t->top_k, score, sub->key + j);
        }
    }
    (void)s;
}

/* A row whose sum is NaN has no order. */
static void write_ranks(const Tile *t, const Scratch *s, ptrdiff_t i) {
    const Candidate *heap = t->heaps + i * t->top_k;
    real top = s->row_max[i], sum = s->row_sum[i];
    bool is_nan = top != INFINITY && (sum != sum || (sum == 0 && s->any_visible[i]));
    Softmax row = softmax_of(splat(top), splat(sum));
    for (ptrdiff_t first = 0; first < t->top_k; first += LANES) {
        int n = fewer(t->top_k - first, LANES);
        real scores[LANES] = {0};
        for (int l = 0; l < n; l++) scores[l] = (real)heap[first + l].score;
        vec weight =
            weight_from(load_unaligned(scores), row.top, splat((real)t->exponent)) * row.inv_sum;
        for (int l = 0; l < n; l++) {
            ptrdiff_t key = heap[first + l].key;
            t->keys[i][first + l] = is_nan ? -1 : key;
            write_number(t->weights[i] + (first + l) * t->weights_key, t->out_format,
                         is_nan    ? (real)NAN
                         : key < 0 ? 0
                                   : weight[l]);
        }
    }
}

static void rank_top_k(Tile *t) {
    Scratch s = scratch_of(t);
    for (ptrdiff_t i = 0; i < t->n_queries; i++) {
        if (!delivers(t, i)) continue;
        Candidate *heap = t->heaps + i * t->top_k;
        for (ptrdiff_t n = t->top_k - 1; n > 0; n--) {
            Candidate weakest = heap[0];
            heap[0] = heap[n];
            heap[n] = weakest;
            sift_down(heap, n);
        }
        write_ranks(t, &s, i);
    }
}
#endif
