/* The matmuls of gradients on bfloat16 hardware: see matmul_bf16-inl.h.
 *
 * All five are of rows and lanes: S^T and dP^T = V dO^T have keys as rows and queries in the lanes;
 * dQ^T = K^T dS^T has head dims as rows; dV = P^T dO and dK = dS^T Q have keys as rows and dims in
 * the lanes, and sum over queries. With one term, the weights and the gradients of the scores are
 * rounded to bfloat16. If special numbers are visible to a micropanel in a sub-block, the two are
 * multiplied as real numbers; hidden special numbers become 0, so that they change no bit. */
#ifndef FASTATTN_BACKWARD_BF16_INL_H
#define FASTATTN_BACKWARD_BF16_INL_H

#include "backward_fma-inl.h"
#include "matmul_bf16-inl.h"

_Static_assert(MR == CHUNK, "a micropanel's queries are one step of a sum over queries");

/* Numbers of at least 2**SPECIAL_EXPONENT are special, too: products of smaller ones do not
 * overflow in any unit. */
#define SPECIAL_EXPONENT 56
INLINE __mmask16 large(vec x) {
    __m512i bound = _mm512_set1_epi32((int)((127u + SPECIAL_EXPONENT) << 24));
    return _mm512_cmpge_epu32_mask(_mm512_slli_epi32((__m512i)x, 1), bound);
}

/* to[term][chunk of dims][row][CHUNK] of some rows, times `unit`, a power of 2. `special` gets the
 * bits of the rows with special numbers, which become 0. */
INLINE void split_rows(const char *const *at, int rows, ptrdiff_t dim, ptrdiff_t dims, float unit,
                       bfloat *to, ptrdiff_t chunk, ptrdiff_t term, uint64_t *special,
                       NumberFormat format) {
    *special = 0;
    for (int r = 0; r < rows; r++, to += CHUNK) {
        __mmask32 out = 0;
        for (ptrdiff_t d = 0; d < dims; d += CHUNK) {
            __m512i terms[BF16_TERMS];
            if (BF16_TERMS == 1 && unit == 1 && format.kind == 'b' && dim == 2 &&
                d + CHUNK <= dims) {
                terms[0] = _mm512_loadu_si512(at[r] + d * 2);
                out |= bfloats_from(SPECIAL_EXPONENT, terms[0]);
            } else {
                vec a = load_dims(at[r], dim, d, dims, format, &unit);
                vec b = load_dims(at[r], dim, d + LANES, dims, format, &unit);
                split_bf16(a, b, terms);
                out |= unrepresentable(a) | unrepresentable(b) | large(a) | large(b);
            }
#pragma GCC unroll 3
            for (int i = 0; i < BF16_TERMS; i++)
                _mm512_store_si512(to + i * term + d / CHUNK * chunk, terms[i]);
        }
        if (!out) continue;
        *special |= (uint64_t)1 << r;
        for (int i = 0; i < BF16_TERMS; i++)
            for (ptrdiff_t d = 0; d < dims; d += CHUNK)
                memset(to + i * term + d / CHUNK * chunk, 0, sizeof(bfloat) * CHUNK);
    }
}

/* Pair the numbers of two rows of CHUNK, one above the other. */
INLINE void pair_up(__m512i upper, __m512i lower, pair *to) {
    const __m512i first = {0, 1, 8, 9, 2, 3, 10, 11}, second = {4, 5, 12, 13, 6, 7, 14, 15};
    __m512i low = _mm512_unpacklo_epi16(upper, lower), high = _mm512_unpackhi_epi16(upper, lower);
    _mm512_store_si512(to, _mm512_permutex2var_epi64(low, first, high));
    _mm512_store_si512(to + LANES, _mm512_permutex2var_epi64(low, second, high));
}

/* pairs[term][dim micropanel][micropanel][pair of queries][MR dims] from rows[term][dim
 * micropanel][query][CHUNK] of a micropanel. */
static void pair_queries(ptrdiff_t dim_micropanels, const bfloat *rows, pair *pairs) {
    for (ptrdiff_t i = 0; i < BF16_TERMS * dim_micropanels; i++)
        for (int j = 0; j < PAIRS; j++, rows += 2 * CHUNK)
            pair_up(_mm512_load_si512(rows), _mm512_load_si512(rows + CHUNK),
                    pairs + (i * MICROPANELS * PAIRS + j) * MR);
}

