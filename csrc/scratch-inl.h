/* The scratch of a tile, and the state of its current block of keys. */
#ifndef FASTATTN_SCRATCH_INL_H
#define FASTATTN_SCRATCH_INL_H

#include "convert-inl.h"
#ifdef BF16_TERMS
#include "bf16.h"
#endif

/* The visible keys of a sub-block are bits, in words as wide as a lane, so that each lane tests its
 * own. */
#define SUB_BLOCKS (BLOCK_K / SUB_BLOCK_K)
#define MASK_WORDS (SUB_BLOCK_K / LANE_BITS)
#define MICROPANELS (BLOCK_Q / MR)

/* Which sub-blocks of the current block have been packed, as bits: those with a key that is visible
 * to some query. The block ends at `end`. */
typedef struct {
    uint64_t keys, values;
    ptrdiff_t end;
} PackedSubBlocks;

/* Arrays with an element for each query are [micropanel][row][MR], so that a micropanel is
 * contiguous, or hold only the current micropanel. Rows of scores and of sums are padded to a
 * multiple of ROW_PAD. */
typedef struct MatmulEngine MatmulEngine; /* see matmul.h */

typedef struct Scratch {
    struct Scratch *own;     /* this struct, at the start of the scratch once `begin` has run */
    real *row_max, *row_sum; /* [micropanel][MR] */
    real *max_score;         /* [micropanel][MR], of the visible keys; if want_max */
    lane_int *any_visible;   /* [micropanel][MR]: has the query a visible key? -1 or 0 */
    real *nan_beside_inf;    /* [micropanel][MR]: NaN if there was one beside Inf, else 0 */
    uint64_t *overflowed;    /* [micropanel][value_dim]: bits of the queries whose sum overflowed */
    lane_int *visible;       /* [sub-block][MASK_WORDS][MR]: see Visibility */
    real *out;               /* [micropanel][sums][MR], the running sums */
    real *block_out;         /* [sums][MR], those of one block */
    real *scores;            /* [SCORE_KEYS of the block][MR], then the weights */
    real *bias;              /* [SUB_BLOCK_K][MR] */
    lane_int *kept;          /* [SUB_BLOCK_K][MR]: has dropout kept the weight? -1 or 0 */
    real *more;              /* [SUB_BLOCK_K][MR]: the scores of BF16_BLOCK_D head dims */
    real *q;                 /* [micropanel][head_dim][MR], times q_scale */
    real *keys, *values;     /* [key of the block][dim], widened */
#ifdef BF16_TERMS
    bundle *q_terms; /* see matmul_bf16-inl.h */
    bfloat *key_terms;
    bfloat *value_terms;
    bundle *value_bundles;
    bundle *weight_terms;
    uint64_t *special_keys,
        *special_values; /* [sub-block]: bits of the keys that terms cannot represent */
#else
    real *decode_rows, *decode_sums; /* see decode-inl.h */
    real *d_q, *d_keys, *d_values, *d_scores, *cap_slope; /* tangents-inl.h */
    real *weights, *key_columns, *q_high, *q_low, *key_high, *key_low,
        *metrics; /* distances-inl.h */
    lane_int *special_queries, *special_keys;
#endif
    PackedSubBlocks *packed;
    const MatmulEngine *engine;
    ptrdiff_t sums; /* of a query: of its values; in forward mode then those of tangents-inl.h */
    ptrdiff_t out_rows, key_rows; /* of a micropanel in `out`, of the keys in key_terms */
} Scratch;

