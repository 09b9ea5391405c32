# Part of kernels.pyx: attention under a sparse mask, and its gradients.

cdef int bind_sparse(
    SparseParams *sparse, Tile *tile, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out,
    tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale, cnp.ndarray scales,
    double softcap, cnp.ndarray bias, cnp.ndarray relative_bias, cnp.ndarray alibi,
    cnp.ndarray sinks, key_range, cnp.ndarray starts, cnp.ndarray keys, dropout, cnp.ndarray lse,
    score_function, bint double_sums,
) except -1:
    """What both directions have in common."""
    cdef CallParams *params = &sparse.call
    cdef const InstructionSet *isa = chosen()
    memset(sparse, 0, sizeof(SparseParams))
    bind_params(params, q, k, v, out, batch, heads, kv_heads, alibi, sinks, key_range, None, bias,
                dropout, scales, relative_bias)
    bind_operand(params, &params.lse, lse, 2)
    sparse.kernels = isa.sparse_float64 if double_sums else isa.sparse_float32
    params.kernels = isa.float64 if double_sums else isa.fma
    sparse.keys = sparse_lists(starts, keys)
    sparse.patterns = starts.shape[0]
    sparse.scale, sparse.item_rows = scale, SPARSE_ROWS
    init_tile(params, tile, q, k, v, out, scale, softcap, bias, relative_bias)
    tile.has_scales = False  # each head has its scale
    set_score_function(tile, score_function)
    return 0


cdef int run_sparse(
    SparseParams *sparse, Workspace *workspace, Py_ssize_t key_blocks, int threads
) except -1:
    """Run the items of all queries, and then those of all keys, if there are any."""
    cdef CallParams *params = &sparse.call
    cdef Py_ssize_t blocks = ceil_div(params.n_queries, sparse.item_rows), distances = 0
    cdef Py_ssize_t items = params.key_heads * params.group * blocks
    cdef int64_t ticket = 0
    threads = available_threads(min(threads, max(1, items, key_blocks)))
    sparse.head_bytes = padded(sparse.kernels.scratch_bytes(&workspace.prototype))
    sparse.ticket = &ticket
    if sparse.grad_relative_bias is not NULL:
        workspace.prototype.wants_relative_bias = True
        distances = 2 * workspace.prototype.reach + 1
    workspace.rows = 1  # no query has anything of its own in the tile
    allocate_workspace(
        workspace, threads,
        sparse.head_bytes + max(1, params.group) * <Py_ssize_t>sizeof(SparseHead),
        distances * <Py_ssize_t>sizeof(double), 0,
    )
    try:
        with nogil:
            if parallel_for(sparse_queries, sparse, workspace, items, threads):
                parallel_for(sparse_keys, sparse, workspace, key_blocks, threads)
        if PyErr_Occurred() is not NULL:
            return -1
    finally:
        free(workspace.allocated)
    return 0


def attend_sparse(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray k_scales, cnp.ndarray v_scales, cnp.ndarray out not None, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, double scale, cnp.ndarray scales, double softcap,
    cnp.ndarray bias, cnp.ndarray relative_bias, cnp.ndarray alibi, cnp.ndarray sinks, key_range,
    cnp.ndarray starts not None, cnp.ndarray keys not None, cnp.ndarray block_table, dropout,
    cnp.ndarray lse, cnp.ndarray max_score, cnp.ndarray weights, cnp.ndarray sums, score_function,
    int threads,
):
    """As `attend`, under the sparse mask of `starts`, int64 (patterns, queries + 1), and `keys`,
    int32 or int64: see `fastattn.core.sparse_mask.SparseMask`. `lse` and `max_score` have the dtype
    of sums.
    """
    cdef SparseParams sparse
    cdef CallParams *params = &sparse.call
    cdef bint double_sums = out.descr.itemsize == 8
    cdef Workspace workspace
    cdef Tile *tile = &workspace.prototype
    bind_sparse(
        &sparse, tile, q, k, v, out, batch, heads, kv_heads, scale, scales, softcap, bias,
        relative_bias, alibi, sinks, key_range, starts, keys, dropout, lse, score_function,
        double_sums,
    )
    bind_operand(params, &params.max_score, max_score, 2)
    bind_operand(params, &params.weights, weights, 3)
    bind_stored_keys(params, tile, k, v, k_scales, v_scales, block_table)
    tile.value_dim = out.shape[out.ndim - 1]
    tile.weights_key = params.weights.dim
    bind_reduction(params, sums, None)
    if sums is not None:  # all queries of a head add to its sums in their order
        sparse.item_rows = max(1, params.n_queries)
    run_sparse(&sparse, &workspace, 0, threads)


def differentiate_sparse(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray out not None, cnp.ndarray lse not None, cnp.ndarray grad_out not None,
    cnp.ndarray grad_lse, cnp.ndarray rows not None, double coarse,
    cnp.ndarray grad_q not None, cnp.ndarray grad_k not None, cnp.ndarray grad_v not None,
    tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale, cnp.ndarray scales,
    double softcap, cnp.ndarray bias, cnp.ndarray relative_bias, cnp.ndarray alibi,
    cnp.ndarray sinks, key_range, cnp.ndarray starts not None, cnp.ndarray keys not None, dropout,
    score_function, int threads, cnp.ndarray grad_bias, cnp.ndarray grad_relative_bias,
    cnp.ndarray row_sums, bint wants_scale,
):
    """As `differentiate`, under the sparse mask of `attend_sparse`. No gradient may broadcast along
    the batch, the heads or the rows, but that of the relative bias: each row of one is written by
    one thread. `grad_q` and `grad_bias` have the dtype of sums.
    """
    cdef SparseParams sparse
    cdef bint double_sums = grad_q.descr.itemsize == 8
    cdef Workspace workspace
    cdef Tile *tile = &workspace.prototype
    cdef Py_ssize_t blocks
    bind_sparse(
        &sparse, tile, q, k, v, grad_q, batch, heads, kv_heads, scale, scales, softcap, bias,
        relative_bias, alibi, sinks, key_range, starts, keys, dropout, lse, score_function,
        double_sums,
    )
    key_starts, queries = transposed(starts, keys, k.shape[k.ndim - 2])
    sparse.queries = sparse_lists(key_starts, queries)
    bind_operand(&sparse.call, &sparse.grad_out, grad_out, 3)
    bind_operand(&sparse.call, &sparse.result, out, 3)
    bind_operand(&sparse.call, &sparse.grad_lse, grad_lse, 2)
    bind_operand(&sparse.call, &sparse.rows, rows, 3)
    bind_operand(&sparse.call, &sparse.grad_k, grad_k, 3)
    bind_operand(&sparse.call, &sparse.grad_v, grad_v, 3)
    bind_operand(&sparse.call, &sparse.grad_bias, grad_bias, 3)
    bind_operand(&sparse.call, &sparse.row_sums, row_sums, 3)
    if grad_relative_bias is not None:
        sparse.grad_relative_bias = <double *>cnp.PyArray_DATA(grad_relative_bias)
    sparse.coarse = coarse
    tile.differentiating, tile.wants_scale = True, wants_scale
    tile.grad_out_format = number_format(grad_out)
    tile.grad_out_dim, tile.result_dim = sparse.grad_out.dim, sparse.result.dim
    tile.grad_k_format, tile.grad_v_format = number_format(grad_k), number_format(grad_v)
    tile.grad_k_key, tile.grad_v_key = sparse.grad_k.row, sparse.grad_v.row
    blocks = sparse.call.key_heads * ceil_div(sparse.call.n_keys, SPARSE_ROWS)
    run_sparse(&sparse, &workspace, blocks, threads)
