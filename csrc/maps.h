/* What becomes of weights that are not wanted one by one: their sums over cells of queries x keys, and
 * each query's strongest keys. Both make the scores once more after finish, as weights() does.
 */
#ifndef FASTATTN_MAPS_H
#define FASTATTN_MAPS_H

/* The sums of each column's weights, in place. Returns the number of columns. */
static int sum_columns(const Tile *t, int vecs, const Strip *strip, ptrdiff_t first) {
    if (t->columns == t->n_keys) return strip->keys;
    int columns = 0;
    for (int j = 0, end; j < strip->keys; j = end, columns++) {
        end = fewer((first + columns + 1) * t->n_keys / t->columns - strip->key, strip->keys);
        for (int n = 0; n < vecs; n++) {
            vec sum = load(strip->scores + j * PANEL + n * LANES);
            for (int i = j + 1; i < end; i++) sum += load(strip->scores + i * PANEL + n * LANES);
            store(strip->scores + columns * PANEL + n * LANES, sum);
        }
    }
    return columns;
}

/* Add columns of sums to the cells. Vectors whose lanes go to the same slots are added first, then
 * neighbours in a vector, as rows of the transpose. */
static void add_to_cells(const Tile *t, int p, const Strip *strip, ptrdiff_t first, int columns) {
    int vecs = t->panel[p].vecs;
    for (int n = 0, next; n < vecs; n = next) {
        const int *slot = t->slot + p * PANEL + n * LANES;
        for (next = n + 1; next < vecs; next++)
            if (memcmp(slot, slot + (next - n) * LANES, sizeof *slot * LANES) != 0) break;
        for (int column = 0; column < columns; column += LANES) {
            vec x[LANES];
            for (int i = 0; i < LANES; i++) {
                x[i] = splat(0);
                for (int m = n; m < next && column + i < columns; m++)
                    x[i] += load(strip->scores + (column + i) * PANEL + m * LANES);
            }
            transpose(x);
            for (int i = 0, after; i < LANES && slot[i] >= 0; i = after) {
                double *to = t->pooled + slot[i] * t->pooled_row + first + column;
                real sums[LANES];
                for (after = i + 1; after < LANES && slot[after] == slot[i]; after++) x[i] += x[after];
                store_unaligned(sums, x[i]);
                for (int l = 0; l < LANES; l++) to[l] += sums[l];
            }
        }
    }
}

static void pool_strip(const Tile *t, const Scratch *s, int p, const Strip *strip) {
    ptrdiff_t first = cell_of(strip->key, t->n_keys, t->columns);
    settle_weights(t, s, p, strip);
    add_to_cells(t, p, strip, first, sum_columns(t, t->panel[p].vecs, strip, first));
}

static void pool(Tile *t, ptrdiff_t begin, ptrdiff_t end) { each_strip(t, begin, end, pool_strip); }

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
static void collect_strip(const Tile *t, const Scratch *s, int p, const Strip *strip) {
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
    (void)s;
}

static void collect(Tile *t, ptrdiff_t begin, ptrdiff_t end) { each_strip(t, begin, end, collect_strip); }

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