/* Split a micropanel's rows of queries, 0 after the last one. Returns the bits of the special ones.
 */
static uint64_t split_queries(const char *const *at, int queries, ptrdiff_t dim, ptrdiff_t dims,
                              NumberFormat format, bfloat *rows) {
    ptrdiff_t chunks = round_up(dims, CHUNK) / CHUNK;
    uint64_t special;
    if (queries < MR) memset(rows, 0, sizeof(bfloat) * (size_t)(BF16_TERMS * chunks * MR * CHUNK));
    WITH_FORMAT(format, split_rows, at, queries, dim, dims, 1, rows, MR * CHUNK,
                chunks * MR * CHUNK, &special);
    return special;
}

/* Pack a micropanel's queries and grad_out. */
static void begin_micropanel(const Tile *t, const BackwardScratch *g, int p) {
    ptrdiff_t first = p * MR, v = round_up(t->value_dim, CHUNK) / CHUNK;
    ptrdiff_t k = round_up(t->head_dim, CHUNK) / CHUNK;
    int queries = fewer(t->n_queries - first, MR);
    uint64_t special = split_queries(t->grad_out + first, queries, t->grad_out_dim, t->value_dim,
                                     t->grad_out_format, g->rows);
    pair_queries(v, g->rows, g->grad_out_pairs + p * PAIRS * MR);
    /* grad_out_lanes[term][micropanel][pair of dims][MR] */
    for (int i = 0; i < BF16_TERMS; i++)
        for (ptrdiff_t c = 0; c < v; c++)
            for (int n = 0; n < MR_VECS; n++)
                transpose_pairs(
                    (const pair *)g->rows + ((i * v + c) * MR + n * LANES) * PAIRS, PAIRS,
                    g->grad_out_lanes + ((i * MICROPANELS + p) * v + c) * PAIRS * MR + n * LANES,
                    MR);
    special |= split_queries(t->q + first, queries, t->q_dim, t->head_dim, t->q_format, g->rows);
    pair_queries(k, g->rows, g->q_pairs + p * PAIRS * MR);
    g->special_queries[p] = special;
}

/* The bits of a sub-block's special keys. With one term the packed keys are checked. */
static uint64_t special_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    uint64_t special = s->special_keys[begin % BLOCK_K / SUB_BLOCK_K];
    for (ptrdiff_t d = 0; BF16_TERMS == 1 && d < t->head_dim; d += CHUNK)
        for (ptrdiff_t key = begin; key < end; key++) {
            const bfloat *from = s->key_terms + d * s->key_rows + key % BLOCK_K * CHUNK;
            special |= (uint64_t)(bfloats_from(SPECIAL_EXPONENT, _mm512_load_si512(from)) != 0)
                       << (key - begin);
        }
    return special;
}

/* key_columns[term][chunk of keys][head dim][CHUNK] from the terms of a sub-block's keys. */
static void transpose_keys(const Tile *t, const BackwardScratch *g, ptrdiff_t begin, ptrdiff_t end,
                           uint64_t special) {
    const Scratch *s = &g->forward;
    ptrdiff_t dims = round_up(t->head_dim, CHUNK), rows = g->q_rows_padded;
    uint64_t use = first_bits(end - begin) & ~special;
    pair pairs[PAIRS][MR] __attribute__((aligned(64)));
    for (int i = 0; i < BF16_TERMS; i++)
        for (ptrdiff_t key = begin; key < end; key += CHUNK)
            for (ptrdiff_t d = 0; d < dims; d += CHUNK) {
                const bfloat *from =
                    s->key_terms + (i * dims + d) * s->key_rows + key % BLOCK_K * CHUNK;
                bfloat *to = g->key_columns + (i * s->key_rows + key % BLOCK_K) * rows + d * CHUNK;
                for (int j = 0; j < CHUNK; j += 2) {
                    __m512i x[2];
                    for (int n = 0; n < 2; n++)
                        x[n] = use >> (key - begin + j + n) & 1
                                   ? _mm512_load_si512(from + (j + n) * CHUNK)
                                   : _mm512_setzero_si512();
                    pair_up(x[0], x[1], pairs[j / 2]);
                }
                for (int n = 0; n < CHUNK && d + n < rows; n += LANES)
                    transpose_pairs(&pairs[0][n], MR, (pair *)to + n * PAIRS, PAIRS);
            }
}

