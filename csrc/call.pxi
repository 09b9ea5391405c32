# Part of kernels.pyx: the parameters of a call, and the tile of each work item.

cdef struct Operand:
    # An array of (batch, heads, rows, dims): base pointer and byte strides. NULL if not given.
    char *data
    NumberFormat format
    Py_ssize_t head, row, dim
    Py_ssize_t batch[64]  # one stride per batch axis, 0 where it broadcasts


# An unbounded side of a window. Adding a position to it does not overflow.
cdef Py_ssize_t UNBOUNDED = <Py_ssize_t>1 << 62


cdef inline Py_ssize_t ceil_div(Py_ssize_t n, Py_ssize_t d) noexcept nogil:
    return (n + d - 1) // d


cdef struct KeyRange:
    # fastattn.core.visibility.KeyRange, as each tile reads it. Arrays are NULL if not given.
    Py_ssize_t left, right, offset
    Operand offsets, lengths, start, stop  # `offsets` replaces `offset`


cdef struct WeightReduction:
    # What the weights are reduced to: their sums over bins of queries x keys, or each query's
    # top k keys; see weight_maps.pxi.
    double *sums  # (batch, heads, rows, columns); NULL: not asked for
    Py_ssize_t rows, columns, slots  # slots: the most rows, by head, that a tile's queries are in
    int64_t *tickets  # (batch, kv_heads): whose ticket is next to add to the sums
    Operand indices  # (batch, heads, queries, top_k)
    Py_ssize_t top_k  # 0: not asked for


cdef struct Dropout:
    # fastattn.core.dropout.Dropout: `offset` is of (batch, head, query, key).
    bint given
    uint64_t seed
    uint64_t offset[4]
    uint32_t threshold
    double factor


cdef struct Sequence:
    # Queries, the only keys that they may see, and how they are worked on: all of a call, or one of
    # the sequences that lie in it end to end. Tiles of queries, blocks of keys and splits begin
    # where it does, and the bounds of its tiles count from there.
    const TileKernels *kernels
    Py_ssize_t first_query, n_queries, first_key, n_keys
    Py_ssize_t num_tiles, num_splits, split_keys  # of each key head: its queries, its keys
    Py_ssize_t partial_bytes  # of the result of a split
    # Of the sequences before it: tiles times splits, and blocks of keys, of one key head; and the
    # partial results of one batch entry, in bytes.
    Py_ssize_t items_before, blocks_before, partial_before


cdef struct CallParams:
    # Everything that the tiles of one call share.
    const TileKernels *kernels  # of all queries; those of a sequence sum in the same dtype
    Operand q, k, v, k_scales, v_scales, out, mask, bias, weights, lse, max_score
    KeyRange keys
    int lse_bytes  # of one number, also of max_score
    int n_batch
    Py_ssize_t shape[64]  # of the batch
    Py_ssize_t kv_heads, group, n_queries, n_keys, head_dim
    Py_ssize_t key_heads  # of all batch entries
    Sequence whole  # the only sequence, unless there are `sequences`
    const Sequence *sequences
    Py_ssize_t n_sequences
    Py_ssize_t items  # of all sequences and a key head: tiles times splits
    Py_ssize_t blocks  # of keys, likewise
    char *partial  # (batch, sequences, kv_heads, splits): the partial result of each
    Py_ssize_t partial_bytes  # of a batch entry
    const int64_t *order  # of the batch entries; NULL: as stored
    Operand pages  # (batch, pages); NULL: keys and values are no pool of these
    const double *alibi  # per head; NULL if not given
    const double *sinks
    const double *scales
    double scale, softcap  # a scale of 1 beside `scales`; 0: no softcap
    char *relative_bias  # (kv_heads, rows, group), as Tile.relative_bias
    Py_ssize_t relative_bias_bytes  # of one key head
    ScoreFunction score_function
    const double *dim_weights  # of an additive score
    WeightReduction reduction
    Dropout dropout


cdef int bind_operand(CallParams *params, Operand *operand, cnp.ndarray array, int rank) except -1:
    """Read an array of (batch..., heads, rows, dims), or with only the first `rank` of the axes
    after the batch. Axes of length 1 broadcast. `array` may be None.
    """
    cdef int lead, missing, axis
    cdef Py_ssize_t *strides[3]
    if array is None:
        operand.data = NULL
        return 0
    operand.data = <char *>cnp.PyArray_DATA(array)
    operand.format = number_format(array)
    lead = array.ndim - rank
    missing = params.n_batch - lead
    for axis in range(params.n_batch):
        operand.batch[axis] = 0
        if axis >= missing and array.shape[axis - missing] != 1:
            operand.batch[axis] = array.strides[axis - missing]
    strides[0], strides[1], strides[2] = &operand.head, &operand.row, &operand.dim
    for axis in range(rank):
        strides[axis][0] = array.strides[lead + axis] if array.shape[lead + axis] != 1 else 0
    return 0


