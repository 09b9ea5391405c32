/* Kernels of sparse masks: a row of scores is a query and the keys that are listed for it. */
#ifndef FASTATTN_SPARSE_H
#define FASTATTN_SPARSE_H

#include "tile.h"

/* Lists of indices, ascending: that of row i is items[starts[i]] to items[starts[i + 1] - 1]. */
typedef struct {
    const int64_t *starts;
    const char *items;
    int item_bytes;
    int64_t count; /* of all items */
} SparseLists;

/* What a query's weights are made of, and what it got: a row of doubles for each query. */
typedef struct {
    double lse, lse_rest, mean; /* weights are exp(score - lse - lse_rest); of their gradients */
} SparseRow;

/* One head of one batch entry: the rows of each operand by base pointer and byte stride. The
 * formats of their numbers, and what all heads have in common, are those of the Tile. */
typedef struct {
    const char *q, *k, *v, *bias;
    ptrdiff_t q_row, bias_row;
    const char *k_scales, *v_scales; /* floats */
    /* The column of the head in Tile.relative_bias; or NULL. */
    const void *relative_bias;
    /* Query i sees the keys j of its list with i + offset - left <= j <= i + offset + right,
     * j < length and start[i] <= j < stop[i]. */
    ptrdiff_t left, right, offset, length;
    const char *start, *stop; /* int64, or NULL */
    ptrdiff_t start_row, stop_row;
    double scale, slope, sink;
    uint32_t drop_key[2]; /* of dropout, and the index of the first query */
    uint64_t drop_first_query;
    char *out, *weights, *lse, *max_score; /* each may be NULL */
    ptrdiff_t out_row, weights_row, lse_row, max_score_row;
    /* For weight maps: the weights are added to those of the cells, [bin_rows][bin_columns], that
     * the queries and keys are split into; or NULL. */
    double *bins;
    ptrdiff_t bin_rows, bin_columns, n_queries, n_keys;
    /* Of a backward pass, besides: `lse` is given, and out_* are those of the gradient of q. */
    const char *grad_out, *result, *grad_lse;
    ptrdiff_t grad_out_row, result_row, grad_lse_row;
    double coarse; /* an lse of this size or more is computed again */
    SparseRow *rows;
    double (*row_sums)[ROW_SUMS]; /* as in the Tile; or NULL */
    char *grad_bias;              /* `real` numbers, or NULL */
    ptrdiff_t grad_bias_row, grad_bias_key;
    char *grad_k, *grad_v;
} SparseHead;

/* One instruction set's kernels for one dtype of sums. Rows, or keys, are `begin` to `end - 1`. */
typedef struct {
    int real_bytes;
    size_t (*scratch_bytes)(const Tile *);
    void (*attend)(Tile *, const SparseHead *, const SparseLists *keys, ptrdiff_t begin,
                   ptrdiff_t end);
    /* The gradients of queries, after which those of keys can be had from all heads of a group. In
     * Tile.grad_relative_bias is that of one head: element `reach + n` is for keys n places before
     * the query. */
    void (*differentiate_queries)(Tile *, const SparseHead *, const SparseLists *keys,
                                  ptrdiff_t begin, ptrdiff_t end);
    void (*differentiate_keys)(Tile *, const SparseHead *heads, ptrdiff_t group,
                               const SparseLists *queries, ptrdiff_t begin, ptrdiff_t end);
} SparseKernels;

#endif