/* value_rows[term][chunk of value dims][key][CHUNK] of a sub-block, times WEIGHT_UNIT, because
 * products of terms that would be subnormal are 0. Returns the bits of the special ones. */
static uint64_t split_values(const Tile *t, const BackwardScratch *g, ptrdiff_t begin,
                             ptrdiff_t end) {
    ptrdiff_t chunk = g->forward.key_rows * CHUNK;
    const char *at[SUB_BLOCK_K];
    uint64_t special;
    for (ptrdiff_t key = begin; key < end; key++) at[key - begin] = value_at(t, key);
    WITH_FORMAT(t->v_format, split_rows, at, (int)(end - begin), t->v_dim, t->value_dim,
                WEIGHT_UNIT, g->value_rows + begin % BLOCK_K * CHUNK, chunk,
                chunk * round_up(t->value_dim, CHUNK) / CHUNK, &special);
    return special;
}

/* Pack a sub-block for gradients, in addition to its key_terms. */
static void pack_for_gradients(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    ptrdiff_t sub = begin % BLOCK_K / SUB_BLOCK_K;
    BackwardScratch g;
    lay_out_backward(t, &g);
    uint64_t special = special_keys(t, s, begin, end);
    transpose_keys(t, &g, begin, end, special);
    g.special_keys[sub] = special | split_values(t, &g, begin, end);
}

/* Is a special number visible to some query, or in a query with a visible key? */
static bool sees_special(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    uint64_t keys = g->special_keys[sub->key % BLOCK_K / SUB_BLOCK_K],
             queries = g->special_queries[p];
    if (sub->visibility == FULL || !(keys | queries)) return keys | queries;
    for (int i = 0; i < MR && p * MR + i < t->n_queries; i++) {
        uint64_t visible = first_bits(sub->keys), mask_words = 0;
        for (int w = 0; w < MASK_WORDS; w++)
            mask_words |= (uint64_t)(lane_uint)sub->mask_words[w * MR + i] << w * LANE_BITS;
        if (mask_words & visible & (queries >> i & 1 ? visible : keys)) return true;
    }
    return false;
}

/* Pack a micropanel and a sub-block as real numbers. */
static void pack_reals(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub) {
    pack_real_queries(t, g, p);
    widen_keys(t, sub->key, sub->key + sub->keys, g->real_keys);
    widen_values(t, sub->key, sub->key + sub->keys, g->real_values);
}

/* grad_scores = V dO^T / unit. Returns whether terms can represent all operands. */
static bool multiply_values(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub,
                            real *unit) {
    ptrdiff_t chunks = round_up(t->value_dim, CHUNK) / CHUNK, rows = g->forward.key_rows;
    if (sees_special(t, g, p, sub)) {
        *unit = 1;
        pack_reals(t, g, p, sub);
        multiply_real_values(t, g, p, sub, (View){g->real_values, t->value_dim, 1});
        return false;
    }
    Rows v = {g->value_rows + sub->key % BLOCK_K * CHUNK, rows * chunks * CHUNK, rows * CHUNK};
    Lanes o = {g->grad_out_lanes + p * chunks * PAIRS * MR, MICROPANELS * chunks * PAIRS * MR,
               PAIRS * MR};
    multiply(VALUE_ORDER, t->micropanel[p].vecs, sub->keys, v, o, (int)chunks, g->grad_scores,
             false);
    *unit = (real)(1 / WEIGHT_UNIT);
    return true;
}

/* rows[term][pending micropanel][key][CHUNK] of a micropanel's numbers, 0 after the last key. */
static void split_sub_block(int vecs, const SubBlock *sub, const real *from, bfloat *to) {
    for (int j = 0; j < round_up(sub->keys, CHUNK); j++, from += MR, to += CHUNK) {
        __m512i terms[BF16_TERMS];
        vec a = j < sub->keys ? load(from) : splat(0);
        vec b = j < sub->keys && vecs > 1 ? load(from + LANES) : splat(0);
        split_bf16(a, b, terms);
#pragma GCC unroll 3
        for (int i = 0; i < BF16_TERMS; i++)
            _mm512_store_si512(to + i * PENDING_MICROPANELS * SUB_BLOCK_K * CHUNK, terms[i]);
    }
}

