/* A tile, the queries that share one pass over the keys, and the interface of its kernels.
 *
 * The queries of a tile are in the lanes of vectors: each element of K and V is broadcast to all
 * queries, and the softmax has no horizontal step. The head of tile.c has the loop nest and a
 * glossary. */
#ifndef FASTATTN_TILE_H
#define FASTATTN_TILE_H

#include <stddef.h>
#include <stdint.h>

#include "philox.h"
#include "tile_sizes.h"

/* The weight of a row's largest score. A power of 2, which rounds nothing, and large, because sums
 * of small weights would be subnormal, and a hundred times as slow. */
#define WEIGHT_UNIT 16777216.0

/* How a real number lies in memory: NumPy's kind ('i', 'u', 'f', or 'b' for bfloat16) and size. Of
 * keys and values also '8' for float8_e4m3fn, and '4' for two in a byte, the even dim in its lower
 * half, each plus 8. */
#define INT4_GROUP 32 /* dims that share a scale */
typedef struct {
    char kind;
    int bytes, swapped;
} NumberFormat;

/* The score of a query and a key: q . k, |q - k|, the weighted sum of tanh(q + k), or |q - k|^2. */
typedef enum { DOT, DISTANCE, ADDITIVE, SQUARED_DISTANCE } ScoreFunction;

/* A key that may be one of a query's top k. */
typedef struct {
    double score;
    ptrdiff_t key;
} Candidate;

#define ROW_SUMS 6

/* What is said of "query i" is an array with an element for each query: lay_out_rows allocates
 * them. */
