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


cdef int take_forward_operands(Plan plan, CallParams *params) except -1:
    """The inputs and outputs of a plan, in the order of its arrays."""
    cdef int n = 1
    plan.take_input(&params.q)
    plan.take_input(&params.k)
    plan.take_input(&params.v)
    if params.pages.data is not NULL:
        plan.take_input(&params.pages)
        plan.take_input(&params.keys.lengths)
        plan.take_input(&params.keys.offsets)
    if params.k_scales.data is not NULL:
        plan.take_input(&params.k_scales)
        plan.take_input(&params.v_scales)
    plan.take_output(0, &params.out)
    if params.lse.data is not NULL:
        plan.take_output(n, &params.lse)
        n += 1
    if params.max_score.data is not NULL:
        plan.take_output(n, &params.max_score)
    return 0


def attend(
    p, str compute_dtype, int threads, cnp.ndarray out not None, cnp.ndarray lse=None,
    cnp.ndarray max_score=None, cnp.ndarray weights=None, cnp.ndarray sums=None,
    cnp.ndarray indices=None, cnp.ndarray relative_bias=None, Plan plan=None,
):
    """Run the forward pass of `p`, a `fastattn.core.problem.Problem`, which nothing is checked of.

    Fill `out`, (batch, heads, queries, value_dim), and unless None `lse`, `max_score` and
    `weights`. `lse` and `max_score`, (batch, heads, queries), are float32 or float64; `weights`,
    (batch, heads, queries, keys), must be zero before. `compute_dtype` is a NumPy character: see
    `compute_dtype_of`. `relative_bias` is that of `p` as (kv_heads, rows, group): see
    `Tile.relative_bias`.

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
    cdef Py_ssize_t value_dim = out.shape[out.ndim - 1]
    cdef cnp.ndarray v = p.v, scales = scales_of(p, False)
    cdef cnp.ndarray order = p.key_range.longest_first(p.batch)
    call.shared_bytes = 0
    bind_problem(params, p, out, scales, relative_bias)
    bind_operand(params, &params.weights, weights, 3)
    bind_operand(params, &params.lse, lse, 2)
    bind_operand(params, &params.max_score, max_score, 2)
    params.lse_bytes = 0
    for array in (lse, max_score):
        if array is not None:
            params.lse_bytes = array.itemsize
    if order is not None:
        params.order = <const int64_t *>cnp.PyArray_DATA(order)
    cdef bint dot = params.score_function == DOT
    params.kernels = kernels_for(
        compute_dtype, params.group * params.n_queries, params.head_dim, v.shape[v.ndim - 1],
        dot,
    )
    bind_reduction(params, sums, indices)
    sequences = cut_sequences(
        params, p.packing, compute_dtype, value_dim, dot, False, weights is None and sums is None
    )
    call.items = params.key_heads * params.items
    if call.items == 0 and plan is None:
        return
    call.threads = available_threads(min(threads, call.items))

    init_tile(params, tile, relative_bias)
    tile.value_dim = value_dim
    block_table = bind_stored_keys(params, tile, p)
    init_tile_reduction(params, tile)
    tile.weights_key = params.weights.dim
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
    plan.kept = read_by_plans(p), scales, relative_bias, order, sequences
    plan.take_threads(&call.threads, call.items)
    take_forward_operands(plan, params)
