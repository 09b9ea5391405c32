# Part of kernels.pyx: the work items of a sparse mask, both directions.

# Queries, or keys, of a work item.
cdef enum:
    SPARSE_ROWS = 256

# Entries after which a call looks for signals.
cdef enum:
    SPARSE_ENTRIES = 1 << 15


cdef struct SparseParams:
    # The parameters of either direction; `call.out` is the gradient of q in a backward pass.
    CallParams call
    const SparseKernels *kernels
    SparseLists keys, queries  # of each pattern, one after another: of queries, of keys
    Py_ssize_t patterns  # 1, or one for each entry of the last axis of the batch
    Operand grad_out, result, grad_lse, rows, grad_k, grad_v, grad_bias, row_sums
    double coarse
    Py_ssize_t item_rows  # queries of a work item
    double *grad_relative_bias  # (kv_heads, rows, group) as Tile.relative_bias, or NULL
    int64_t *ticket  # of the item that is next to add to it
    Py_ssize_t head_bytes  # offset of a thread's SparseHeads in its scratch


cdef void set_head(
    const SparseParams *sparse, SparseHead *h, Py_ssize_t batch, Py_ssize_t head
) noexcept nogil:
    cdef const CallParams *params = &sparse.call
    cdef const KeyRange *keys = &params.keys
    cdef Py_ssize_t kv_head = head // params.group
    h.q = row_ptr(&params.q, batch_ptr(params, &params.q, batch), head, 0)
    h.k = row_ptr(&params.k, batch_ptr(params, &params.k, batch), kv_head, 0)
    h.v = row_ptr(&params.v, batch_ptr(params, &params.v, batch), kv_head, 0)
    h.bias = sparse_rows(params, &params.bias, batch, head)
    h.q_row, h.bias_row = params.q.row, params.bias.row
    h.k_scales = sparse_rows(params, &params.k_scales, batch, kv_head)
    h.v_scales = sparse_rows(params, &params.v_scales, batch, kv_head)
    h.relative_bias = NULL
    if params.relative_bias is not NULL:
        h.relative_bias = (
            params.relative_bias + kv_head * params.relative_bias_bytes
            + head % params.group * sparse.kernels.real_bytes
        )
    h.left, h.right, h.offset, h.length = keys.left, keys.right, keys.offset, params.n_keys
    if keys.offsets.data is not NULL:
        h.offset = (<int64_t *>batch_ptr(params, &keys.offsets, batch))[0]
    if keys.lengths.data is not NULL:
        h.length = (<int64_t *>batch_ptr(params, &keys.lengths, batch))[0]
    h.start = sparse_rows(params, &keys.start, batch, head)
    h.stop = sparse_rows(params, &keys.stop, batch, head)
    h.start_row, h.stop_row = keys.start.row, keys.stop.row
    h.scale = params.scale if params.scales is NULL else params.scales[head]
    h.slope = 0 if params.alibi is NULL else params.alibi[head]
    h.sink = 0 if params.sinks is NULL else params.sinks[head]
    if params.dropout.given:
        philox_key_of(
            params.dropout.seed, batch + params.dropout.offset[0], head + params.dropout.offset[1],
            h.drop_key,
        )
        h.drop_first_query = params.dropout.offset[2]
    h.out = sparse_rows(params, &params.out, batch, head)
    h.weights = sparse_rows(params, &params.weights, batch, head)
    h.lse = sparse_rows(params, &params.lse, batch, head)
    h.max_score = sparse_rows(params, &params.max_score, batch, head)
    h.out_row, h.weights_row, h.lse_row = params.out.row, params.weights.row, params.lse.row
    h.max_score_row = params.max_score.row
    h.bins = NULL
    if params.reduction.sums is not NULL:
        h.bin_rows, h.bin_columns = params.reduction.rows, params.reduction.columns
        h.n_queries, h.n_keys = params.n_queries, params.n_keys
        h.bins = params.reduction.sums + (
            (batch * params.kv_heads * params.group + head) * h.bin_rows * h.bin_columns
        )
    h.grad_out = sparse_rows(params, &sparse.grad_out, batch, head)
    h.result = sparse_rows(params, &sparse.result, batch, head)
    h.grad_lse = sparse_rows(params, &sparse.grad_lse, batch, head)
    h.grad_out_row, h.result_row = sparse.grad_out.row, sparse.result.row
    h.grad_lse_row = sparse.grad_lse.row
    h.coarse = sparse.coarse
    h.rows = <SparseRow *>sparse_rows(params, &sparse.rows, batch, head)
    h.row_sums = <double (*)[ROW_SUMS]>sparse_rows(params, &sparse.row_sums, batch, head)
    h.grad_bias = sparse_rows(params, &sparse.grad_bias, batch, head)
    h.grad_bias_row, h.grad_bias_key = sparse.grad_bias.row, sparse.grad_bias.dim
    h.grad_k = sparse_rows(params, &sparse.grad_k, batch, kv_head)
    h.grad_v = sparse_rows(params, &sparse.grad_v, batch, kv_head)


