/* The engine for bfloat16 hardware: bfloat16, float16 and float32 as sums of bfloat16 terms.
 *
 * A float16 is the exact sum of two bfloat16 terms, and a float32 of three. The product of two such
 * sums is the sum of the products of their terms, without those that are smaller than the rounding
 * of a float32 (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 Artificial Intelligence
 * Datatype For Higher-Precision Computations"). Sums are kept in float32. With BF16_TERMS = 1 the
 * weights are rounded to bfloat16.
 *
 * The hardware multiplies bundles of head dims or keys: an operand with queries in its lanes is
 * [term][bundle][MR] bundles, the other one is [term][chunk][row][CHUNK] numbers. Numbers that
 * terms cannot represent are left out and added afterwards, in the lanes that they are visible to,
 * so that they change no bit of any other lane. */
#ifndef FASTATTN_MATMUL_BF16_INL_H
#define FASTATTN_MATMUL_BF16_INL_H

#include "bf16.h"
#include "convert-inl.h"
#include "dropout-inl.h"
#include "masking-inl.h"
#include "matmul.h"
#include "register_tile-inl.h"
#include "score_options-inl.h"
#ifdef __aarch64__
#include "bf16_neon-inl.h"
#else
#include "bf16_avx512-inl.h"
#endif

#define WEIGHT_TERM (BLOCK_K / BUNDLE * MR)
_Static_assert(ROW_MULTIPLE % CHUNK == 0, "sub-blocks begin with a step of a matmul");

/* Matmuls use the products of terms i and j with i + j <= order. Of a float16 that is all of them,
 * so scores are exact; of a float32 the others are smaller than its rounding. */
#define SCORE_ORDER 2
#define VALUE_ORDER (BF16_TERMS - 1)

/* The dims [d, d + LANES) of a row; 0 from `dims` on. */
INLINE vec load_dims(const char *row, ptrdiff_t dim, ptrdiff_t d, ptrdiff_t dims,
                     NumberFormat format, const float *scales) {
    if (d >= dims) return splat(0);
    real scale = scale_of_dim(scales, format, d);
    if (dim != format.bytes) return load_strided(row + d * dim, dim, dims - d, format) * scale;
    return load_some(row + dim_offset(format, d), dims - d, format) * scale;
}

static void bf16_pack_queries(Tile *t, const Scratch *s, int p) {
    ptrdiff_t dims = round_up(t->head_dim, CHUNK), row = dims / BUNDLE * MR;
    t->micropanel[p].special = 0;
    for (int n = 0; n < t->micropanel[p].vecs; n++) {
        bundle *to = s->q_terms + p * row + n * LANES;
        load_queries(t, p * MR + n * LANES, s->q + n * LANES);
        flags special = {0};
        for (ptrdiff_t d = 0; d < dims; d += BUNDLE, to += MR) {
            vec x[BUNDLE];
#pragma GCC unroll 4
            for (int i = 0; i < BUNDLE; i++) {
                x[i] = d + i < t->head_dim ? load(s->q + (d + i) * MR + n * LANES) : splat(0);
                special |= unrepresentable(x[i]);
            }
            split_bundles(x, to, t->micropanels * row);
        }
        t->micropanel[p].special |= flag_bits(special) << n * LANES;
    }
}

/* key_terms[term][chunk of dims][key][CHUNK] of a sub-block. */
INLINE void split_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end,
                       NumberFormat format) {
    ptrdiff_t dims = round_up(t->head_dim, CHUNK), term = s->key_rows * dims;
    uint64_t special = 0;
    for (ptrdiff_t key = begin; key < end; key++) {
        const char *row = key_at(t, key);
        const float *scales = key_scales(t, key);
        bfloat *to = s->key_terms + key % BLOCK_K * CHUNK;
        flags out = {0};
        for (ptrdiff_t d = 0; d < dims; d += CHUNK, to += s->key_rows * CHUNK) {
            if (BF16_TERMS == 1 && format.kind == 'b' && t->k_dim == 2 &&
                d + CHUNK <= t->head_dim) {
                memcpy(to, row + d * 2, sizeof(bfloat) * CHUNK);
                continue;
            }
            vec x[CHUNK / LANES];
#pragma GCC unroll 2
            for (int i = 0; i < CHUNK / LANES; i++) {
                x[i] = load_dims(row, t->k_dim, d + i * LANES, t->head_dim, format, scales);
                out |= unrepresentable(x[i]);
            }
            split_chunk(x, to, term);
        }
        /* With one term, NaN and Inf multiply as in float32. */
        if (BF16_TERMS > 1 && flag_bits(out)) special |= (uint64_t)1 << key % SUB_BLOCK_K;
    }
    s->special_keys[begin % BLOCK_K / SUB_BLOCK_K] = special;
}

