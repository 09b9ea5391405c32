# Part of kernels.pyx: the tile of a work item, and where its results go.

cdef int init_tile(const CallParams *params, Tile *tile, cnp.ndarray relative_bias) except -1:
    """What all tiles of a call have in common, but for the dim of values, and what a reduction or
    another direction needs.
    """
    tile.k_scales, tile.v_scales, tile.pages = NULL, NULL, NULL
    tile.q_format, tile.k_format = params.q.format, params.k.format
    tile.v_format, tile.out_format = params.v.format, params.out.format
    tile.q_dim, tile.out_dim = params.q.dim, params.out.dim
    tile.k_dim, tile.k_key = params.k.dim, params.k.row
    tile.v_dim, tile.v_key = params.v.dim, params.v.row
    tile.head_dim = params.head_dim
    tile.block_k = min(params.kernels.block_k, params.n_keys)
    tile.scale, tile.softcap = params.scale, params.softcap
    tile.score_function, tile.dim_weights = params.score_function, params.dim_weights
    tile.has_mask = params.mask.data is not NULL
    tile.has_bias = params.bias.data is not NULL
    tile.has_alibi = params.alibi is not NULL
    tile.has_sinks = params.sinks is not NULL
    tile.mask_key = params.mask.dim
    tile.bias_key = params.bias.dim
    if tile.has_bias:
        tile.bias_format = params.bias.format
    tile.has_scales = params.scales is not NULL
    tile.relative_bias, tile.group = NULL, params.group
    tile.plain_relative_bias = tile.hiding_relative_bias = False
    if relative_bias is not None:
        tile.reach = relative_bias.shape[1] // 2 - MAX_LANES
        tile.plain_relative_bias = bool(
            (np.abs(relative_bias) <= np.finfo(relative_bias.dtype).max / 4).all()
        )
        tile.hiding_relative_bias = bool(np.isneginf(relative_bias).any())
    tile.weights_key = tile.top_k = 0
    tile.want_lse = tile.want_max = tile.differentiating = False
    tile.forward_mode = tile.tangents_alone = False
    tile.wants_relative_bias = tile.wants_scale = tile.wants_dim_weights = False
    tile.margin = 0
    tile.has_dropout = params.dropout.given
    tile.drop_first_key = params.dropout.offset[3]
    tile.drop_threshold = params.dropout.threshold
    tile.keep_factor = params.dropout.factor
    return 0


cdef cnp.ndarray bind_stored_keys(CallParams *params, Tile *tile, p):
    """Keys and values in pages, and those that a cache stores: with scales, two in a byte. Returns
    the block table that is read, or None.
    """
    cdef cnp.ndarray k = p.k, v = p.v, k_scales = p.k_scales, v_scales = p.v_scales
    cdef cnp.ndarray block_table = p.block_table
    bind_operand(params, &params.k_scales, k_scales, 3)
    bind_operand(params, &params.v_scales, v_scales, 3)
    tile.k_scales_key, tile.v_scales_key = params.k_scales.row, params.v_scales.row
    if k.descr.kind == ord("u"):
        tile.k_format.kind = tile.v_format.kind = ord("4")
        tile.k_dim = tile.v_dim = 1
    if block_table is None:
        return None
    block_table = np.ascontiguousarray(block_table)
    bind_operand(params, &params.pages, block_table, 1)
    tile.pages, tile.page = <const int64_t *>params.pages.data, k.shape[2]
    tile.k_page = bind_pages(params, &params.k, k)
    tile.v_page = bind_pages(params, &params.v, v)
    tile.k_scales_page = bind_pages(params, &params.k_scales, k_scales)
    tile.v_scales_page = bind_pages(params, &params.v_scales, v_scales)
    return block_table