/* c[key][dims] (+)= the sum over the queries of some micropanels from p on. */
static void sum_micropanels(ptrdiff_t dims, int keys, int p, int micropanels, const bfloat *rows,
                            const pair *pairs, real *c, bool accumulate) {
    Rows a = {rows + p % PENDING_MICROPANELS * SUB_BLOCK_K * CHUNK,
              PENDING_MICROPANELS * SUB_BLOCK_K * CHUNK, SUB_BLOCK_K * CHUNK};
    for (ptrdiff_t m = 0; m < dim_micropanels(dims); m++) {
        Lanes b = {pairs + (m * MICROPANELS + p) * PAIRS * MR,
                   dim_micropanels(dims) * MICROPANELS * PAIRS * MR, PAIRS * MR};
        multiply(VALUE_ORDER, (int)dim_vecs(dims), keys, a, b, micropanels,
                 c + m * SUB_BLOCK_K * MR, accumulate);
    }
}

/* Add what is pending to the gradients of a sub-block's keys. Contiguous micropanels make one
 * matmul. */
static void flush_pending(const Tile *t, const BackwardScratch *g, int keys, Accumulated *sums) {
    for (int p = 0; sums->pending >> p; p++) {
        int micropanels = 0;
        for (; sums->pending >> (p + micropanels) & 1; micropanels++) continue;
        if (micropanels == 0) continue;
        sum_micropanels(t->value_dim, keys, p, micropanels, g->weight_rows, g->grad_out_pairs,
                        g->sub_grad_v, sums->keys);
        sum_micropanels(t->head_dim, keys, p, micropanels, g->grad_rows, g->q_pairs, g->sub_grad_k,
                        sums->keys);
        sums->keys = true;
        p += micropanels;
    }
    sums->pending = 0;
}

/* Add to the gradients of the queries, and keep the weights and dS^T pending for those of the keys.
 */
static void sum_sub_block(const Tile *t, const BackwardScratch *g, int p, const SubBlock *sub,
                          bool fit, Accumulated *sums) {
    ptrdiff_t dims = g->q_rows_padded, own = p % PENDING_MICROPANELS * SUB_BLOCK_K * CHUNK;
    if (!fit) {
        pack_reals(t, g, p, sub);
        sum_real_sub_block(t, g, p, sub, (View){g->real_keys, t->head_dim, 1}, sums);
        return;
    }
    if (!(sums->pending >> p / PENDING_MICROPANELS * PENDING_MICROPANELS))
        flush_pending(t, g, sub->keys, sums);
    split_sub_block(t->micropanel[p].vecs, sub, sub->scores, g->weight_rows + own);
    split_sub_block(t->micropanel[p].vecs, sub, g->grad_scores, g->grad_rows + own);
    /* grad_lanes[term][pair of keys][MR] */
    for (int i = 0; i < BF16_TERMS; i++) {
        const bfloat *from = g->grad_rows + i * PENDING_MICROPANELS * SUB_BLOCK_K * CHUNK + own;
        for (int j = 0; j < round_up(sub->keys, CHUNK); j += 2)
            pair_up(_mm512_load_si512(from + j * CHUNK), _mm512_load_si512(from + (j + 1) * CHUNK),
                    g->grad_lanes + (i * SUB_BLOCK_K + j) / 2 * MR);
    }
    Rows k = {g->key_columns + sub->key % BLOCK_K * dims, g->forward.key_rows * dims, CHUNK * dims};
    Lanes s = {g->grad_lanes, SUB_BLOCK_K / 2 * MR, PAIRS * MR};
    multiply(VALUE_ORDER, t->micropanel[p].vecs, dims, k, s,
             (int)(round_up(sub->keys, CHUNK) / CHUNK), g->grad_q + p * MR * dims, sums->q[p]);
    sums->q[p] = true;
    sums->pending |= (uint32_t)1 << p;
}
#endif