cdef inline char *sparse_rows(
    const CallParams *params, const Operand *operand, Py_ssize_t batch, Py_ssize_t head
) noexcept nogil:
    """The rows of a head, or NULL if the operand was not given."""
    if operand.data is NULL:
        return NULL
    return row_ptr(operand, batch_ptr(params, operand, batch), head, 0)


cdef SparseLists lists_of(
    const SparseParams *sparse, const SparseLists *lists, Py_ssize_t rows, Py_ssize_t batch
) noexcept nogil:
    """The lists of a batch entry, of so many rows."""
    cdef SparseLists own = lists[0]
    if sparse.patterns > 1:
        own.starts += batch % sparse.patterns * (rows + 1)
    return own


cdef Py_ssize_t next_rows(
    const SparseLists *lists, Py_ssize_t row, Py_ssize_t end, bint listen, double *last_look,
    bint *stopped,
) noexcept nogil:
    """The end of the rows to take next, or -1 if the call was stopped."""
    cdef Py_ssize_t last = row + 1
    if stopped[0] or (listen and interrupted(last_look)):
        return -1
    while last < end and lists.starts[last + 1] - lists.starts[row] <= SPARSE_ENTRIES:
        last += 1
    return last


cdef struct Places:
    Py_ssize_t first, end


cdef inline Py_ssize_t places_before(
    const Tile *tile, const SparseHead *head, Py_ssize_t query, Py_ssize_t key
) noexcept nogil:
    """Where a pair is in Tile.grad_relative_bias."""
    return max(-tile.reach, min(query + head.offset - key, tile.reach)) + tile.reach


cdef Places touched_distances(
    const Tile *tile, const SparseHead *head, const SparseLists *keys, Py_ssize_t row,
    Py_ssize_t end,
) noexcept nogil:
    """The part of Tile.grad_relative_bias that some queries may add to."""
    cdef Places touched
    cdef Py_ssize_t first, last
    touched.first, touched.end = 2 * tile.reach + 1, 0
    for row in range(row, end):
        if keys.starts[row] < keys.starts[row + 1]:
            first = sparse_item(keys, keys.starts[row])
            last = sparse_item(keys, keys.starts[row + 1] - 1)
            touched.first = min(touched.first, places_before(tile, head, row, last))
            touched.end = max(touched.end, places_before(tile, head, row, first) + 1)
    touched.first = min(touched.first, touched.end)
    return touched


cdef bint add_to_relative_bias(
    const SparseParams *sparse, const Tile *tile, Py_ssize_t kv_head, Py_ssize_t group,
    Places touched, Py_ssize_t ticket, bint *stopped,
) noexcept nogil:
    """Add what an item found, in the order of the items. False if the call was stopped."""
    cdef Py_ssize_t n, row = tile.group
    cdef double *to = sparse.grad_relative_bias
    to += (kv_head * (2 * (tile.reach + MAX_LANES) + 1) + MAX_LANES) * row + group
    if not wait_for_ticket(sparse.ticket, ticket, stopped):
        return False
    for n in range(touched.first, touched.end):
        to[n * row] += tile.grad_relative_bias[n]
    store_release(sparse.ticket, ticket + 1)
    return True


