# Part of kernels.pyx: the tiles of the backward pass.

cdef struct BackwardParams:
    # The parameters of a backward pass; `call.out` is the gradient of q.
    CallParams call
    Operand grad_out, result, lse, grad_lse, rows, grad_bias, row_sums
    Operand grad_k, grad_v  # NULL, both: keys and values in pages have no gradients
    Operand coarse  # (queries): an lse beyond it is too inexact to recompute weights from
    const int64_t *key_heads  # in groups of `sharers`, each of which is one item per block of keys
    Py_ssize_t sharers
    Tickets q_tickets, k_tickets, v_tickets  # their blocks: tiles of queries, and blocks of keys
    double *grad_relative_bias  # (kv_heads, rows, group), or NULL
    Py_ssize_t relative_biases  # of a key head
    double *grad_dim_weights  # (head_dim), or NULL
    Py_ssize_t dim_weights
    int64_t *sums_ticket  # of the key heads and blocks of all items, in their order


cdef struct Row:
    # A row of scores: its weights are exp(score - lse - lse_rest), their gradients have that mean.
    double lse, lse_rest, mean


cdef inline double real_at(const CallParams *params, const char *at) noexcept nogil:
    """A number of the dtype that the kernels sum in."""
    return (<double *>at)[0] if params.kernels.real_bytes == sizeof(double) else (<float *>at)[0]


cdef bint is_coarse(
    const BackwardParams *backward, Py_ssize_t query, double lse
) noexcept nogil:
    cdef double bound = (<double *>(backward.coarse.data + query * backward.coarse.head))[0]
    return bound < fabs(lse) < INFINITY


cdef bint prepare_tile(
    const BackwardParams *backward, Tile *tile, WorkItem work, bint listen, double *last_look,
    bint *stopped,
) noexcept nogil:
    """Fill the rows of a tile. False if the call was stopped.

    A coarse lse is replaced by the one that the kernels compute, if they agree to rounding. If they
    do not, the given lse stands for more keys than this call has (as after a merge) and is kept,
    unless it is too large for any of its digits to tell their number.
    """
    cdef const CallParams *params = &backward.call
    cdef const TileKernels *kernels = work.sequence.kernels
    cdef char *grad_out = batch_ptr(params, &backward.grad_out, work.batch)
    cdef char *result = batch_ptr(params, &backward.result, work.batch)
    cdef char *lse = batch_ptr(params, &backward.lse, work.batch)
    cdef char *rows = batch_ptr(params, &backward.rows, work.batch)
    cdef Py_ssize_t value_dim = tile.value_dim, i, head, query
    cdef double eps = DBL_EPSILON if params.kernels.real_bytes == sizeof(double) else FLT_EPSILON
    cdef double apart
    cdef Row *row
    cdef bint any_coarse = False
    set_tile(params, tile, work)
    for i in range(tile.n_queries):
        head, query = head_of(params, work, i), query_of(params, work, i)
        tile.grad_out[i] = row_ptr(&backward.grad_out, grad_out, head, query)
        tile.result[i] = row_ptr(&backward.result, result, head, query)
    kernels.backward.prepare(tile)
    for i in range(tile.n_queries):
        head, query = head_of(params, work, i), query_of(params, work, i)
        row = <Row *>row_ptr(&backward.rows, rows, head, query)
        row.lse = real_at(params, row_ptr(&backward.lse, lse, head, query))
        row.lse_rest, row.mean = 0, tile.mean[i]
        any_coarse |= is_coarse(backward, query, row.lse)
    if not any_coarse:
        return True
    tile.value_dim = 0
    kernels.begin(tile)
    if not each_block(kernels.attend, kernels.block_k, tile, listen, last_look, stopped):
        return False
    kernels.backward.normalize(tile)
    tile.value_dim = value_dim
    for i in range(tile.n_queries):
        head, query = head_of(params, work, i), query_of(params, work, i)
        row = <Row *>row_ptr(&backward.rows, rows, head, query)
        apart = fabs((tile.lse[i] - row.lse) + tile.lse_rest[i])
        if is_coarse(backward, query, row.lse) and (
            apart <= 4 * eps * fabs(row.lse) or fabs(row.lse) > 1 / eps
        ):
            row.lse, row.lse_rest = tile.lse[i], tile.lse_rest[i]
    return True


