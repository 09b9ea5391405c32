/* Attention under a sparse mask: the keys of a query are gathered, with dimensions in the lanes.
 *
 * Compiled once for each instruction set and dtype of sums, as tile.c is. The scores of a run of
 * listed keys are made at a time, then their weights, then the sum of their values. All score
 * functions are symmetric, so the same loops compare a key with the queries that see it: these make
 * the gradients of keys, each by itself. Products are scaled once they are summed, so that both
 * ways make the same scores, bit for bit.
 */
#pragma GCC diagnostic ignored "-Wunused-function" /* of what tile.c alone needs */

#include "sparse_backward-inl.h"

const SparseKernels TABLE = {
    .real_bytes = sizeof(real),
    .scratch_bytes = sparse_scratch_bytes,
    .attend = sparse_attend,
    .differentiate_queries = differentiate_queries,
    .differentiate_keys = differentiate_keys,
};
