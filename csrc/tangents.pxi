# Part of kernels.pyx: forward mode.

cdef struct ForwardModeCall:
    # A forward pass with tangents; `params.out` is the result, or its tangent alone.
    CallParams params
    Operand d_q, d_k, d_v, d_out, d_lse
    Workspace workspace
    Py_ssize_t items, scratch_bytes
    int threads


cdef bint push_tile(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """The results of one tile's queries and their tangents: an Item of ForwardModeCall."""
    cdef const ForwardModeCall *forward = <const ForwardModeCall *>call
    cdef const CallParams *params = &forward.params
    cdef WorkItem work = work_item_of(params, item)
    cdef const TileKernels *kernels = work.sequence.kernels
    cdef char *d_q = batch_ptr(params, &forward.d_q, work.batch)
    cdef char *d_out = batch_ptr(params, &forward.d_out, work.batch)
    cdef char *d_lse = batch_ptr(params, &forward.d_lse, work.batch)
    cdef char *lse = batch_ptr(params, &params.lse, work.batch)
    cdef Py_ssize_t i, head, query
    set_tile(params, tile, work)
    for i in range(tile.n_queries):
        head, query = head_of(params, work, i), query_of(params, work, i)
        if tile.has_d_q:
            tile.d_q[i] = row_ptr(&forward.d_q, d_q, head, query)
        tile.d_out[i] = row_ptr(&forward.d_out, d_out, head, query)
    if tile.has_d_k:
        tile.d_k = key_ptr(params, &forward.d_k, work)
    if tile.has_d_v:
        tile.d_v = key_ptr(params, &forward.d_v, work)
    tile.margin = 0
    while True:
        kernels.begin(tile)
        if not each_block(kernels.attend, kernels.block_k, tile, listen, last_look, stopped):
            return False
        if kernels.finish(tile):
            break
        tile.margin = log(2 * work.sequence.n_keys * WEIGHT_UNIT)
    for i in range(tile.n_queries):
        store_row(params, &params.lse, lse, work, i, tile.lse[i])
        store_row(params, &forward.d_lse, d_lse, work, i, tile.d_lse[i])
    return True


cdef int run_push(ForwardModeCall *call) except -1:
    """Run all tiles. An interruption skips the rest and raises."""
    allocate_workspace(&call.workspace, call.threads, call.scratch_bytes, 0, 0)
    with nogil:
        parallel_for(push_tile, call, &call.workspace, call.items, call.threads)
        free(call.workspace.allocated)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def push_forward(
    p, str compute_dtype, int threads, cnp.ndarray d_q, cnp.ndarray d_k, cnp.ndarray d_v,
    cnp.ndarray out, cnp.ndarray lse, cnp.ndarray d_out not None, cnp.ndarray d_lse not None,
    cnp.ndarray relative_bias,
):
    """Fill `d_out` and `d_lse` with the tangents of the results of `p`, a
    `fastattn.core.problem.Problem`, along those of its q, k and v, None for zeros; and unless they
    are None `out`, of the strides of `d_out`, and `lse`.

    `d_q`, `d_k` and `d_v` have the shapes of their arrays, and dtypes that the kernels sum in, or
    narrower floats. The rest is as for `attend`.
    """
    cdef ForwardModeCall forward
    cdef CallParams *params = &forward.params
    cdef Tile *tile = &forward.workspace.prototype
    cdef cnp.ndarray v = p.v, scales = scales_of(p, False)
    cdef Py_ssize_t value_dim = v.shape[v.ndim - 1]
    cdef bint dot = False  # of the kernels for dot products, multiply-adds alone have tangents
    bind_problem(params, p, d_out if out is None else out, scales, relative_bias)
    bind_operand(params, &params.lse, lse, 2)
    params.lse_bytes = d_lse.itemsize
    bind_operand(params, &forward.d_q, d_q, 3)
    bind_operand(params, &forward.d_k, d_k, 3)
    bind_operand(params, &forward.d_v, d_v, 3)
    bind_operand(params, &forward.d_out, d_out, 3)
    bind_operand(params, &forward.d_lse, d_lse, 2)
    params.kernels = kernels_for(
        compute_dtype, params.group * params.n_queries, params.head_dim, value_dim, dot
    )
    sequences = cut_sequences(params, p.packing, compute_dtype, value_dim, dot, False, False)
    forward.items = params.key_heads * params.items
    if forward.items == 0:
        return
    forward.threads = available_threads(min(threads, forward.items))
    init_tile(params, tile, relative_bias)
    tile.value_dim = value_dim
    tile.want_lse, tile.forward_mode, tile.tangents_alone = lse is not None, True, out is None
    tile.has_d_q, tile.has_d_k, tile.has_d_v = d_q is not None, d_k is not None, d_v is not None
    if d_q is not None:
        tile.d_q_format, tile.d_q_dim = forward.d_q.format, forward.d_q.dim
    if d_k is not None:
        tile.d_k_format = forward.d_k.format
        tile.d_k_key, tile.d_k_dim = forward.d_k.row, forward.d_k.dim
    if d_v is not None:
        tile.d_v_format = forward.d_v.format
        tile.d_v_key, tile.d_v_dim = forward.d_v.row, forward.d_v.dim
    forward.workspace.rows = tile_rows(params)
    forward.scratch_bytes = scratch_of(params, tile)
    run_push(&forward)