typedef struct {
    /* Operands and results. All strides are in bytes. */
    const char **q; /* one row per query */
    char **out;
    const char *k, *v;                                     /* of the key head */
    const float *k_scales, *v_scales;                      /* factors of each key; or NULL */
    NumberFormat q_format, k_format, v_format, out_format; /* out_format is also that of weights */
    ptrdiff_t q_dim, out_dim, k_key, k_dim, v_key, v_dim, k_scales_key, v_scales_key;
    /* Key j is row j % page of page pages[j / page], these `k_page` bytes apart. NULL: keys and
     * values are in one piece. */
    const int64_t *pages;
    ptrdiff_t page, k_page, v_page, k_scales_page, v_scales_page;
    ptrdiff_t n_queries, head_dim, value_dim;
    ptrdiff_t block_k; /* keys in a block, at most those of the call */
    double scale;
    ScoreFunction score_function;
    const double *dim_weights; /* of ADDITIVE, one per dim */
    /* Added to row_max. It is 0, so that the largest weight is exact, except in the rerun of a tile
     * whose results overflowed. */
    double margin;
    int check_range; /* set by begin: scores may be out of range, so check each */

    ptrdiff_t *start, *stop; /* keys start[i] <= j < stop[i] are visible */

    /* Options. Those of queries x keys have a row of keys for each query. */
    double softcap; /* 0: none */
    int has_mask, has_bias, has_alibi, has_sinks;
    const char **mask, **bias;
    ptrdiff_t mask_key, bias_key;
    NumberFormat bias_format;
    double *slope, *sink;
    ptrdiff_t *position; /* of query i on the key axis */
    int has_scales;      /* scores are multiplied by those of their queries, and `scale` is 1 */
    double *scales;
    /* The relative bias of the key head, of type `real`; NULL: none. Row `reach + MAX_LANES + n` of
     * [2 * (reach + MAX_LANES) + 1][group] is for keys n places before the query, and a column for
     * each query head of the group. Rows outside -reach..reach repeat the last ones, so that the
     * queries of a vector, whose heads take turns, find theirs one after another. */
    const void *relative_bias;
    ptrdiff_t reach, group;
    ptrdiff_t *column;                             /* of query i: its head within the group */
    int plain_relative_bias, hiding_relative_bias; /* are all far from overflow? is some -inf? */

    /* Dropout: see dropout-inl.h. Of each query the two words of its head's key and those of its
     * index; the index of the first key; a number below drop_threshold drops its weight. */
    int has_dropout;
    uint32_t drop_threshold, *drop_words[4];
    uint64_t drop_first_key;
    double keep_factor; /* 1 without dropout */

    char **weights; /* filled by weights() where a key is visible; zero before */
    ptrdiff_t weights_key;
    int want_lse;
    double *lse; /* filled by finish if want_lse */
    int want_max;
    double *max_score; /* filled by finish if want_max: without the sink */

    /* Forward mode, by multiply-adds and for dot products: the tangents of queries, keys and values
     * that have some, of type `real`, narrower floats or halves. finish also fills d_out, with dims
     * as far apart as those of `out`, and d_lse; with `tangents_alone` it does not fill `out`. */
    int forward_mode, has_d_q, has_d_k, has_d_v, tangents_alone;
    const char **d_q, *d_k, *d_v;
    NumberFormat d_q_format, d_k_format, d_v_format;
    ptrdiff_t d_q_dim, d_k_key, d_k_dim, d_v_key, d_v_dim;
    char **d_out;
    double *d_lse;
    double *lse_rest;  /* for gradients: what the rounding of lse lost */
    void *scratch;     /* of scratch_bytes, 64-byte aligned */

    /* For gradients: the results and their gradients, and `delta`, which is subtracted from the
     * gradients of the weights. The gradients of the queries are added to `out`, of type `real`
     * with contiguous rows. */
    int differentiating;
    const char **grad_out, **result;
    NumberFormat grad_out_format; /* also of `result` */
    ptrdiff_t grad_out_dim, result_dim;
    double *mean; /* of the gradients of the weights, filled by prepare */
    double *delta;
    char *grad_k, *grad_v; /* of the key head, with contiguous dims */
    NumberFormat grad_k_format, grad_v_format;
    ptrdiff_t grad_k_key, grad_v_key;
    int adds_k, adds_v; /* add to the gradients of keys and values, or overwrite them? */
    /* The gradient of the bias is added to: a `real` row of keys for each query, or a `double` one
     * if queries share it. */
    int wants_bias, wants_relative_bias, wants_sums, wants_scale, rows_share_bias;
    char **grad_bias;
    double *grad_relative_bias; /* of the layout of relative_bias; added to */
    int wants_dim_weights;
    double *grad_dim_weights; /* added to, for a `scale` of 1 */
    /* If wants_sums, filled by differentiate for each query: the sums of its weights and of the
     * gradients of its scores, and both sums weighted with the distance of the key, which is 0
     * without alibi; then, if wants_scale, both weighted with the score's derivative by its scale.
     */
    double (*row_sums)[ROW_SUMS];

    /* For weight maps: accumulate_bins adds the weights of a query to its row of `bins`, in a
     * column for each of the runs that the keys are split into: see bin_of. */
    double *bins; /* [slot][bin_row], with room for a vector after the last column */
    int *slot;    /* of the query; -1 after the last query */
    ptrdiff_t bin_row, columns, n_keys;

    /* For the top k: collect_top_k keeps top_k keys of each query, and rank_top_k writes them to
     * `keys` and their weights to `weights`. */
    Candidate *heaps; /* [query][top_k], heaps with the least score at the root */
    ptrdiff_t top_k;
    double *top_k_threshold; /* no score below it is among the top k */
    int64_t **keys;

    /* Set by begin: some key of first <= j < last is visible to some query of the tile, or of a
     * micropanel; keys inner_first <= j < inner_last are in the key ranges of all queries of it. */
    ptrdiff_t first, last;
    struct {
        ptrdiff_t first, last, inner_first, inner_last;
        int vecs;         /* in use */
        int has_output;   /* has a block been added to `out`? */
        uint64_t special; /* bits of the queries that the engine cannot represent */
        /* Set by finish: bits of the queries to rerun, and of those among them whose scores are to
         * be computed again too, not only sums of values. */
        uint64_t rerun, rerun_scores;
    } micropanel[MAX_MICROPANELS];
    int micropanels;
    /* Queries are multiplied by q_scale. A score is score_scale times the dot product, or times the
     * metric, which includes metric_scale. A weight is 2**(exponent * (score - row_max)). */
    double q_scale, metric_scale, score_scale, exponent;
} Tile;