cdef Py_ssize_t scratch_of(const CallParams *params, const Tile *tile) noexcept nogil:
    """The scratch that the tile takes which takes the most, in bytes."""
    cdef Py_ssize_t n, most = 0, bytes
    cdef const Sequence *sequence
    for n in range(params.n_sequences):
        sequence = sequence_at(params, n)
        if tile.differentiating:
            bytes = sequence.kernels.backward.scratch_bytes(tile)
        else:
            bytes = sequence.kernels.scratch_bytes(tile, queries_of_tile(params, sequence))
        most = max(most, bytes)
    return most


cdef void set_keys(const CallParams *params, Tile *tile, WorkItem work) noexcept nogil:
    """Point a tile at what its queries have in common: the keys and values of their key head."""
    tile.k, tile.v = key_ptr(params, &params.k, work), key_ptr(params, &params.v, work)
    tile.drop_first_key = params.dropout.offset[3] + work.sequence.first_key
    if params.pages.data is not NULL:
        tile.pages = <int64_t *>batch_ptr(params, &params.pages, work.batch)
    if params.k_scales.data is not NULL:
        tile.k_scales = <float *>(
            batch_ptr(params, &params.k_scales, work.batch) + work.kv_head * params.k_scales.head
        )
        tile.v_scales = <float *>(
            batch_ptr(params, &params.v_scales, work.batch) + work.kv_head * params.v_scales.head
        )
    if params.relative_bias is not NULL:
        tile.relative_bias = params.relative_bias + work.kv_head * params.relative_bias_bytes


cdef void set_tile(const CallParams *params, Tile *tile, WorkItem work) noexcept nogil:
    """Point a tile at its queries and at the keys that they attend to."""
    cdef const KeyRange *keys = &params.keys
    cdef const Sequence *sequence = work.sequence
    cdef Py_ssize_t offset = keys.offset, i, query, head, first_key = 0, last_key = sequence.n_keys
    cdef Py_ssize_t position, first, last, origin = sequence.first_key
    cdef char *offsets = batch_ptr(params, &keys.offsets, work.batch)
    cdef char *q = batch_ptr(params, &params.q, work.batch)
    cdef char *out = batch_ptr(params, &params.out, work.batch)
    cdef char *start = batch_ptr(params, &keys.start, work.batch)
    cdef char *stop = batch_ptr(params, &keys.stop, work.batch)
    cdef char *mask = batch_ptr(params, &params.mask, work.batch)
    cdef char *bias = batch_ptr(params, &params.bias, work.batch)
    cdef char *weights = batch_ptr(params, &params.weights, work.batch)
    cdef char *partial = NULL
    tile.n_queries = min(
        sequence.kernels.block_q, params.group * sequence.n_queries - work.first
    )
    tile.out_format, tile.out_dim = params.out.format, params.out.dim
    tile.has_sinks = params.sinks is not NULL and work.split == 0
    set_keys(params, tile, work)
    if sequence.num_splits > 1:
        first_key = work.split * sequence.split_keys
        last_key = min(first_key + sequence.split_keys, sequence.n_keys)
        partial = partial_ptr(params, work, work.split)
        partial += tile.n_queries * sizeof(double)
        tile.out_format.kind, tile.out_format.swapped = ord("f"), False
        tile.out_format.bytes = tile.out_dim = sequence.kernels.real_bytes
    if keys.lengths.data is not NULL:
        last_key = min(
            last_key, (<int64_t *>batch_ptr(params, &keys.lengths, work.batch))[0] - origin
        )
    query, head = query_of(params, work, 0), head_of(params, work, 0)
    for i in range(tile.n_queries):
        tile.q[i] = row_ptr(&params.q, q, head, query)
        tile.out[i] = row_ptr(&params.out, out, head, query)
        if partial is not NULL:
            tile.out[i] = partial + i * tile.value_dim * sequence.kernels.real_bytes
        if offsets is not NULL:
            offset = (<int64_t *>(offsets + query * keys.offsets.head))[0]
        position = query + offset - origin
        first = max(first_key, position - keys.left)
        last = min(last_key, position + keys.right + 1)
        if start is not NULL:
            first = max(first, (<int64_t *>row_ptr(&keys.start, start, head, query))[0] - origin)
            last = min(last, (<int64_t *>row_ptr(&keys.stop, stop, head, query))[0] - origin)
        tile.start[i] = min(first, sequence.n_keys)
        tile.stop[i] = max(last, 0)
        if mask is not NULL:
            tile.mask[i] = row_ptr(&params.mask, mask, head, query)
        if bias is not NULL:
            tile.bias[i] = row_ptr(&params.bias, bias, head, query)
        if weights is not NULL:
            tile.weights[i] = row_ptr(&params.weights, weights, head, query)
        if params.alibi is not NULL:
            tile.slope[i] = params.alibi[head]
        tile.position[i] = position
        tile.column[i] = head - work.kv_head * params.group
        if params.scales is not NULL:
            tile.scales[i] = params.scales[head]
        if params.sinks is not NULL:
            tile.sink[i] = params.sinks[head]
        if params.dropout.given:
            set_drop_words(
                tile, i, params.dropout.seed, work.batch + params.dropout.offset[0],
                head + params.dropout.offset[1], query + params.dropout.offset[2],
            )
        head += 1
        if head == (work.kv_head + 1) * params.group:
            head = work.kv_head * params.group
            query += 1


