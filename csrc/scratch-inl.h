/* The scratch of a tile, and the state of its current block of keys. */
#ifndef FASTATTN_SCRATCH_INL_H
#define FASTATTN_SCRATCH_INL_H

#include "convert-inl.h"

/* The visible keys of a sub-block are bits, in words as wide as a lane, so that each lane tests its
 * own. */
#define SUB_BLOCKS (BLOCK_K / SUB_BLOCK_K)
#define MASK_WORDS (SUB_BLOCK_K / LANE_BITS)
#define MICROPANELS (BLOCK_Q / MR)

static ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static int fewer(ptrdiff_t left, int most) { return left < most ? (int)left : most; }

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
    real *out;               /* [micropanel][value_dim][MR], the running sum */
    real *block_out;         /* [value_dim][MR], the sum of one block */
    real *scores;            /* [SCORE_KEYS of the block][MR], then the weights */
    real *bias;              /* [SUB_BLOCK_K][MR] */
    real *more;              /* [SUB_BLOCK_K][MR]: the scores of BLOCK_D head dims */
    real *q;                 /* [micropanel][head_dim][MR], times q_scale */
    real *keys, *values;     /* [key of the block][dim], widened */
#ifdef BF16_TERMS
    uint32_t *q_terms; /* see matmul_bf16-inl.h */
    uint16_t *key_terms;
    uint16_t *value_terms;
    uint32_t *value_pairs;
    uint32_t *weight_terms;
    uint64_t *special_keys,
        *special_values; /* [sub-block]: bits of the keys that terms cannot represent */
#else
    real *decode_rows, *decode_sums; /* see decode-inl.h */
    real *weights, *key_columns, *q_high, *q_low, *key_high, *key_low,
        *metrics; /* distances-inl.h */
    lane_int *special_queries, *special_keys;
#endif
    PackedSubBlocks *packed;
    const MatmulEngine *engine;
    ptrdiff_t out_rows, key_rows; /* of a micropanel in `out`, of the keys in key_terms */
} Scratch;

#ifndef BF16_TERMS
/* Can keys or values be multiplied where they are? */
static bool direct_keys(const Tile *t) {
    return is_real(t->k_format) && !t->k_scales && t->score_function != ADDITIVE;
}
static bool direct_values(const Tile *t) { return is_real(t->v_format) && !t->v_scales; }
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
    s->out_rows = round_up(t->value_dim, ROW_PAD);
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
    TAKE(more, t->head_dim > BLOCK_D ? SUB_BLOCK_K * MR : 0)
    TAKE(visible, SUB_BLOCKS * MASK_WORDS * MR)
#ifdef BF16_TERMS
    TAKE(q, MR * t->head_dim)
    TAKE(keys, t->head_dim)
    TAKE(values, t->value_dim)
    TAKE(q_terms, BF16_TERMS * row * round_up(t->head_dim, CHUNK) / 2)
    TAKE(key_terms, BF16_TERMS * block_k * round_up(t->head_dim, CHUNK))
    TAKE(value_terms, BF16_TERMS * block_k * s->out_rows)
    TAKE(value_pairs, BF16_TERMS * CHUNK / 2 * s->out_rows)
    TAKE(weight_terms, BF16_TERMS * MR * BLOCK_K / 2)
    TAKE(special_keys, BLOCK_K / SUB_BLOCK_K)
    TAKE(special_values, BLOCK_K / SUB_BLOCK_K)
#else
    TAKE(q, row * round_up(t->head_dim, LANES))
    TAKE(keys, direct_keys(t) ? 0 : block_k * t->head_dim)
    TAKE(values, direct_values(t) ? 0 : block_k * t->value_dim)
    TAKE(decode_rows,
         LANES * round_up(t->head_dim > t->value_dim ? t->head_dim : t->value_dim, LANES))
    TAKE(decode_sums, MAX_DECODE_ROWS * round_up(t->value_dim, LANES))
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