cdef bint prepare_item(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Prepare the rows of one tile: an Item of BackwardParams."""
    cdef const BackwardParams *backward = <const BackwardParams *>call
    cdef WorkItem work = work_item_of(&backward.call, item)
    return prepare_tile(backward, tile, work, listen, last_look, stopped)


cdef bint differentiate_tile(
    const BackwardParams *backward, Tile *tile, WorkItem work, Py_ssize_t block, bint *stopped
) noexcept nogil:
    """One tile of queries and one block of keys, counted from the first of their sequence. False if
    the call was stopped.
    """
    cdef const CallParams *params = &backward.call
    cdef const Sequence *sequence = work.sequence
    cdef const TileKernels *kernels = sequence.kernels
    cdef Py_ssize_t begin = block * kernels.block_k, i, n, head, query
    cdef Py_ssize_t end = min(begin + kernels.block_k, sequence.n_keys)
    cdef char *grad_out = batch_ptr(params, &backward.grad_out, work.batch)
    cdef char *grad_lse = batch_ptr(params, &backward.grad_lse, work.batch)
    cdef char *rows = batch_ptr(params, &backward.rows, work.batch)
    cdef Row *row
    cdef double *sums
    cdef char *grad_bias = batch_ptr(params, &backward.grad_bias, work.batch)
    cdef char *row_sums = batch_ptr(params, &backward.row_sums, work.batch)
    cdef Py_ssize_t key_head = work.batch * params.kv_heads + work.kv_head
    cdef Py_ssize_t q_block = sequence.items_before + work.first // kernels.block_q
    cdef int64_t *counter = ticket_counter(&backward.q_tickets, key_head, q_block)
    cdef int64_t ticket = block * backward.q_tickets.sharers + backward.q_tickets.before[key_head]
    cdef bint shared = backward.q_tickets.sharers > 1, some = False
    set_tile(params, tile, work)
    for i in range(tile.n_queries):
        head, query = head_of(params, work, i), query_of(params, work, i)
        tile.grad_out[i] = row_ptr(&backward.grad_out, grad_out, head, query)
        row = <Row *>row_ptr(&backward.rows, rows, head, query)
        tile.lse[i], tile.lse_rest[i], tile.delta[i] = row.lse, row.lse_rest, row.mean
        if grad_lse is not NULL:
            tile.delta[i] -= real_at(params, row_ptr(&backward.grad_lse, grad_lse, head, query))
        if grad_bias is not NULL:
            tile.grad_bias[i] = row_ptr(&backward.grad_bias, grad_bias, head, query)
    kernels.begin(tile)
    if tile.first < end and begin < tile.last:
        some = kernels.backward.differentiate(tile, begin, end)
    elif not shared:
        return True
    # Blocks are added in their order, so that the sum does not depend on the threads.
    if (shared or tile.first < begin) and not wait_for_ticket(counter, ticket, stopped):
        return False
    if some:
        kernels.backward.add(tile)
        for i in range(tile.n_queries if row_sums is not NULL else 0):
            head, query = head_of(params, work, i), query_of(params, work, i)
            sums = <double *>row_ptr(&backward.row_sums, row_sums, head, query)
            for n in range(ROW_SUMS):
                sums[n] += tile.row_sums[i][n]
    store_release(counter, ticket + 1)
    return True


cdef bint differentiate_block(
    const BackwardParams *backward, Tile *tile, Py_ssize_t head, Py_ssize_t block, bint listen,
    double *last_look, bint *stopped,
) noexcept nogil:
    """One block of keys of one key head. False if a signal came in between."""
    cdef const CallParams *params = &backward.call
    cdef const Sequence *sequence = sequence_of(params, block, True)
    cdef const TileKernels *kernels = sequence.kernels
    cdef WorkItem work = WorkItem(sequence, head // params.kv_heads, head % params.kv_heads, 0, 0)
    cdef Py_ssize_t n
    cdef Py_ssize_t begin = (block - sequence.blocks_before) * kernels.block_k
    cdef Py_ssize_t end = min(begin + kernels.block_k, sequence.n_keys)
    cdef int64_t *k_counter
    cdef int64_t *v_counter
    tile.k, tile.v = key_ptr(params, &params.k, work), key_ptr(params, &params.v, work)
    if params.pages.data is not NULL:
        tile.pages = <int64_t *>batch_ptr(params, &params.pages, work.batch)
    kernels.backward.begin_keys(tile, begin, end)
    for n in range(sequence.num_tiles):
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        work.first = tile_rows_before(sequence, n)
        if not differentiate_tile(
            backward, tile, work, block - sequence.blocks_before, stopped
        ):
            return False
    if backward.grad_k.data is NULL:
        return True
    tile.grad_k = key_ptr(params, &backward.grad_k, work)
    tile.grad_v = key_ptr(params, &backward.grad_v, work)
    tile.adds_k = backward.k_tickets.before[head] > 0
    tile.adds_v = backward.v_tickets.before[head] > 0
    k_counter = ticket_counter(&backward.k_tickets, head, block)
    v_counter = ticket_counter(&backward.v_tickets, head, block)
    if not wait_for_ticket(k_counter, backward.k_tickets.before[head], stopped):
        return False
    if not wait_for_ticket(v_counter, backward.v_tickets.before[head], stopped):
        return False
    kernels.backward.store_keys(tile, begin, end)
    store_release(k_counter, backward.k_tickets.before[head] + 1)
    store_release(v_counter, backward.v_tickets.before[head] + 1)
    return True


cdef inline void add_sums(double *to, const double *more, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(count):
        to[n] += more[n]


cdef bint add_shared_sums(
    const BackwardParams *backward, Tile *tile, Py_ssize_t head, Py_ssize_t ticket, bint *stopped
) noexcept nogil:
    """Add what a block of a key head found for the relative bias, and for the weights of the dims.
    False if the call was stopped.
    """
    cdef Py_ssize_t first = head % backward.call.kv_heads * backward.relative_biases
    if not wait_for_ticket(backward.sums_ticket, ticket, stopped):
        return False
    if tile.wants_relative_bias:
        add_sums(
            backward.grad_relative_bias + first, tile.grad_relative_bias, backward.relative_biases
        )
    if tile.wants_dim_weights:
        add_sums(backward.grad_dim_weights, tile.grad_dim_weights, backward.dim_weights)
    store_release(backward.sums_ticket, ticket + 1)
    return True


cdef bint differentiate_item(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """One block of keys, of all key heads that share a bias, in their order: an Item of
    BackwardParams.
    """
    cdef const BackwardParams *backward = <const BackwardParams *>call
    cdef Py_ssize_t groups = backward.call.key_heads // backward.sharers
    cdef Py_ssize_t group = item // backward.call.blocks, block = item % backward.call.blocks, i
    cdef const int64_t *heads
    cdef bint shared = tile.wants_relative_bias or tile.wants_dim_weights
    cdef Py_ssize_t sums = backward.relative_biases + backward.dim_weights
    tile.grad_dim_weights = tile.grad_relative_bias + backward.relative_biases
    if backward.q_tickets.sharers > 1:  # so that an item waits only for items before it
        group, block = item % groups, item // groups
    heads = backward.key_heads + group * backward.sharers
    for i in range(backward.sharers):
        if shared:
            memset(tile.grad_relative_bias, 0, sums * sizeof(double))
        if not differentiate_block(backward, tile, heads[i], block, listen, last_look, stopped):
            return False
        if shared and not add_shared_sums(
            backward, tile, heads[i], item * backward.sharers + i, stopped
        ):
            return False
    return True