/* Set the drop_words of the tile's query i. */
static inline void set_drop_words(Tile *t, ptrdiff_t i, uint64_t seed, uint64_t entry,
                                  uint64_t head, uint64_t query) {
    uint32_t key[2];
    philox_key_of(seed, entry, head, key);
    t->drop_words[0][i] = key[0];
    t->drop_words[1][i] = key[1];
    t->drop_words[2][i] = (uint32_t)query;
    t->drop_words[3][i] = (uint32_t)(query >> 32);
}

/* Lay out the arrays of a tile at `base`, for as many queries as `rows`: those of whole
 * micropanels. Returns their size in bytes. */
static inline size_t lay_out_rows(Tile *t, ptrdiff_t rows, char *base) {
    size_t bytes = 0;
#define TAKE(field)                                                                                \
    t->field = (void *)((uintptr_t)base + bytes);                                                  \
    bytes += (sizeof *t->field * (size_t)rows + 63) / 64 * 64;
    TAKE(q)
    TAKE(out)
    TAKE(start)
    TAKE(stop)
    TAKE(mask)
    TAKE(bias)
    TAKE(slope)
    TAKE(sink)
    TAKE(position)
    TAKE(scales)
    TAKE(column)
    for (int w = 0; w < 4; w++) {
        TAKE(drop_words[w])
    }
    TAKE(weights)
    TAKE(lse)
    TAKE(max_score)
    TAKE(d_q)
    TAKE(d_out)
    TAKE(d_lse)
    TAKE(lse_rest)
    TAKE(grad_out)
    TAKE(result)
    TAKE(mean)
    TAKE(delta)
    TAKE(grad_bias)
    TAKE(row_sums)
    TAKE(slot)
    TAKE(top_k_threshold)
    TAKE(keys)
#undef TAKE
    return bytes;
}

/* The bin of element i, if n elements are split into bins of nearly equal length: bin b begins at b
 * * n / bins. */
static inline ptrdiff_t bin_of(ptrdiff_t i, ptrdiff_t n, ptrdiff_t bins) {
    return ((i + 1) * bins - 1) / n;
}

/* The kernels of the backward pass, in the order of their calls. */
typedef struct {
    size_t (*scratch_bytes)(const Tile *);
    void (*prepare)(Tile *); /* each tile: fills `mean` */
    /* A tile whose lse is to be computed again, after `begin` and `attend` with a value_dim of 0:
     * fills lse and lse_rest. */
    void (*normalize)(Tile *);
    /* Each block of keys, before and after its tiles. */
    void (*begin_keys)(Tile *, ptrdiff_t begin, ptrdiff_t end);
    void (*store_keys)(Tile *, ptrdiff_t begin, ptrdiff_t end);
    /* Each tile of a block, after `begin`; returns 0 if no key is visible. */
    int (*differentiate)(Tile *, ptrdiff_t begin, ptrdiff_t end);
    void (*add)(Tile *); /* then, unless it is 0: to the gradients of the queries */
} BackwardKernels;

/* The kernels of one instruction set and dtype. */
typedef struct {
    int block_q, mr, block_k; /* queries in a tile and in a micropanel, keys in a block */
    size_t (*scratch_bytes)(const Tile *, ptrdiff_t queries);
    void (*begin)(Tile *);
    void (*attend)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* one block of keys; in order */
    int (*finish)(Tile *); /* returns 0 if results overflowed: after the kernels below, begin again
                              with a margin */
    void (*weights)(Tile *, ptrdiff_t begin,
                    ptrdiff_t end); /* after finish, for each block as attend */
    void (*accumulate_bins)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* likewise */
    void (*collect_top_k)(Tile *, ptrdiff_t begin, ptrdiff_t end);   /* likewise */
    void (*rank_top_k)(Tile *);                                      /* after collect_top_k */
    /* Combine the partial results of one row. Each split is at partial + split * bytes: the lse of
     * `rows` rows, then their `real` results. Overwrites these lse; returns that of all keys. */
    double (*combine_splits)(char *partial, ptrdiff_t splits, ptrdiff_t bytes, ptrdiff_t rows,
                             ptrdiff_t row, ptrdiff_t value_dim, char *out, ptrdiff_t out_dim,
                             NumberFormat format);
    int real_bytes;
    const BackwardKernels *backward; /* NULL: use those of another table */
    /* For the peak FLOP/s: see matmul.h. */
    double (*peak)(ptrdiff_t rounds);
} TileKernels;

#endif
