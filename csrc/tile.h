/* A tile: the queries that share one pass over the keys, and the kernels that carry it out.
 *
 * The queries of a tile lie in the lanes of vectors, so keys and values are read as they stand,
 * one element broadcast to all queries at a time, and softmax has no horizontal step.
 */
#ifndef FASTATTN_TILE_H
#define FASTATTN_TILE_H

#include <stddef.h>

/* Queries in a tile, as bytes of one row: 96 floats or 48 doubles, a whole number of register
 * panels for every instruction set. Twice as many as fill the widest registers, because each tile
 * reads all of K and V: 48 floats lost 5 % to the third-level cache at 4096 keys. */
#define TILE_BYTES 384
#define MAX_QUERIES (TILE_BYTES / 4)
#define MAX_PANELS 12 /* SSE2: 8 floats each */

/* Keys whose scores are summed from zero before they join the running sum. One run over all keys
 * would have 3 to 25 times NumPy's rounding error; blocks of 128 make too many partial sums. */
#define BLOCK_KEYS 512

/* The weight of a row's largest score. A power of 2, so that nothing is rounded, and large, because
 * sums of small weights would be subnormal and take a hundred times as long. */
#define WEIGHT_UNIT 16777216.0

/* How a real number lies in memory: NumPy's kind ('i', 'u', 'f', or 'b' for bfloat16) and size. */
typedef struct {
    char kind;
    int bytes, swapped;
} NumberFormat;

typedef struct {
    /* What the tile reads and writes; strides count elements. */
    const void *q[MAX_QUERIES]; /* one row per query */
    void *out[MAX_QUERIES];
    const void *k, *v; /* of the one key head that these queries read */
    ptrdiff_t q_dim, out_dim, k_key, k_dim, v_key, v_dim;
    ptrdiff_t n_queries, head_dim, value_dim;
    double scale;
    /* Added to the maximum that weights are relative to. 0, so that the largest weight is exact;
     * log(2 * number of keys * WEIGHT_UNIT) where the weighted sum of huge values would overflow. */
    double margin;

    ptrdiff_t start[MAX_QUERIES], stop[MAX_QUERIES]; /* query i sees start[i] <= j < stop[i] */

    /* Options, each by itself; a row of keys per query where they are dense, with byte strides. */
    double softcap; /* 0: none */
    int has_mask, has_bias, has_alibi, has_sinks;
    const char *mask[MAX_QUERIES], *bias[MAX_QUERIES];
    ptrdiff_t mask_key, bias_key;
    NumberFormat bias_format;
    double slope[MAX_QUERIES], sink[MAX_QUERIES];
    ptrdiff_t position[MAX_QUERIES]; /* of query i on the key axis */

    void *weights[MAX_QUERIES]; /* filled by weights() where a key is seen; 0 before */
    ptrdiff_t weights_key;
    int want_lse;
    double lse[MAX_QUERIES]; /* filled by finish, where wanted */
    void *scratch;           /* scratch_bytes of it, 64-byte aligned */

    /* Set by begin. Some query of the tile, or of one panel of it, sees first <= j < last; every
     * query of the panel sees inner_first <= j < inner_last. */
    ptrdiff_t first, last;
    struct {
        ptrdiff_t first, last, inner_first, inner_last;
        int vecs;    /* vectors in use */
        int started; /* has it attended to a block? */
    } panel[MAX_PANELS];
    int panels;
} Tile;

/* One instruction set's kernels for one dtype. */
typedef struct {
    int queries; /* the most that a tile takes */
    size_t (*scratch_bytes)(ptrdiff_t queries, ptrdiff_t head_dim, ptrdiff_t value_dim,
                            ptrdiff_t n_keys);
    void (*begin)(Tile *);
    void (*attend)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* keys of one block, blocks in order */
    int (*finish)(Tile *); /* 0: a sum overflowed; begin again with a margin */
    void (*weights)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* after finish, as attend */
    /* Independent multiply-adds only: flops done, for measuring what the machine can do. */
    double (*peak)(ptrdiff_t rounds);
} TileKernels;

#endif
