# Part of kernels.pyx: the parameters of a call, read from a Problem.

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