static void bf16_pack_keys(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    WITH_STORED_FORMAT(t->k_format, split_keys, t, s, begin, end);
}

/* The bits of a sub-block's keys, which may begin within it. */
static uint64_t bits_of(const uint64_t *bits, const SubBlock *sub) {
    return bits[sub->key % BLOCK_K / SUB_BLOCK_K] >> sub->key % SUB_BLOCK_K;
}

/* bundles[term][bundle][d] of up to CHUNK values, and the bits of the special ones. Special
 * numbers, and values whose bits are not set in `use`, become 0. */
INLINE void bundle_values(const Tile *t, ptrdiff_t key, uint32_t use, bundle *bundles,
                          ptrdiff_t term, uint32_t *special, NumberFormat format) {
    const uint32_t all = (1u << BUNDLE) - 1;
    ptrdiff_t dims = round_up(t->value_dim, LANES);
    *special = 0;
    for (int j = 0; j < CHUNK; j += BUNDLE, bundles += dims) {
        flags out[BUNDLE] = {0};
        const char *rows[BUNDLE] = {NULL};
        for (int i = 0; i < BUNDLE; i++)
            if (use >> (j + i) & 1) rows[i] = value_at(t, key + j + i);
        for (ptrdiff_t d = 0; d < dims; d += LANES) {
            if (BF16_TERMS == 1 && format.kind == 'b' && t->v_dim == 2 &&
                d + LANES <= t->value_dim && (use >> j & all) == all) {
                bundle_bfloats(rows, d, bundles + d, out);
                continue;
            }
            vec x[BUNDLE];
#pragma GCC unroll 4
            for (int i = 0; i < BUNDLE; i++) {
                x[i] = splat(0);
                if (rows[i])
                    x[i] = load_dims(rows[i], t->v_dim, d, t->value_dim, format,
                                     value_scales(t, key + j + i));
                flags special_lanes = unrepresentable(x[i]);
                x[i] = without(special_lanes, x[i]);
                out[i] |= special_lanes;
            }
            split_bundles(x, bundles + d, term);
        }
        for (int i = 0; i < BUNDLE; i++) *special |= (uint32_t)(flag_bits(out[i]) != 0) << (j + i);
    }
}

/* value_terms[term][chunk of keys][value dim][CHUNK] of a sub-block. Special numbers become 0. */
static void bf16_pack_values(const Tile *t, const Scratch *s, ptrdiff_t begin, ptrdiff_t end) {
    ptrdiff_t dims = s->out_rows, term = dims * s->key_rows;
    uint64_t *sub_special = s->special_values + begin % BLOCK_K / SUB_BLOCK_K;
    *sub_special = 0;
    for (ptrdiff_t key = begin; key < end; key += CHUNK) {
        uint32_t use = (uint32_t)first_bits(fewer(end - key, CHUNK));
        uint32_t special;
        bfloat *to = s->value_terms + key % BLOCK_K * dims;
#if BUNDLES == 1 /* the bundles are the rows */
        WITH_STORED_FORMAT(t->v_format, bundle_values, t, key, use, (bundle *)to, term / BUNDLE,
                           &special);
#else
        WITH_STORED_FORMAT(t->v_format, bundle_values, t, key, use, s->value_bundles,
                           BUNDLES * dims, &special);
        for (int i = 0; i < BF16_TERMS; i++)
            for (ptrdiff_t d = 0; d < dims; d += LANES)
                transpose_bundles(s->value_bundles + i * BUNDLES * dims + d, dims,
                                 (bundle *)(to + i * term + d * CHUNK));
#endif
        *sub_special |= (uint64_t)special << key % SUB_BLOCK_K;
    }
}