cdef bint sparse_queries(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Some queries of one head, in either direction: an Item of SparseParams."""
    cdef const SparseParams *sparse = <const SparseParams *>call
    cdef const CallParams *params = &sparse.call
    cdef SparseHead *head = <SparseHead *>(<char *>tile.scratch + sparse.head_bytes)
    cdef Py_ssize_t group = item % params.group, row, last, end
    cdef Py_ssize_t blocks = ceil_div(params.n_queries, sparse.item_rows), ticket = item
    cdef Py_ssize_t kv_head, batch
    cdef SparseLists keys
    cdef Places touched
    item //= params.group  # so that successive items read the same keys
    row = item % blocks * sparse.item_rows
    kv_head, batch = item // blocks % params.kv_heads, item // blocks // params.kv_heads
    end = min(row + sparse.item_rows, params.n_queries)
    set_head(sparse, head, batch, kv_head * params.group + group)
    keys = lists_of(sparse, &sparse.keys, params.n_queries, batch)
    if params.pages.data is not NULL:
        tile.pages = <int64_t *>batch_ptr(params, &params.pages, batch)
    if tile.wants_relative_bias:
        touched = touched_distances(tile, head, &keys, row, end)
        memset(
            tile.grad_relative_bias + touched.first, 0,
            (touched.end - touched.first) * sizeof(double),
        )
    while row < end:
        last = next_rows(&keys, row, end, listen, last_look, stopped)
        if last < 0:
            return False
        if tile.differentiating:
            sparse.kernels.differentiate_queries(tile, head, &keys, row, last)
        else:
            sparse.kernels.attend(tile, head, &keys, row, last)
        row = last
    return not tile.wants_relative_bias or add_to_relative_bias(
        sparse, tile, kv_head, group, touched, ticket, stopped
    )


cdef bint sparse_keys(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """The gradients of some keys of one key head: an Item of SparseParams."""
    cdef const SparseParams *sparse = <const SparseParams *>call
    cdef const CallParams *params = &sparse.call
    cdef SparseHead *heads = <SparseHead *>(<char *>tile.scratch + sparse.head_bytes)
    cdef Py_ssize_t blocks = ceil_div(params.n_keys, SPARSE_ROWS), n, last
    cdef Py_ssize_t row = item % blocks * SPARSE_ROWS, end = min(row + SPARSE_ROWS, params.n_keys)
    cdef Py_ssize_t kv_head = item // blocks % params.kv_heads
    cdef Py_ssize_t batch = item // blocks // params.kv_heads
    cdef SparseLists queries = lists_of(sparse, &sparse.queries, params.n_keys, batch)
    for n in range(params.group):
        set_head(sparse, &heads[n], batch, kv_head * params.group + n)
    while row < end:
        last = next_rows(&queries, row, end, listen, last_look, stopped)
        if last < 0:
            return False
        sparse.kernels.differentiate_keys(tile, heads, params.group, &queries, row, last)
        row = last
    return True


cdef SparseLists sparse_lists(cnp.ndarray starts, cnp.ndarray items):
    cdef SparseLists lists
    lists.starts = <const int64_t *>cnp.PyArray_DATA(starts)
    lists.items = <const char *>cnp.PyArray_DATA(items)
    lists.item_bytes = items.descr.itemsize
    lists.count = len(items)
    return lists


def transposed(cnp.ndarray starts not None, cnp.ndarray keys not None, Py_ssize_t n_keys):
    """The queries of each key, ascending, as ``(starts, queries)`` of the same form."""
    cdef Py_ssize_t patterns = starts.shape[0], n_queries = starts.shape[1] - 1, p, i, j, at
    cdef cnp.ndarray counts = np.zeros((patterns, n_keys + 1), np.int64)
    cdef cnp.ndarray queries = np.empty(len(keys), np.int32 if n_queries < 1 << 31 else np.int64)
    cdef SparseLists lists = sparse_lists(starts, keys)
    cdef int64_t *count = <int64_t *>cnp.PyArray_DATA(counts)
    cdef char *query = <char *>cnp.PyArray_DATA(queries)
    cdef int64_t *place
    cdef int query_bytes = queries.descr.itemsize
    cdef int64_t before = 0, own
    with nogil:
        for p in range(patterns):
            place = count + p * (n_keys + 1)
            for at in range(lists.starts[0], lists.starts[n_queries]):
                place[sparse_item(&lists, at)] += 1
            for j in range(n_keys + 1):  # where the queries of each key begin
                own = place[j]
                place[j] = before
                before += own
            for i in range(n_queries):
                for at in range(lists.starts[i], lists.starts[i + 1]):
                    j = sparse_item(&lists, at)
                    if query_bytes == 4:
                        (<int32_t *>query)[place[j]] = <int32_t>i
                    else:
                        (<int64_t *>query)[place[j]] = i
                    place[j] += 1
            for j in range(n_keys, 0, -1):  # each begins where the one before it has ended
                place[j] = place[j - 1]
            place[0] = lists.starts[0]
            lists.starts += n_queries + 1
    return counts, queries


cdef inline Py_ssize_t sparse_item(const SparseLists *lists, Py_ssize_t at) noexcept nogil:
    if lists.item_bytes == 4:
        return (<const int32_t *>lists.items)[at]
    return (<const int64_t *>lists.items)[at]
