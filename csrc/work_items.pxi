# Part of kernels.pyx: a call cut into work items, the tiles and splits of its sequences.

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


cdef inline Py_ssize_t queries_of_tile(
    const CallParams *params, const Sequence *sequence
) noexcept nogil:
    return min(sequence.kernels.block_q, params.group * sequence.n_queries)


cdef Py_ssize_t tile_rows(const CallParams *params) noexcept nogil:
    """The queries of the largest tile, in whole micropanels."""
    cdef Py_ssize_t n, most = 0
    cdef const Sequence *sequence
    for n in range(params.n_sequences):
        sequence = sequence_at(params, n)
        most = max(most, ceil_div(queries_of_tile(params, sequence), sequence.kernels.mr)
                   * sequence.kernels.mr)
    return most


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