/* c[row][lane] (+)= sum over chunks; rows in whole ROW_GRAINs. */
INLINE void multiply(const int order, int vecs, ptrdiff_t rows, Rows a, Lanes b, int chunks,
                     real *c, bool accumulate) {
    __asm__ volatile("" ::: "memory"); /* the compiler does not know that tile loads read memory */
    for (int row_groups; rows > 0; rows -= row_groups * ROW_PAD) {
        row_groups = rows > ROW_PAD ? 2 : 1;
#define SIZE(g, v)                                                                                 \
    if (row_groups == g && vecs == v) multiply_rows(order, g, v, a, b, chunks, c, accumulate);
        SIZE(2, 2)
        SIZE(2, 1)
        SIZE(1, 2)
        SIZE(1, 1)
#if MR_VECS == 3
        SIZE(2, 3)
        SIZE(1, 3)
#endif
#undef SIZE
        a.data += row_groups * ROW_PAD * CHUNK;
        c += row_groups * ROW_PAD * MR;
    }
}

/* Recompute the scores of special keys and queries from real numbers. */
static void recompute_special_scores(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                                     uint64_t special) {
    int vecs = t->micropanel[p].vecs;
    real row[MR] __attribute__((aligned(64)));
    for (int n = 0; n < vecs; n++) load_queries(t, p * MR + n * LANES, s->q + n * LANES);
    for (int j = 0; j < sub->keys; j++) {
        uint64_t lanes = special >> j & 1 ? ~(uint64_t)0 : t->micropanel[p].special;
        if (!lanes) continue;
        widen_keys(t, sub->key + j, sub->key + j + 1, s->keys);
        matmul(vecs, 1, s->keys, t->head_dim, 1, t->head_dim, block_d(vecs, t->head_dim),
               s->q, row, false, NULL);
        for (int i = 0; i < vecs * LANES; i++)
            if (lanes >> i & 1) sub->scores[j * MR + i] = row[i];
    }
}

static void add_to_scores(int vecs, const SubBlock *sub, const real *more) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = sub->scores + j * MR + n * LANES;
            store(s, load(s) + load(more + j * MR + n * LANES));
        }
}

static void bf16_multiply_keys(const Tile *t, const Scratch *s, int p, const SubBlock *sub,
                               vec *top) {
    ptrdiff_t dims = round_up(t->head_dim, CHUNK);
    Rows k = {s->key_terms + sub->key % BLOCK_K * CHUNK, s->key_rows * dims, s->key_rows * CHUNK};
    Lanes q = {s->q_terms + p * dims / BUNDLE * MR, t->micropanels * dims / BUNDLE * MR,
               BUNDLES * MR};
    for (ptrdiff_t d = 0; d < dims; d += BF16_BLOCK_D) {
        int chunks = fewer(dims - d, BF16_BLOCK_D) / CHUNK;
        real *to = d ? s->more : sub->scores;
        multiply(SCORE_ORDER, t->micropanel[p].vecs, sub->keys, k, q, chunks, to, false);
        if (d) add_to_scores(t->micropanel[p].vecs, sub, to);
        k.data += chunks * k.chunk;
        q.data += chunks * q.chunk;
    }
    uint64_t special = bits_of(s->special_keys, sub);
    if (special | t->micropanel[p].special) recompute_special_scores(t, s, p, sub, special);
    take_max(t->micropanel[p].vecs, sub, top);
}

/* The weights of up to BUNDLE keys, 0 for the others. */
INLINE void weigh_bundles(const int vecs, const int keys, const real *scores, vec exponent,
                         const vec *top, vec *sum, bundle *to, ptrdiff_t term) {
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) {
        vec weights[BUNDLE];
#pragma GCC unroll 4
        for (int i = 0; i < BUNDLE; i++) {
            weights[i] = splat(0);
            if (i < keys)
                weights[i] = weight_from(load(scores + i * MR + n * LANES), top[n], exponent);
        }
#pragma GCC unroll 4
        for (int i = 0; i < BUNDLE; i++) sum[n] += weights[i];
        split_bundles(weights, to + n * LANES, term);
    }
}

