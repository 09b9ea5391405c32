# Part of kernels.pyx: attention under a sparse mask, and its gradients.

cdef int bind_sparse(
    SparseParams *sparse, Tile *tile, p, cnp.ndarray out, cnp.ndarray lse, cnp.ndarray scales,
    cnp.ndarray relative_bias, bint double_sums,
) except -1:
    """What both directions have in common."""
    cdef CallParams *params = &sparse.call
    cdef const InstructionSet *isa = chosen()
    memset(sparse, 0, sizeof(SparseParams))
    cdef cnp.ndarray v = p.v, starts = p.mask.starts
    bind_problem(params, p, out, scales, relative_bias)
    bind_operand(params, &params.lse, lse, 2)
    sparse.kernels = isa.sparse_float64 if double_sums else isa.sparse_float32
    params.kernels = isa.float64 if double_sums else isa.fma
    sparse.keys = sparse_lists(starts, p.mask.keys)
    sparse.patterns = starts.shape[0]
    sparse.item_rows = SPARSE_ROWS
    init_tile(params, tile, relative_bias)
    tile.value_dim = v.shape[v.ndim - 1]
    tile.has_scales = False  # each head has its scale
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
    p, int threads, cnp.ndarray out not None, cnp.ndarray lse=None, cnp.ndarray max_score=None,
    cnp.ndarray weights=None, cnp.ndarray sums=None, cnp.ndarray relative_bias=None,
):
    """As `attend`, where the mask of `p` is a `fastattn.core.sparse_mask.SparseMask`. `lse` and
    `max_score` have the dtype of sums.
    """
    cdef SparseParams sparse
    cdef CallParams *params = &sparse.call
    cdef Workspace workspace
    cdef Tile *tile = &workspace.prototype
    cdef cnp.ndarray scales = scales_of(p, False)
    bind_sparse(&sparse, tile, p, out, lse, scales, relative_bias, out.descr.itemsize == 8)
    bind_operand(params, &params.max_score, max_score, 2)
    bind_operand(params, &params.weights, weights, 3)
    block_table = bind_stored_keys(params, tile, p)
    tile.value_dim = out.shape[out.ndim - 1]
    tile.weights_key = params.weights.dim
    bind_reduction(params, sums, None)
    if sums is not None:  # all queries of a head add to its sums in their order
        sparse.item_rows = max(1, params.n_queries)
    run_sparse(&sparse, &workspace, 0, threads)


def differentiate_sparse(
    b, int threads, cnp.ndarray rows not None, cnp.ndarray grad_q not None,
    cnp.ndarray grad_k not None, cnp.ndarray grad_v not None, cnp.ndarray grad_bias=None,
    cnp.ndarray row_sums=None, cnp.ndarray relative_bias=None,
    cnp.ndarray grad_relative_bias=None,
):
    """As `differentiate`, under a sparse mask. No gradient may broadcast along the batch, the heads
    or the rows, but that of the relative bias: each row of one is written by one thread. `grad_q`
    and `grad_bias` have the dtype of sums.
    """
    cdef SparseParams sparse
    cdef Workspace workspace
    cdef Tile *tile = &workspace.prototype
    cdef Py_ssize_t blocks
    p = b.problem
    cdef bint wants_scale = b.wants("scale")
    cdef cnp.ndarray scales = scales_of(p, wants_scale)
    bind_sparse(&sparse, tile, p, grad_q, b.lse, scales, relative_bias, grad_q.descr.itemsize == 8)
    key_starts, queries = transposed(p.mask.starts, p.mask.keys, p.n_keys)
    sparse.queries = sparse_lists(key_starts, queries)
    bind_operand(&sparse.call, &sparse.grad_out, b.grad_out, 3)
    bind_operand(&sparse.call, &sparse.result, b.out, 3)
    bind_operand(&sparse.call, &sparse.grad_lse, b.grad_lse, 2)
    bind_operand(&sparse.call, &sparse.rows, rows, 3)
    bind_operand(&sparse.call, &sparse.grad_k, grad_k, 3)
    bind_operand(&sparse.call, &sparse.grad_v, grad_v, 3)
    bind_operand(&sparse.call, &sparse.grad_bias, grad_bias, 3)
    bind_operand(&sparse.call, &sparse.row_sums, row_sums, 3)
    if grad_relative_bias is not None:
        sparse.grad_relative_bias = <double *>cnp.PyArray_DATA(grad_relative_bias)
    sparse.coarse = b.coarse()
    tile.differentiating, tile.wants_scale = True, wants_scale
    tile.grad_out_format = sparse.grad_out.format
    tile.grad_out_dim, tile.result_dim = sparse.grad_out.dim, sparse.result.dim
    tile.grad_k_format, tile.grad_v_format = sparse.grad_k.format, sparse.grad_v.format
    tile.grad_k_key, tile.grad_v_key = sparse.grad_k.row, sparse.grad_v.row
    blocks = sparse.call.key_heads * ceil_div(sparse.call.n_keys, SPARSE_ROWS)
    run_sparse(&sparse, &workspace, blocks, threads)