/* Where the row of a key is: rows from `at` on are `row` bytes apart, and pages `page` bytes. */
static const char *row_of_key(const Tile *t, const char *at, ptrdiff_t row, ptrdiff_t page,
                              ptrdiff_t key) {
    if (!t->pages) return at + key * row;
    return at + t->pages[key / t->page] * page + key % t->page * row;
}
static const char *key_at(const Tile *t, ptrdiff_t key) {
    return row_of_key(t, t->k, t->k_key, t->k_page, key);
}
static const char *value_at(const Tile *t, ptrdiff_t key) {
    return row_of_key(t, t->v, t->v_key, t->v_page, key);
}
static const float *key_scales(const Tile *t, ptrdiff_t key) {
    const char *at = (const char *)t->k_scales;
    return at ? (const float *)row_of_key(t, at, t->k_scales_key, t->k_scales_page, key) : NULL;
}
static const float *value_scales(const Tile *t, ptrdiff_t key) {
    const char *at = (const char *)t->v_scales;
    return at ? (const float *)row_of_key(t, at, t->v_scales_key, t->v_scales_page, key) : NULL;
}

/* How many floats lie between the scales of a key and those of the next one in its page. */
static ptrdiff_t key_scales_row(const Tile *t) {
    return t->k_scales_key / (ptrdiff_t)sizeof(float);
}
static ptrdiff_t value_scales_row(const Tile *t) {
    return t->v_scales_key / (ptrdiff_t)sizeof(float);
}

/* How many of `keys` keys from `key` on are side by side: those of its page. */
static int adjacent_keys(const Tile *t, ptrdiff_t key, ptrdiff_t keys) {
    ptrdiff_t left = t->pages ? t->page - key % t->page : keys;
    return (int)(left < keys ? left : keys);
}

/* The keys [begin, end) widened to `real`, one behind the other, and times their scales. */
static void widen_keys(const Tile *t, ptrdiff_t begin, ptrdiff_t end, real *to) {
    for (int keys; begin < end; begin += keys, to += keys * t->head_dim) {
        keys = adjacent_keys(t, begin, end - begin);
        widen(key_at(t, begin), t->k_key, t->k_dim, t->k_format, key_scales(t, begin),
              key_scales_row(t), keys, t->head_dim, to);
    }
}
static void widen_values(const Tile *t, ptrdiff_t begin, ptrdiff_t end, real *to) {
    for (int keys; begin < end; begin += keys, to += keys * t->value_dim) {
        keys = adjacent_keys(t, begin, end - begin);
        widen(value_at(t, begin), t->v_key, t->v_dim, t->v_format, value_scales(t, begin),
              value_scales_row(t), keys, t->value_dim, to);
    }
}

#ifndef BF16_TERMS
/* Is each sub-block in one piece? */
static bool whole_sub_blocks(const Tile *t) { return !t->pages || t->page % SUB_BLOCK_K == 0; }

/* Can keys or values be multiplied where they are? */
static bool direct_keys(const Tile *t) {
    return is_real(t->k_format) && t->score_function != ADDITIVE && whole_sub_blocks(t);
}
static bool direct_values(const Tile *t) { return is_real(t->v_format) && whole_sub_blocks(t); }
#endif

/* Keys or values of type `real`: in place, or widened in the scratch. */
typedef struct {
    const real *data;
    ptrdiff_t row, dim;
} View;

/* Lay out the scratch at `base`. Returns its size in bytes. */
static size_t lay_out(const Tile *t, ptrdiff_t micropanels, char *base, Scratch *s) {
    size_t bytes = 0;
    ptrdiff_t row = micropanels * MR, block_k = round_up(t->block_k, 2 * ROW_PAD);
    s->sums = t->forward_mode ? 2 * t->value_dim + 1 : t->value_dim;
    s->out_rows = round_up(s->sums, ROW_PAD);
    s->key_rows = block_k;
#define TAKE(field, count)                                                                         \
    s->field = (void *)((uintptr_t)base + bytes);                                                  \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *s->field * (count), 64);
    TAKE(own, 1)
    TAKE(packed, 1)
    TAKE(row_max, row)
    TAKE(row_sum, row)
    TAKE(max_score, t->want_max ? row : 0)
    TAKE(any_visible, row)
    TAKE(nan_beside_inf, row)
    TAKE(overflowed, micropanels * t->value_dim)
    TAKE(out, row * s->out_rows)
    TAKE(block_out, MR * s->out_rows)
    TAKE(bias, t->has_bias ? SUB_BLOCK_K * MR : 0)
    TAKE(more, t->head_dim > BF16_BLOCK_D ? SUB_BLOCK_K * MR : 0)
    /* Counters of dropout may begin before a sub-block and end behind it. */
    TAKE(kept, t->has_dropout ? (SUB_BLOCK_K + 2 * KEYS_PER_COUNTER) * MR : 0)
    s->kept += KEYS_PER_COUNTER * MR;
    TAKE(visible, SUB_BLOCKS * MASK_WORDS * MR)