cdef char *partial_ptr(
    const CallParams *params, WorkItem work, Py_ssize_t split
) noexcept nogil:
    """The partial result of one split of a key head."""
    cdef const Sequence *sequence = work.sequence
    cdef Py_ssize_t index = work.kv_head * sequence.num_splits + split
    return (
        params.partial + work.batch * params.partial_bytes
        + sequence.partial_before + index * sequence.partial_bytes
    )


cdef void store_row(
    const CallParams *params, const Operand *operand, char *to, WorkItem work, Py_ssize_t row,
    double number,
) noexcept nogil:
    """Store the lse or the largest score of a tile's row; `to` is where those of its batch entry
    begin.
    """
    if to is not NULL:
        to = row_ptr(operand, to, head_of(params, work, row), query_of(params, work, row))
        if params.lse_bytes == sizeof(double):
            (<double *>to)[0] = number
        else:
            (<float *>to)[0] = <float>number


cdef double max_of_splits(
    const CallParams *params, WorkItem work, Py_ssize_t row, Py_ssize_t rows
) noexcept nogil:
    """The largest score of a row, from those at the end of each partial result."""
    cdef double most = -INFINITY, own
    cdef Py_ssize_t split
    for split in range(work.sequence.num_splits):
        own = (<double *>(partial_ptr(params, work, split + 1) - rows * sizeof(double)))[row]
        if own > most or own != own:
            most = own
    return most


cdef void combine_splits(const CallParams *params, Py_ssize_t value_dim) noexcept nogil:
    """Combine the partial results of each key head's splits."""
    cdef Py_ssize_t item = 0, i, rows, dim = params.out.dim
    cdef char *out
    cdef char *lse
    cdef char *max_score
    cdef WorkItem work
    while item < params.key_heads * params.items:
        work = work_item_of(params, item)
        if work.sequence.num_splits == 1:
            item += 1
            continue
        item += work.sequence.num_splits  # those of its only tile
        rows = params.group * work.sequence.n_queries
        out = batch_ptr(params, &params.out, work.batch)
        lse = batch_ptr(params, &params.lse, work.batch)
        max_score = batch_ptr(params, &params.max_score, work.batch)
        for i in range(rows):
            if max_score is not NULL:
                store_row(
                    params, &params.max_score, max_score, work, i,
                    max_of_splits(params, work, i, rows),
                )
            store_row(params, &params.lse, lse, work, i, work.sequence.kernels.combine_splits(
                partial_ptr(params, work, 0), work.sequence.num_splits,
                work.sequence.partial_bytes, rows, i, value_dim,
                row_ptr(&params.out, out, head_of(params, work, i), query_of(params, work, i)),
                dim, params.out.format,
            ))