cdef Py_ssize_t bind_pages(
    CallParams *params, Operand *operand, cnp.ndarray array
) except? -1:
    """Read a pool (n_pages, heads, page, ...), and return the bytes between its pages."""
    bind_operand(params, operand, array, 3)
    if array is None:
        return 0
    operand.batch[0] = 0
    return array.strides[0]


cdef char *batch_ptr(
    const CallParams *params, const Operand *operand, Py_ssize_t batch
) noexcept nogil:
    """The start of a batch entry, by its flattened index."""
    cdef char *at = operand.data
    cdef int axis
    if at is not NULL:
        for axis in range(params.n_batch - 1, -1, -1):
            at += (batch % params.shape[axis]) * operand.batch[axis]
            batch //= params.shape[axis]
    return at


cdef inline char *row_ptr(
    const Operand *operand, char *at, Py_ssize_t head, Py_ssize_t query
) noexcept nogil:
    return at + head * operand.head + query * operand.row


cdef int cut_sequence(
    CallParams *params, Sequence *sequence, Py_ssize_t value_dim, bint splits
) except -1:
    """Cut a sequence, whose kernels, queries and keys are set, into tiles, and into splits if that
    is allowed. It comes after those that were cut before.
    """
    cdef Py_ssize_t rows = params.group * sequence.n_queries
    cdef Py_ssize_t numbers = 2 if params.max_score.data is not NULL else 1
    sequence.num_tiles = ceil_div(rows, sequence.kernels.block_q)
    sequence.num_splits, sequence.split_keys, sequence.partial_bytes = 1, sequence.n_keys, 0
    sequence.items_before, sequence.blocks_before = params.items, params.blocks
    sequence.partial_before = params.partial_bytes
    if splits and rows <= MAX_SPLIT_ROWS and sequence.n_keys >= 2 * SPLIT_KEYS:
        sequence.split_keys = (sequence.n_keys // (MAX_SPLITS * SPLIT_KEYS) + 1) * SPLIT_KEYS
        sequence.num_splits = ceil_div(sequence.n_keys, sequence.split_keys)
        sequence.partial_bytes = padded(rows * (
            numbers * <Py_ssize_t>sizeof(double) + value_dim * sequence.kernels.real_bytes
        ))
        params.partial_bytes += params.kv_heads * sequence.num_splits * sequence.partial_bytes
    params.items += sequence.num_tiles * sequence.num_splits
    params.blocks += ceil_div(sequence.n_keys, sequence.kernels.block_k)
    return 0


cdef object cut_sequences(
    CallParams *params, packing, str compute_dtype, Py_ssize_t value_dim, bint dot, bint backward,
    bint splits,
):
    """Cut all sequences of a `fastattn.core.packing.Packing`, the longest first; if that is None,
    the whole call. Returns what must be kept until the call has ended.
    """
    cdef cnp.ndarray table = None if packing is None else packing.longest_first()
    cdef Py_ssize_t n
    cdef const int64_t *row
    cdef Sequence *sequences = &params.whole
    cdef cnp.ndarray memory = None
    params.items = params.blocks = params.partial_bytes = 0
    params.sequences, params.n_sequences = NULL, 1
    if table is None:
        params.whole.kernels = params.kernels
        params.whole.first_query, params.whole.n_queries = 0, params.n_queries
        params.whole.first_key, params.whole.n_keys = 0, params.n_keys
        cut_sequence(params, &params.whole, value_dim, splits)
        return None
    params.n_sequences = table.shape[0]
    memory = np.empty(max(1, params.n_sequences) * sizeof(Sequence), np.uint8)
    sequences = <Sequence *>cnp.PyArray_DATA(memory)
    params.sequences = sequences
    for n in range(params.n_sequences):
        row = <const int64_t *>cnp.PyArray_DATA(table) + 4 * n
        sequences[n].first_query, sequences[n].n_queries = row[0], row[1]
        sequences[n].first_key, sequences[n].n_keys = row[2], row[3]
        if backward:
            sequences[n].kernels = backward_kernels_for(
                compute_dtype, params.group * row[1], params.head_dim, value_dim, dot
            )
        else:
            sequences[n].kernels = kernels_for(
                compute_dtype, params.group * row[1], params.head_dim, value_dim, dot
            )
        cut_sequence(params, &sequences[n], value_dim, splits)
    return memory


cdef inline const Sequence *sequence_at(const CallParams *params, Py_ssize_t n) noexcept nogil:
    return &params.whole if params.sequences is NULL else params.sequences + n


cdef const Sequence *sequence_of(
    const CallParams *params, Py_ssize_t item, bint by_blocks
) noexcept nogil:
    """The sequence of an item of a key head, a tile and a split of it, or of a block of keys."""
    cdef Py_ssize_t first = 0, last = params.n_sequences - 1, middle, before
    cdef const Sequence *sequence
    while first < last:
        middle = (first + last + 1) // 2
        sequence = sequence_at(params, middle)
        before = sequence.blocks_before if by_blocks else sequence.items_before
        if before <= item:
            first = middle
        else:
            last = middle - 1
    return sequence_at(params, first)


cdef struct WorkItem:
    # The queries of one key head and sequence, from row `first` of these on, and one split of its
    # keys.
    const Sequence *sequence
    Py_ssize_t batch, kv_head, first, split


cdef WorkItem work_item_of(const CallParams *params, Py_ssize_t item) noexcept nogil:
    cdef WorkItem work
    cdef const Sequence *sequence
    if params.reduction.sums is not NULL:
        # The tiles of a head wait for each other, so successive items have different heads.
        item = item % params.key_heads * params.items + item // params.key_heads
    work.batch = item // (params.kv_heads * params.items)
    item %= params.kv_heads * params.items
    sequence = sequence_of(params, item // params.kv_heads, False)
    item -= params.kv_heads * sequence.items_before
    work.sequence = sequence
    work.split = item % sequence.num_splits
    item //= sequence.num_splits
    work.first = tile_rows_before(sequence, item % sequence.num_tiles)
    work.kv_head = item // sequence.num_tiles
    if params.order is not NULL:
        work.batch = params.order[work.batch]
    return work


cdef inline Py_ssize_t tile_rows_before(const Sequence *sequence, Py_ssize_t n) noexcept nogil:
    """Where the n-th tile begins. The last queries come first: under a causal mask they have the
    most keys, and when the items that run last are small, threads finish at about the same time.
    """
    return (sequence.num_tiles - 1 - n) * sequence.kernels.block_q


cdef inline Py_ssize_t query_of(
    const CallParams *params, WorkItem work, Py_ssize_t row
) noexcept nogil:
    """The query in row `row` of a tile."""
    return work.sequence.first_query + (work.first + row) // params.group


cdef inline Py_ssize_t head_of(
    const CallParams *params, WorkItem work, Py_ssize_t row
) noexcept nogil:
    """Its head. Those of a group come one after another, so that a tile's queries have similar
    positions.
    """
    return work.kv_head * params.group + (work.first + row) % params.group


cdef inline char *key_ptr(
    const CallParams *params, const Operand *operand, WorkItem work
) noexcept nogil:
    """The first key of the sequence in an array of (batch, kv_heads, keys, dims)."""
    return row_ptr(
        operand, batch_ptr(params, operand, work.batch), work.kv_head, work.sequence.first_key
    )


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
    tile.k, tile.v = key_ptr(params, &params.k, work), key_ptr(params, &params.v, work)
    tile.drop_first_key = params.dropout.offset[3] + origin
    tile.out_format, tile.out_dim = params.out.format, params.out.dim
    if params.pages.data is not NULL:
        tile.pages = <int64_t *>batch_ptr(params, &params.pages, work.batch)
    if params.k_scales.data is not NULL:
        tile.k_scales = <float *>(
            batch_ptr(params, &params.k_scales, work.batch) + work.kv_head * params.k_scales.head
        )
        tile.v_scales = <float *>(
            batch_ptr(params, &params.v_scales, work.batch) + work.kv_head * params.v_scales.head
        )
    tile.has_sinks = params.sinks is not NULL and work.split == 0
    if params.relative_bias is not NULL:
        tile.relative_bias = params.relative_bias + work.kv_head * params.relative_bias_bytes
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


cdef NumberFormat number_format(cnp.ndarray array):
    cdef NumberFormat format
    cdef cnp.dtype dtype = array.descr
    format.kind = dtype.kind
    if dtype.kind == ord("V"):  # of ml_dtypes: bfloat16 and float8_e4m3fn
        format.kind = ord("b") if dtype.itemsize == 2 else ord("8")
    format.bytes = dtype.itemsize
    format.swapped = dtype.byteorder == ord(">")
    return format


cdef const double *doubles(cnp.ndarray array):
    if array is None:
        return NULL
    return <const double *>cnp.PyArray_DATA(array)


cdef int bind_key_range(CallParams *params, key_range) except -1:
    cdef KeyRange *keys = &params.keys
    # A tuple, which it is a subclass of, is read faster than attributes.
    _, params.n_keys, offset, left, right, lengths, spans = <tuple>key_range
    keys.offset, keys.offsets.data, keys.start.data, keys.stop.data = 0, NULL, NULL, NULL
    keys.left = UNBOUNDED if left is None else left
    keys.right = UNBOUNDED if right is None else right
    if type(offset) is int:
        keys.offset = offset
    else:
        bind_operand(params, &keys.offsets, offset, 1)
    bind_operand(params, &keys.lengths, lengths, 0)
    if spans is not None:
        bind_operand(params, &keys.start, spans[0], 2)
        bind_operand(params, &keys.stop, spans[1], 2)
    return 0


cdef int bind_dropout(CallParams *params, dropout) except -1:
    cdef int i
    params.dropout.given = dropout is not None
    params.dropout.threshold, params.dropout.factor, params.dropout.offset[3] = 0, 1, 0
    if dropout is not None:
        params.dropout.seed = dropout.seed
        params.dropout.threshold = dropout.threshold
        params.dropout.factor = dropout.factor
        for i in range(4):
            params.dropout.offset[i] = dropout.offset[i]
    return 0


cdef cnp.ndarray scales_of(p, bint per_head):
    """The scales of the heads of a `Problem`, or None where `p.scale` is that of all of them; if
    `per_head`, never None.
    """
    scale = p.scale
    if isinstance(scale, cnp.ndarray):
        return scale
    return np.full(p.heads, scale) if per_head else None


cdef int bind_score_function(CallParams *params, score_function) except -1:
    """From a pair of its name and the weights of the dims."""
    name, weights = <tuple>score_function
    params.score_function, params.dim_weights = DOT, NULL
    if name != "dot":
        params.score_function = {
            "distance": DISTANCE, "additive": ADDITIVE, "squared distance": SQUARED_DISTANCE,
        }[name]
        params.dim_weights = doubles(weights)
    return 0


cdef int bind_problem(
    CallParams *params, p, cnp.ndarray out, cnp.ndarray scales, cnp.ndarray relative_bias
) except -1:
    """The parameters of a `fastattn.core.problem.Problem` in either direction. `scales` and
    `relative_bias` are of `scales_of` and of `kernel_args.relative_bias_rows`.
    """
    cdef tuple batch = p.batch
    cdef cnp.ndarray q = p.q
    cdef Py_ssize_t heads = p.heads
    cdef int i
    params.n_batch = len(batch)
    params.key_heads = params.kv_heads = p.kv_heads
    for i in range(params.n_batch):
        params.shape[i] = batch[i]
        params.key_heads *= params.shape[i]
    params.group = heads // params.kv_heads if params.kv_heads else 1
    params.n_queries, params.head_dim = q.shape[q.ndim - 2], q.shape[q.ndim - 1]
    bind_operand(params, &params.q, q, 3)
    bind_operand(params, &params.k, p.k, 3)
    bind_operand(params, &params.v, p.v, 3)
    bind_operand(params, &params.out, out, 3)
    bind_key_range(params, p.key_range)
    bind_dropout(params, p.dropout)
    mask = p.mask
    bind_operand(params, &params.mask, mask if type(mask) is cnp.ndarray else None, 3)
    bind_operand(params, &params.bias, p.bias, 3)
    bind_operand(params, &params.weights, None, 3)
    bind_operand(params, &params.k_scales, None, 3)
    bind_operand(params, &params.v_scales, None, 3)
    bind_operand(params, &params.pages, None, 1)
    params.alibi = doubles(p.alibi)
    params.sinks = doubles(p.sinks)
    params.scales = doubles(scales)
    params.scale = 1 if scales is not None else p.scale
    softcap = p.softcap
    params.softcap = 0 if softcap is None else softcap
    bind_score_function(params, p.score_function)
    params.relative_bias, params.relative_bias_bytes = NULL, 0
    if relative_bias is not None:
        params.relative_bias = <char *>cnp.PyArray_DATA(relative_bias)
        params.relative_bias_bytes = (
            relative_bias.shape[1] * relative_bias.shape[2] * relative_bias.itemsize
        )
    params.max_score.data = NULL
    params.order = NULL
    params.reduction.sums, params.reduction.top_k = NULL, 0
    return 0


cdef tuple read_by_plans(p):
    """The arrays of a `Problem` that all runs of a plan read where they lie."""
    return p.bias, p.mask, p.alibi, p.sinks, p.key_range, p.score_function


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


cdef Py_ssize_t tile_rows(const CallParams *params) noexcept nogil:
    """The queries of the largest tile, in whole micropanels."""
    cdef Py_ssize_t n, most = 0
    cdef const Sequence *sequence
    for n in range(params.n_sequences):
        sequence = sequence_at(params, n)
        most = max(most, ceil_div(queries_of_tile(params, sequence), sequence.kernels.mr)
                   * sequence.kernels.mr)
    return most


cdef inline Py_ssize_t queries_of_tile(
    const CallParams *params, const Sequence *sequence
) noexcept nogil:
    return min(sequence.kernels.block_q, params.group * sequence.n_queries)


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