INLINE void weigh_vecs(const int vecs, const SubBlock *sub, vec exponent, const vec *top, vec *sum,
                       bundle *to, ptrdiff_t term) {
    vec shift[MR_VECS], total[MR_VECS];
    int j = 0;
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) shift[n] = top[n], total[n] = sum[n];
    for (; j + BUNDLE <= sub->keys; j += BUNDLE, to += MR)
        weigh_bundles(vecs, BUNDLE, sub->scores + j * MR, exponent, shift, total, to, term);
    if (j < sub->keys) {
        weigh_bundles(vecs, sub->keys - j, sub->scores + j * MR, exponent, shift, total, to, term);
        j += BUNDLE, to += MR;
    }
    for (; j < round_up(sub->keys, CHUNK); j += BUNDLE, to += MR)
        for (int i = 0; i < BF16_TERMS; i++) memset(to + i * term, 0, MR * sizeof *to);
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) sum[n] = total[n];
}

/* Turn scores into the terms of weights, and add the weights to `sum`. */
static void weigh(int vecs, double exponent, const SubBlock *sub, const vec *top, vec *sum,
                  bundle *to, ptrdiff_t term) {
    vec factor = splat((real)exponent);
    switch (vecs) {
    case 1: weigh_vecs(1, sub, factor, top, sum, to, term); break;
    case 2: weigh_vecs(2, sub, factor, top, sum, to, term); break;
#if MR_VECS == 3
    case 3: weigh_vecs(3, sub, factor, top, sum, to, term); break;
#endif
    }
}

static bundle *weights_of(const Scratch *s, const SubBlock *sub) {
    return s->weight_terms + sub->key % BLOCK_K / BUNDLE * MR;
}

/* The terms of weights that are dropped become 0. */
static void drop_weights(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    bundle *to = weights_of(s, sub);
    draw_kept(t, s, p, sub);
    for (int j = 0; j < sub->keys; j += BUNDLE, to += MR)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            ivec kept[BUNDLE];
#pragma GCC unroll 4
            for (int i = 0; i < BUNDLE; i++)
                kept[i] = *(const ivec *)(s->kept + (j + i) * MR + n * LANES);
            drop_bundles(kept, to + n * LANES, WEIGHT_TERM);
        }
}

/* Add the special numbers of a sub-block's values to the queries they are visible to. */
static void add_special_values(const Tile *t, const Scratch *s, int p, const BlockState *b,
                               const SubBlock *sub, real *out) {
    uint64_t special = bits_of(s->special_values, sub);
    vec exponent = splat((real)t->exponent);
    for (int j = 0; j < sub->keys; j++) {
        if (!(special >> j & 1)) continue;
        widen_values(t, sub->key + j, sub->key + j + 1, s->values);
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            vec score = load(sub->scores + j * MR + n * LANES);
            vec weight = weight_from(score, b->top[n], exponent);
            if (t->has_dropout)
                weight = choose(*(const ivec *)(s->kept + j * MR + n * LANES), weight, splat(0));
            for (ptrdiff_t d = 0; d < t->value_dim; d++) {
                real *o = out + d * MR + n * LANES;
                if (!flag_bits(unrepresentable(splat(s->values[d])))) continue;
                store(o,
                      choose(visible_lanes(sub, n, j), weight * s->values[d] + load(o), load(o)));
            }
        }
    }
}

/* Add the weighted values of the sub-blocks [i, end) of a block. */
static void sum_sub_blocks(const Tile *t, const Scratch *s, int p, const BlockState *b, int i,
                           int end, real *out, bool *accumulate) {
    while (i < end && t->value_dim > 0) {
        const SubBlock *first = &b->sub_blocks[i];
        int chunks = 0;
        /* Contiguous sub-blocks make one matmul. */
        for (; i < end && b->sub_blocks[i].visibility != EMPTY &&
               b->sub_blocks[i].key == first->key + chunks * CHUNK;
             i++)
            chunks += (int)round_up(b->sub_blocks[i].keys, CHUNK) / CHUNK;
        if (chunks == 0) {
            i++;
            continue;
        }
        Rows v = {s->value_terms + first->key % BLOCK_K * s->out_rows, s->key_rows * s->out_rows,
                  CHUNK * s->out_rows};
        Lanes w = {weights_of(s, first), WEIGHT_TERM, BUNDLES * MR};
        multiply(VALUE_ORDER, t->micropanel[p].vecs, s->out_rows, v, w, chunks, out, *accumulate);
        *accumulate = true;
    }
}
#endif
