# Part of kernels.pyx: reductions of the weights, to sums over bins or to the top k of each query.

cdef int bind_reduction(CallParams *params, cnp.ndarray sums, cnp.ndarray indices) except -1:
    """Read `sums` and `indices`, (batch, heads, ...) or None, once the other parameters are set."""
    cdef WeightReduction *reduction = &params.reduction
    cdef Py_ssize_t queries, rows
    if sums is not None and params.n_queries > 0:
        reduction.sums = <double *>cnp.PyArray_DATA(sums)
        reduction.rows, reduction.columns = sums.shape[sums.ndim - 2], sums.shape[sums.ndim - 1]
        queries = min(params.n_queries, (params.kernels.block_q - 1) // params.group + 2)
        rows = (queries - 1) * reduction.rows // params.n_queries + 2
        reduction.slots = min(reduction.rows, rows) * params.group
    bind_operand(params, &reduction.indices, indices, 3)
    if indices is not None:
        reduction.top_k = indices.shape[indices.ndim - 1]
    return 0


cdef Py_ssize_t reduction_bytes(const CallParams *params) noexcept nogil:
    """The scratch that the reduction takes in each thread."""
    cdef const WeightReduction *reduction = &params.reduction
    cdef Py_ssize_t bytes = 0
    cdef Py_ssize_t queries = min(params.kernels.block_q, params.group * params.n_queries)
    if reduction.sums is not NULL:
        bytes = reduction.slots * (reduction.columns + MAX_LANES) * <Py_ssize_t>sizeof(double)
    if reduction.top_k:
        bytes = queries * reduction.top_k * <Py_ssize_t>sizeof(Candidate)
    return bytes


cdef void init_tile_reduction(const CallParams *params, Tile *tile) noexcept nogil:
    """What all tiles of a call have in common for a reduction."""
    tile.bin_row = params.reduction.columns + MAX_LANES
    tile.columns, tile.n_keys = params.reduction.columns, params.n_keys
    tile.top_k = params.reduction.top_k


cdef void set_tile_reduction(const CallParams *params, Tile *tile, WorkItem work) noexcept nogil:
    """Prepare a tile for a reduction, after `set_tile`."""
    cdef const WeightReduction *reduction = &params.reduction
    cdef Py_ssize_t i, first, query, head
    cdef char *indices
    if reduction.sums is not NULL:
        first = bin_of(work.first // params.group, params.n_queries, reduction.rows)
        for i in range(tile_rows(params)):
            tile.slot[i] = -1
            if i < tile.n_queries:
                query, head = (work.first + i) // params.group, (work.first + i) % params.group
                tile.slot[i] = (
                    (bin_of(query, params.n_queries, reduction.rows) - first) * params.group + head
                )
        memset(tile.bins, 0, reduction.slots * tile.bin_row * sizeof(double))
    if reduction.top_k:
        indices = batch_ptr(params, &reduction.indices, work.batch)
        for i in range(tile.n_queries):
            query, head = (work.first + i) // params.group, (work.first + i) % params.group
            tile.keys[i] = <int64_t *>row_ptr(
                &reduction.indices, indices, work.kv_head * params.group + head, query
            )


cdef void add_bins(const CallParams *params, const Tile *tile, WorkItem work) noexcept nogil:
    """Add the bins of a tile to the sums."""
    cdef const WeightReduction *reduction = &params.reduction
    cdef Py_ssize_t slot, head, row, column, first, last
    cdef const double *bins
    cdef double *sums
    if tile.last <= tile.first:
        return
    first = bin_of(tile.first, params.n_keys, reduction.columns)
    last = bin_of(tile.last - 1, params.n_keys, reduction.columns)
    row = bin_of(work.first // params.group, params.n_queries, reduction.rows)
    head = (work.batch * params.kv_heads + work.kv_head) * params.group
    for slot in range(reduction.slots):
        if slot > 0 and slot % params.group == 0:
            row += 1
        if row == reduction.rows:
            break
        bins = tile.bins + slot * tile.bin_row
        sums = reduction.sums + reduction.columns * (
            (head + slot % params.group) * reduction.rows + row
        )
        for column in range(first, last + 1):
            sums[column] += bins[column]


cdef bint ordered_add(
    const CallParams *params, const Tile *tile, WorkItem work, bint listen, double *last_look,
    bint *stopped,
) noexcept nogil:
    """Add the bins of a key head's tiles in order, so that the sums do not depend on the threads.
    False if a signal came in between.
    """
    cdef int64_t *counter = params.reduction.tickets + work.batch * params.kv_heads + work.kv_head
    cdef int64_t ticket = work.sequence.num_tiles - 1 - work.first // params.kernels.block_q
    while load_acquire(counter) < ticket:
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        sched_yield()
    add_bins(params, tile, work)
    store_release(counter, ticket + 1)
    return True