#ifdef BF16_TERMS
    TAKE(q, MR * t->head_dim)
    TAKE(keys, t->head_dim)
    TAKE(values, t->value_dim)
    TAKE(q_terms, BF16_TERMS * row * round_up(t->head_dim, CHUNK) / BUNDLE)
    TAKE(key_terms, BF16_TERMS * block_k * round_up(t->head_dim, CHUNK))
    TAKE(value_terms, BF16_TERMS * block_k * s->out_rows)
    TAKE(value_bundles, BF16_TERMS * BUNDLES * s->out_rows)
    TAKE(weight_terms, BF16_TERMS * MR * BLOCK_K / BUNDLE)
    TAKE(special_keys, BLOCK_K / SUB_BLOCK_K)
    TAKE(special_values, BLOCK_K / SUB_BLOCK_K)
#else
    TAKE(q, row * round_up(t->head_dim, LANES))
    TAKE(keys, direct_keys(t) ? 0 : block_k * t->head_dim)
    TAKE(values, direct_values(t) ? 0 : block_k * t->value_dim)
    TAKE(decode_rows,
         LANES * round_up(t->head_dim > t->value_dim ? t->head_dim : t->value_dim, LANES))
    TAKE(decode_sums, MAX_DECODE_ROWS * round_up(t->value_dim, LANES))
    if (t->forward_mode) {
        TAKE(d_q, t->has_d_q ? row * t->head_dim : 0)
        TAKE(d_keys, t->has_d_k && !is_real(t->d_k_format) ? block_k * t->head_dim : 0)
        TAKE(d_values, t->has_d_v && !is_real(t->d_v_format) ? block_k * t->value_dim : 0)
        TAKE(d_scores, SUB_BLOCK_K * MR)
        TAKE(cap_slope, t->softcap > 0 ? SUB_BLOCK_K * MR : 0)
    }
    if (t->score_function != DOT) {
        TAKE(key_columns, MR * t->head_dim)
        TAKE(metrics, SUB_BLOCK_K * MR)
    }
    if (t->score_function == ADDITIVE) {
        TAKE(weights, t->head_dim)
        TAKE(q_high, row * t->head_dim)
        TAKE(q_low, row * t->head_dim)
        TAKE(key_high, block_k * t->head_dim)
        TAKE(key_low, block_k * t->head_dim)
        TAKE(special_queries, row)
        TAKE(special_keys, block_k)
    }
#endif
    TAKE(scores, MR * (block_k < SCORE_KEYS ? block_k : SCORE_KEYS))
#undef TAKE
    return bytes;
}

/* Which keys of a sub-block are visible to the queries of a micropanel: none, those whose bits are
 * set in mask_words, [MASK_WORDS][MR], or all. */
typedef enum { EMPTY, PARTIAL, FULL } Visibility;

/* A sub-block as one micropanel reads it: only the keys in its key ranges. */
typedef struct {
    ptrdiff_t key;
    int keys;
    real *scores;
    lane_int *mask_words;
    Visibility visibility;
    bool bias_in_range; /* are all biases far from overflow? */
} SubBlock;

/* The current block of a micropanel. */
typedef struct {
    SubBlock sub_blocks[SUB_BLOCKS];
    bool any_visible; /* is any key visible? */
    vec top[MR_VECS], sum[MR_VECS], rescale[MR_VECS];
} BlockState;

/* The scratch of a tile that has begun. */
static Scratch scratch_of(const Tile *t) { return *(const Scratch *)t->scratch; }
#endif
