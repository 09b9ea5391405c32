/* A tile: the queries that share one pass over the keys, and the kernels that carry it out.
 *
 * The queries of a tile lie in the lanes of vectors, so keys and values are read one element
 * broadcast to all queries at a time, and softmax has no horizontal step.
 */
#ifndef FASTATTN_TILE_H
#define FASTATTN_TILE_H

#include <stddef.h>
#include <stdint.h>

#include "philox.h"
#include "tile_sizes.h"

/* The weight of a row's largest score. A power of 2, so that nothing is rounded, and large, because
 * sums of small weights would be subnormal and take a hundred times as long. */
#define WEIGHT_UNIT 16777216.0

/* How a real number lies in memory: NumPy's kind ('i', 'u', 'f', or 'b' for bfloat16) and size. */
typedef struct {
    char kind;
    int bytes, swapped;
} NumberFormat;

/* How a query and a key compare: by q . k, |q - k|, the weighted sum of tanh(q + k), or |q - k|^2.
 */
typedef enum { DOT, DISTANCE, ADDITIVE, SQUARED_DISTANCE } ScoreFunction;

/* A key that may be one of a query's strongest. */
typedef struct {
    double score;
    ptrdiff_t key;
} Candidate;

typedef struct {
    /* What the tile reads and writes; all strides count bytes. */
    const char *q[MAX_BLOCK_Q]; /* one row per query */
    char *out[MAX_BLOCK_Q];
    const char *k, *v;                /* of the one key head that these queries read */
    const float *k_scales, *v_scales; /* one per key that its numbers are multiplied by; or NULL */
    NumberFormat q_format, k_format, v_format, out_format; /* out_format also of weights */
    ptrdiff_t q_dim, out_dim, k_key, k_dim, v_key, v_dim;
    ptrdiff_t n_queries, head_dim, value_dim;
    ptrdiff_t block_k; /* the most keys of one block: no more than there are */
    double scale;
    ScoreFunction score_function;
    const double *dim_weights; /* of ADDITIVE, one per dimension */
    /* Added to the maximum that weights are relative to. 0, so that the largest weight is exact,
     * but in a second run, for the results that overflowed in the first: those of huge values, and
     * of scores out of range. */
    double margin;
    int check_range; /* set by begin: scores may be out of range, and are looked at one by one */

    ptrdiff_t start[MAX_BLOCK_Q], stop[MAX_BLOCK_Q]; /* query i sees start[i] <= j < stop[i] */

    /* Options, each by itself; a row of keys per query where they are dense. */
    double softcap; /* 0: none */
    int has_mask, has_bias, has_alibi, has_sinks;
    const char *mask[MAX_BLOCK_Q], *bias[MAX_BLOCK_Q];
    ptrdiff_t mask_key, bias_key;
    NumberFormat bias_format;
    double slope[MAX_BLOCK_Q], sink[MAX_BLOCK_Q];
    ptrdiff_t position[MAX_BLOCK_Q]; /* of query i on the key axis */

    /* Dropout: see dropout-inl.h. Of each query the two words of its head's key and those of its
     * index; the index of the first key; a number below drop_threshold drops its weight. */
    int has_dropout;
    uint32_t drop_threshold, drop_words[4][MAX_BLOCK_Q];
    uint64_t drop_first_key;
    double keep_factor; /* 1 without dropout */

    char *weights[MAX_BLOCK_Q]; /* filled by weights() where a key is visible; 0 before */
    ptrdiff_t weights_key;
    int want_lse;
    double lse[MAX_BLOCK_Q];      /* filled by finish, where wanted */
    double lse_rest[MAX_BLOCK_Q]; /* for gradients: what is missing in `lse` */
    void *scratch;                /* scratch_bytes of it, 64-byte aligned */

    /* For gradients: those of the results, and what the weights' mean takes off every score's.
     * Those of queries go to `out`, all of type `real` with contiguous rows. */
    int differentiating;
    const char *grad_out[MAX_BLOCK_Q], *result[MAX_BLOCK_Q];
    NumberFormat grad_out_format; /* of both */
    ptrdiff_t grad_out_dim, result_dim;
    double mean[MAX_BLOCK_Q]; /* of the weights' gradients, filled by prepare */
    double delta[MAX_BLOCK_Q];
    char *grad_k, *grad_v; /* of the key head, without gaps between the dims */
    NumberFormat grad_k_format, grad_v_format;
    ptrdiff_t grad_k_key, grad_v_key;
    int adds_k, adds_v; /* to what is there, or fills it? */
    /* That of the bias is added to: a `real` row of keys per query, or a `double` one where queries
     * share it. */
    int wants_bias, wants_sums, rows_share_bias;
    char *grad_bias[MAX_BLOCK_Q];
    /* Of each query, filled by differentiate where wanted: its weights and the gradients of its
     * scores summed, and both times the distance of the key, which is 0 without alibi. */
    double row_sums[MAX_BLOCK_Q][4];

    /* For maps of the weights: accumulate_bins adds those of a query to its row of `bins`, a column
     * for each of the runs that the keys are split into, as bin_of says. */
    double *bins;          /* [slot][bin_row], with room for a vector behind the last column */
    int slot[MAX_BLOCK_Q]; /* of the query; less than 0 behind the last */
    ptrdiff_t bin_row, columns, n_keys;

    /* For the top k keys: collect_top_k() keeps top_k of them for each query, and rank_top_k()
     * writes them to `keys` and, of out_format, `weights`. */
    Candidate *heaps; /* [query][top_k], a heap with the least at its root */
    ptrdiff_t top_k;
    double top_k_threshold[MAX_BLOCK_Q]; /* no score below it is among theirs */
    int64_t *keys[MAX_BLOCK_Q];

    /* Set by begin. Some query of the tile, or of one micropanel of it, sees first <= j < last;
     * every query of the micropanel sees inner_first <= j < inner_last. */
    ptrdiff_t first, last;
    struct {
        ptrdiff_t first, last, inner_first, inner_last;
        int vecs;         /* vectors in use */
        int has_output;   /* does `out` hold the sum of a block? */
        uint64_t special; /* bits of the queries that the products cannot take */
        /* Set by finish: bits of the queries that a second run is for, and among these of those
         * whose scores it makes again, not only sums of values. */
        uint64_t rerun, rerun_scores;
    } micropanel[MAX_MICROPANELS];
    int micropanels;
    /* Queries are multiplied by q_scale; a score is score_scale times the product, or times what
     * another score function gives, metric_scale included; weights are 2**(exponent * (score -
     * maximum)). */
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

/* Which of `bins` runs of nearly equal length has element i of n: run b begins at b * n / bins. */
static inline ptrdiff_t bin_of(ptrdiff_t i, ptrdiff_t n, ptrdiff_t bins) {
    return ((i + 1) * bins - 1) / n;
}

/* Gradients: `prepare` each tile of queries; after `begin` and a forward pass of no values
 * `normalize` fills lse and lse_rest. For a block of keys, `begin_keys`, `differentiate` each tile
 * of queries after `begin` and then add to the gradients of the queries, and `store_keys`. */
typedef struct {
    size_t (*scratch_bytes)(const Tile *);
    void (*prepare)(Tile *);
    void (*normalize)(Tile *);
    void (*begin_keys)(Tile *, ptrdiff_t begin, ptrdiff_t end);
    int (*differentiate)(Tile *, ptrdiff_t begin,
                         ptrdiff_t end); /* 0: no key is visible to any query */
    void (*add)(Tile *);
    void (*store_keys)(Tile *, ptrdiff_t begin, ptrdiff_t end);
} BackwardKernels;

/* One instruction set's kernels for one dtype. */
typedef struct {
    int block_q, mr, block_k; /* the most that a tile, a micropanel and one call of attend take */
    size_t (*scratch_bytes)(const Tile *, ptrdiff_t queries);
    void (*begin)(Tile *);
    void (*attend)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* keys of one block, in order */
    int (*finish)(Tile *); /* 0: something overflowed; begin again with a margin after all below */
    void (*weights)(Tile *, ptrdiff_t begin, ptrdiff_t end);         /* after finish, as attend */
    void (*accumulate_bins)(Tile *, ptrdiff_t begin, ptrdiff_t end); /* likewise */
    void (*collect_top_k)(Tile *, ptrdiff_t begin, ptrdiff_t end);   /* likewise */
    void (*rank_top_k)(Tile *);                                      /* after collect_top_k */
    /* One row of attention to all keys from `splits` of them, each at partial + split * bytes: an
     * lse for each of `rows` rows, then their `real` results. Overwrites the lse; returns that of
     * all. */
    double (*combine_splits)(char *partial, ptrdiff_t splits, ptrdiff_t bytes, ptrdiff_t rows,
                             ptrdiff_t row, ptrdiff_t value_dim, char *out, ptrdiff_t out_dim,
                             NumberFormat format);
    int real_bytes;
    const BackwardKernels *backward; /* NULL: take those of another table */
    /* Independent multiply-adds only: flops done, for measuring what the machine can do. */
    double (*peak)(ptrdiff_t rounds);
} TileKernels;

#endif
