/* What the steps of a tile share: its scratch, and its block of keys under way. */
#ifndef FASTATTN_BLOCK_H
#define FASTATTN_BLOCK_H

#include "elements.h"

/* A strip's keys as bits, in words as wide as a lane, so that lanes can test their own. */
#define STRIPS (PASS_KEYS / STRIP_KEYS)
#define WORDS (STRIP_KEYS / LANE_BITS)

static ptrdiff_t round_up(ptrdiff_t n, ptrdiff_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static int fewer(ptrdiff_t left, int most) { return left < most ? (int)left : most; }

/* Which strips of the pass under way have been made ready for the products, by bits: those that
 * somebody sees. The pass ends at `end`. */
typedef struct {
    uint64_t keys, values;
    ptrdiff_t end;
} Ready;

/* Head dims whose products are summed from zero before they join the running sum, as keys of a pass do. */
#define PASS_DIMS 256

/* What belongs to queries is [panel][row][PANEL], so that a panel is contiguous, or that of the panel
 * under way. Rows of scores and of sums are padded to a multiple of ROW_GRAIN. */
#define ROW_GRAIN 16
typedef struct Scratch {
    struct Scratch *own;     /* itself, at the beginning of the scratch, once a tile has begun */
    real *row_max, *row_sum; /* [panel][PANEL] */
    lane_int *saw;           /* [panel][PANEL]: has the query seen a key? -1 or 0 */
    real *wrong;             /* [panel][PANEL]: NaN where one was seen beside Inf, else 0 */
    uint64_t *lost;          /* [panel][value_dim]: bits of the queries whose sum overflowed */
    lane_int *seen;          /* [strip of the block][WORDS][PANEL]: see Seen */
    real *out;               /* [panel][value_dim][PANEL], the running sum */
    real *block_out;         /* [value_dim][PANEL], the sum of one block */
    real *scores;            /* [SCORE_KEYS of the block][PANEL], then the weights */
    real *bias;              /* [STRIP_KEYS][PANEL] */
    real *more;              /* [STRIP_KEYS][PANEL]: what some head dims add to the scores */
    real *q;                 /* [panel][head_dim][PANEL], times q_scale */
    real *keys, *values;     /* [keys of the pass][dim]: widened ones */
#ifdef PARTS
    uint32_t *q_parts;      /* see parts.h */
    uint16_t *key_parts;
    uint16_t *value_parts;
    uint32_t *value_pairs;
    uint32_t *weight_parts;
    uint64_t *odd_keys, *odd_values; /* [strip of the pass]: bits of those that parts cannot express */
#else
    real *few_rows, *few_sums; /* see few.h */
    real *weights, *key_columns, *q_high, *q_low, *key_high, *key_low, *measured; /* measures.h */
    lane_int *odd_queries, *odd_keys;
#endif
    Ready *ready;
    ptrdiff_t out_rows, key_rows; /* of one panel, of the keys' parts */
} Scratch;

/* With queries in the lanes a key costs as much for one as for LANES of them: about ten times what
 * it costs one query whose dimensions are in the lanes. */
#define FEW_QUERIES (LANES < 8 ? LANES : 8)

#ifndef PARTS
/* May keys or values be multiplied where they lie? */
static bool direct_keys(const Tile *t) {
    return is_real(t->k_format) && !t->k_scales && t->measure != ADDITIVE;
}
static bool direct_values(const Tile *t) { return is_real(t->v_format) && !t->v_scales; }
#endif

/* Keys or values of type `real` from the one `key` on: where they lie, or widened in the scratch. */
typedef struct {
    const real *data;
    ptrdiff_t row, dim;
} View;

/* Lay the scratch out from `base` on; returns its bytes. */
static size_t lay_out(const Tile *t, ptrdiff_t panels, char *base, Scratch *s) {
    size_t bytes = 0;
    ptrdiff_t row = panels * PANEL, pass_keys = round_up(t->pass_keys, 2 * ROW_GRAIN);
    s->out_rows = round_up(t->value_dim, ROW_GRAIN);
    s->key_rows = pass_keys;
#define TAKE(field, count)                                                                        \
    s->field = (void *)((uintptr_t)base + bytes);                                                 \
    bytes += (size_t)round_up((ptrdiff_t)sizeof *s->field * (count), 64);
    TAKE(own, 1)
    TAKE(ready, 1)
    TAKE(row_max, row)
    TAKE(row_sum, row)
    TAKE(saw, row)
    TAKE(wrong, row)
    TAKE(lost, panels * t->value_dim)
    TAKE(out, row * s->out_rows)
    TAKE(block_out, PANEL * s->out_rows)
    TAKE(bias, t->has_bias ? STRIP_KEYS * PANEL : 0)
    TAKE(more, t->head_dim > PASS_DIMS ? STRIP_KEYS * PANEL : 0)
    TAKE(seen, STRIPS * WORDS * PANEL)
#ifdef PARTS
    TAKE(q, PANEL * t->head_dim)
    TAKE(keys, t->head_dim)
    TAKE(values, t->value_dim)
    TAKE(q_parts, PARTS * row * round_up(t->head_dim, CHUNK) / 2)
    TAKE(key_parts, PARTS * pass_keys * round_up(t->head_dim, CHUNK))
    TAKE(value_parts, PARTS * pass_keys * s->out_rows)
    TAKE(value_pairs, PARTS * CHUNK / 2 * s->out_rows)
    TAKE(weight_parts, PARTS * PANEL * PASS_KEYS / 2)
    TAKE(odd_keys, PASS_KEYS / STRIP_KEYS)
    TAKE(odd_values, PASS_KEYS / STRIP_KEYS)
#else
    TAKE(q, row * round_up(t->head_dim, LANES))
    TAKE(keys, direct_keys(t) ? 0 : pass_keys * t->head_dim)
    TAKE(values, direct_values(t) ? 0 : pass_keys * t->value_dim)
    TAKE(few_rows, LANES * round_up(t->head_dim > t->value_dim ? t->head_dim : t->value_dim, LANES))
    TAKE(few_sums, FEW_QUERIES * round_up(t->value_dim, LANES))
    if (t->measure != DOT) {
        TAKE(key_columns, PANEL * t->head_dim)
        TAKE(measured, STRIP_KEYS * PANEL)
    }
    if (t->measure == ADDITIVE) {
        TAKE(weights, t->head_dim)
        TAKE(q_high, row * t->head_dim)
        TAKE(q_low, row * t->head_dim)
        TAKE(key_high, pass_keys * t->head_dim)
        TAKE(key_low, pass_keys * t->head_dim)
        TAKE(odd_queries, row)
        TAKE(odd_keys, pass_keys)
    }
#endif
    TAKE(scores, PANEL * (pass_keys < SCORE_KEYS ? pass_keys : SCORE_KEYS))
#undef TAKE
    return bytes;
}

/* What the queries of a panel see of a strip: nothing, every key, or those whose bits are set in
 * the panel's words, [WORDS][PANEL]. */
typedef enum { SEE_NONE, SEE_SOME, SEE_ALL } Seen;

/* A strip of keys for one panel: those of the STRIP_KEYS that the panel sees some of. */
typedef struct {
    ptrdiff_t key;
    int keys;
    real *scores;
    lane_int *words;
    Seen seen;
} Strip;

/* What one panel knows of the block under way. */
typedef struct {
    Strip strips[STRIPS];
    bool live; /* does it see anything? */
    vec top[TILE_VECS], sum[TILE_VECS], rescale[TILE_VECS];
} PanelBlock;

/* Does each query see key j? In the sign bits, as `choose` takes them. */
INLINE ivec sees(const Strip *strip, int n, int j) {
    if (strip->seen == SEE_ALL) return splat_int(-1);
    ivec word = *(const ivec *)(strip->words + j / LANE_BITS * PANEL + n * LANES);
    return shift_up(word, LANE_BITS - 1 - j % LANE_BITS);
}
#endif
