# Part of kernels.pyx: the forward pass.

ctypedef void (*Step)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef bint each_block(
    Step step, Py_ssize_t keys, Tile *tile, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Take each block of keys that the tile attends to. False if a signal came in between."""
    cdef Py_ssize_t key = tile.first // keys * keys
    while key < tile.last:
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        step(tile, max(key, tile.first // SUB_BLOCK_K * SUB_BLOCK_K), min(key + keys, tile.last))
        key += keys
    return True


cdef bint attend_tile(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Attend from the queries of one tile: an Item of CallParams."""
    cdef const CallParams *params = <const CallParams *>call
    cdef WorkItem work = work_item_of(params, item)
    cdef const Sequence *sequence = work.sequence
    cdef const TileKernels *kernels = sequence.kernels
    cdef Py_ssize_t keys = kernels.block_k, i
    cdef char *lse = batch_ptr(params, &params.lse, work.batch)
    cdef char *max_score = batch_ptr(params, &params.max_score, work.batch)
    cdef char *partial
    cdef Py_ssize_t bytes
    cdef Step second_pass = NULL  # over the scores, once their sums are known
    cdef bint done
    if params.reduction.sums is not NULL:
        second_pass = kernels.accumulate_bins
    elif params.reduction.top_k:
        second_pass = kernels.collect_top_k
    elif params.weights.data is not NULL:
        second_pass = kernels.weights
    set_tile(params, tile, work)
    set_tile_reduction(params, tile, work)
    tile.margin = 0
    while True:
        kernels.begin(tile)
        if not each_block(kernels.attend, keys, tile, listen, last_look, stopped):
            return False
        done = kernels.finish(tile)
        if second_pass is not NULL:
            if not each_block(second_pass, keys, tile, listen, last_look, stopped):
                return False
            if params.reduction.top_k:
                kernels.rank_top_k(tile)
        if done:
            break
        tile.margin = log(2 * sequence.n_keys * WEIGHT_UNIT)
    if sequence.num_splits > 1:
        partial = partial_ptr(params, work, work.split)
        bytes = tile.n_queries * sizeof(double)
        memcpy(partial, tile.lse, bytes)
        if tile.want_max:
            memcpy(partial + sequence.partial_bytes - bytes, tile.max_score, bytes)
        return True
    for i in range(tile.n_queries if lse is not NULL else 0):
        store_row(params, &params.lse, lse, work, i, tile.lse[i])
    for i in range(tile.n_queries if max_score is not NULL else 0):
        store_row(params, &params.max_score, max_score, work, i, tile.max_score[i])
    if params.reduction.sums is not NULL:
        return ordered_add(params, tile, work, listen, last_look, stopped)
    return True


cdef struct ForwardCall:
    # A forward pass that is ready to run.
    CallParams params
    Workspace workspace
    Py_ssize_t items, scratch_bytes, shared_bytes
    int threads


cdef int run_forward(void *forward) except -1:
    """Run all tiles of a ForwardCall. An interruption skips the rest and raises."""
    cdef ForwardCall *call = <ForwardCall *>forward
    cdef CallParams *params = &call.params
    cdef Workspace *workspace = &call.workspace
    cdef char *shared
    if call.items == 0:
        return 0
    shared = allocate_workspace(
        workspace, call.threads, call.scratch_bytes, reduction_bytes(params), call.shared_bytes
    )
    params.partial = shared
    if params.reduction.sums is not NULL:
        params.reduction.tickets = <int64_t *>shared
        memset(shared, 0, call.shared_bytes)
    with nogil:
        if parallel_for(attend_tile, params, workspace, call.items, call.threads):
            if params.partial_bytes > 0:
                combine_splits(params, workspace.prototype.value_dim)
        free(workspace.allocated)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def attend(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray out not None, cnp.ndarray lse, cnp.ndarray max_score,
    cnp.ndarray k_scales, cnp.ndarray v_scales, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, key_range, cnp.ndarray mask,
    cnp.ndarray weights, cnp.ndarray order, str compute_dtype, int threads,
    score_function, cnp.ndarray sums, cnp.ndarray indices, cnp.ndarray block_table, dropout,
    cnp.ndarray scales, cnp.ndarray relative_bias, cnp.ndarray sequences, Plan plan=None,
):
    """Fill `out`, (batch, heads, queries, value_dim), and each of `lse` and `weights` unless None.

    `q`, `k` and `v` each have a dtype of their own: float16, bfloat16, float32, or float64 if the
    kernels sum in that. With `block_table`, contiguous int64 (batch, pages), `k` and `v` are
    pools, (n_pages, kv_heads, page, dim). They may also be float8_e4m3fn, or with `k_scales` and
    `v_scales`, float32 (..., keys, groups) and contiguous, int8 or uint8, which is int4. `lse`,
    (batch, heads, queries), is float32 or float64; `weights`, (batch, heads, queries, keys), must
    be zero before. `key_range` is a `KeyRange`; `alibi` and `sinks` are contiguous float64;
    `softcap` is 0 for none. `order`, int64, is the order in which the flattened batch entries
    are taken. `compute_dtype` is a NumPy character: see `compute_dtype_of`. `score_function` is
    None for dot products, else a pair of its name and its weights. `dropout` is None or a
    `Dropout`. `scales` are those of the heads, contiguous float64, beside a `scale` of 1.
    `relative_bias` is (kv_heads, rows, group) as of `Tile.relative_bias`. `max_score` is filled
    as `lse` is, unless None. `sequences` says where those are that lie end to end, if any: see
    `cut_sequences`. All arguments must have been validated: nothing is checked here.

    With `sums`, contiguous float64 (batch, heads, rows, columns), the weights are added to it, in
    bins of queries x keys. With `indices`, int64 (batch, heads, queries, n) with a contiguous last
    axis, and `weights` of that shape, these are the n largest weights of each query; a query with
    fewer visible keys gets -1 and 0 for the rest. For either, `out` has a value_dim of 0 and the
    dtype of sums.

    With a `plan` nothing is computed: it is prepared to do so.
    """
    cdef ForwardCall own
    cdef ForwardCall *call = &own
    if plan is not None:
        call = <ForwardCall *>plan.begin(sizeof(ForwardCall), run_forward)
    cdef CallParams *params = &call.params
    cdef Tile *tile = &call.workspace.prototype
    call.shared_bytes = 0
    bind_params(
        params, q, k, v, out, batch, heads, kv_heads, alibi, sinks, key_range, mask, bias,
        dropout, scales, relative_bias,
    )
    bind_operand(params, &params.weights, weights, 3)
    bind_operand(params, &params.lse, lse, 2)
    bind_operand(params, &params.max_score, max_score, 2)
    params.lse_bytes = 0
    for array in (lse, max_score):
        if array is not None:
            params.lse_bytes = array.itemsize
    if order is not None:
        params.order = <const int64_t *>cnp.PyArray_DATA(order)
    params.kernels = kernels_for(
        compute_dtype, params.group * params.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1],
        score_function is None,
    )
    bind_reduction(params, sums, indices)
    kept = cut_sequences(
        params, sequences, compute_dtype, q.shape[q.ndim - 1], out.shape[out.ndim - 1],
        score_function is None, False, weights is None and sums is None,
    )
    call.items = params.key_heads * params.items
    if call.items == 0 and plan is None:
        return
    call.threads = available_threads(min(threads, call.items))

    init_tile(params, tile, q, k, v, out, scale, softcap, bias, relative_bias)
    tile.value_dim = out.shape[out.ndim - 1]
    bind_stored_keys(params, tile, k, v, k_scales, v_scales, block_table)
    init_tile_reduction(params, tile)
    tile.weights_key = params.weights.dim
    set_score_function(tile, score_function)
    tile.want_lse, tile.want_max = lse is not None, max_score is not None
    if params.partial_bytes > 0:
        tile.want_lse = True
        call.shared_bytes = params.key_heads // params.kv_heads * params.partial_bytes
    if sums is not None:
        call.shared_bytes = params.key_heads * <Py_ssize_t>sizeof(int64_t)
    call.workspace.rows = tile_rows(params)
    call.scratch_bytes = scratch_of(params, tile)
    if plan is None:
        run_forward(call)
        return
    plan.kept = plan.kept, kept
    plan.take_threads(&call.threads, call.items)
    plan.take_input(&params.q)
    plan.take_input(&params.k)
    plan.take_input(&params.v)
    if block_table is not None:
        plan.take_input(&params.pages)
        plan.take_input(&params.keys.lengths)
        plan.take_input(&params.keys.offsets)
    if k_scales is not None:
        plan.take_input(&params.k_scales)
        plan.take_input(&params.v_scales)
    plan.take_output(0, &params.out)
    if lse is not None:
        plan.take_output(1, &params.lse)
    if max_score is not None:
        plan.take_output(1 + (lse is not None), &params.max_score)
