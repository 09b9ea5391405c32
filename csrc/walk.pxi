# Part of kernels.pyx: what the tiles of a call share, and how one finds its place in it.

cdef struct Operand:
    # An array of (batch, heads, rows, dims), by base pointer and byte strides; NULL: not given.
    char *data
    Py_ssize_t head, row, dim
    Py_ssize_t batch[64]  # one stride per batch axis, 0 where it broadcasts


# As a side of a window; the sum of it and a position is no overflow.
cdef Py_ssize_t UNBOUNDED = <Py_ssize_t>1 << 62


cdef struct KeyRange:
    # fastattn.core.visibility.KeyRange as it is read for each tile. Arrays that were not given are NULL.
    Py_ssize_t left, right, offset
    Operand offsets, lengths, start, stop  # offsets in place of the one offset


cdef struct Survey:
    # What is made of the weights besides: their sums over bins of queries x keys, or each query's
    # top k keys; see maps.pxi.
    double *sums  # (batch, heads, rows, columns); NULL: not asked for
    Py_ssize_t rows, columns, slots  # slots: the most rows, by head, that a tile's queries are in
    int64_t *turn  # (batch, kv_heads): whose turn it is to add to the sums
    Operand indices  # (batch, heads, queries, top_k)
    Py_ssize_t top_k  # 0: not asked for


cdef struct Walk:
    # Everything that the tiles of one call share.
    const TileKernels *kernels
    Operand q, k, v, k_scales, v_scales, out, mask, bias, weights, lse
    KeyRange keys
    int lse_bytes  # of one number
    int n_batch
    Py_ssize_t shape[64]  # of the batch
    Py_ssize_t kv_heads, group, n_queries, n_keys
    Py_ssize_t key_heads  # of all batch entries
    Py_ssize_t tiles, parts, part_keys  # of each key head's queries, of its keys
    char *partial  # (batch, kv_heads, parts): room for what each part found
    Py_ssize_t partial_bytes
    NumberFormat out_format
    const int64_t *order  # of the batch entries; NULL: as they stand
    const double *alibi  # per head; NULL: not given
    const double *sinks
    Survey survey


cdef int describe(Walk *walk, Operand *operand, cnp.ndarray array, int rank) except -1:
    """Read an array of (batch..., heads, rows, dims), or of the first `rank` of these behind the
    batch; axes of length 1 broadcast. None is not given.
    """
    cdef int lead, missing, axis
    cdef Py_ssize_t *strides[3]
    if array is None:
        operand.data = NULL
        return 0
    operand.data = <char *>cnp.PyArray_DATA(array)
    lead = array.ndim - rank
    missing = walk.n_batch - lead
    for axis in range(walk.n_batch):
        operand.batch[axis] = 0
        if axis >= missing and array.shape[axis - missing] != 1:
            operand.batch[axis] = array.strides[axis - missing]
    strides[0], strides[1], strides[2] = &operand.head, &operand.row, &operand.dim
    for axis in range(rank):
        strides[axis][0] = array.strides[lead + axis] if array.shape[lead + axis] != 1 else 0
    return 0


cdef char *entry(const Walk *walk, const Operand *operand, Py_ssize_t batch) noexcept nogil:
    """Where the batch entry of that flattened index begins."""
    cdef char *at = operand.data
    cdef int axis
    if at is not NULL:
        for axis in range(walk.n_batch - 1, -1, -1):
            at += (batch % walk.shape[axis]) * operand.batch[axis]
            batch //= walk.shape[axis]
    return at


cdef inline char *row_of(
    const Operand *operand, char *at, Py_ssize_t head, Py_ssize_t query
) noexcept nogil:
    return at + head * operand.head + query * operand.row


cdef struct Place:
    # Which queries and keys an item of work is.
    Py_ssize_t batch, kv_head, first, part


cdef Place place_of(const Walk *walk, Py_ssize_t item) noexcept nogil:
    cdef Place at
    if walk.survey.sums is not NULL:
        # The tiles of a head wait for each other, so neighbours are of different heads.
        item = item % walk.key_heads * walk.tiles + item // walk.key_heads
    at.part = item % walk.parts
    item //= walk.parts
    # The last queries first: under a causal mask they have the most to do, and a run that ends in
    # small pieces leaves no thread waiting for another.
    at.first = (walk.tiles - 1 - item % walk.tiles) * walk.kernels.block_q
    item //= walk.tiles
    at.kv_head = item % walk.kv_heads
    at.batch = item // walk.kv_heads
    if walk.order is not NULL:
        at.batch = walk.order[at.batch]
    return at


cdef char *partial_of(const Walk *walk, Py_ssize_t batch, Py_ssize_t kv_head) noexcept nogil:
    return walk.partial + (batch * walk.kv_heads + kv_head) * walk.parts * walk.partial_bytes


cdef void set_tile(const Walk *walk, Tile *tile, Place at) noexcept nogil:
    """Point a tile at its queries, and at the keys that they read."""
    cdef const KeyRange *keys = &walk.keys
    cdef Py_ssize_t offset = keys.offset, i, query, head, first_key = 0, last_key = walk.n_keys
    cdef Py_ssize_t position, first, last
    cdef char *q = entry(walk, &walk.q, at.batch)
    cdef char *out = entry(walk, &walk.out, at.batch)
    cdef char *start = entry(walk, &keys.start, at.batch)
    cdef char *stop = entry(walk, &keys.stop, at.batch)
    cdef char *mask = entry(walk, &walk.mask, at.batch)
    cdef char *bias = entry(walk, &walk.bias, at.batch)
    cdef char *weights = entry(walk, &walk.weights, at.batch)
    cdef char *partial = NULL
    if keys.offsets.data is not NULL:
        offset = (<int64_t *>entry(walk, &keys.offsets, at.batch))[0]
    tile.n_queries = min(walk.kernels.block_q, walk.group * walk.n_queries - at.first)
    tile.k = entry(walk, &walk.k, at.batch) + at.kv_head * walk.k.head
    tile.v = entry(walk, &walk.v, at.batch) + at.kv_head * walk.v.head
    if walk.k_scales.data is not NULL:
        tile.k_scales = <float *>(
            entry(walk, &walk.k_scales, at.batch) + at.kv_head * walk.k_scales.head
        )
        tile.v_scales = <float *>(
            entry(walk, &walk.v_scales, at.batch) + at.kv_head * walk.v_scales.head
        )
    tile.has_sinks = walk.sinks is not NULL and at.part == 0
    if walk.parts > 1:
        first_key = at.part * walk.part_keys
        last_key = min(first_key + walk.part_keys, walk.n_keys)
        partial = partial_of(walk, at.batch, at.kv_head) + at.part * walk.partial_bytes
        partial += tile.n_queries * sizeof(double)
    if keys.lengths.data is not NULL:
        last_key = min(last_key, (<int64_t *>entry(walk, &keys.lengths, at.batch))[0])
    # The heads of a group lie side by side, so that a tile's queries are neighbours in position.
    query = at.first // walk.group
    head = at.kv_head * walk.group + at.first % walk.group
    for i in range(tile.n_queries):
        tile.q[i] = row_of(&walk.q, q, head, query)
        tile.out[i] = row_of(&walk.out, out, head, query)
        if partial is not NULL:
            tile.out[i] = partial + i * tile.value_dim * walk.kernels.real_bytes
        position = query + offset
        first = max(first_key, position - keys.left)
        last = min(last_key, position + keys.right + 1)
        if start is not NULL:
            first = max(first, (<int64_t *>row_of(&keys.start, start, head, query))[0])
            last = min(last, (<int64_t *>row_of(&keys.stop, stop, head, query))[0])
        tile.start[i] = min(first, walk.n_keys)
        tile.stop[i] = max(last, 0)
        if mask is not NULL:
            tile.mask[i] = row_of(&walk.mask, mask, head, query)
        if bias is not NULL:
            tile.bias[i] = row_of(&walk.bias, bias, head, query)
        if weights is not NULL:
            tile.weights[i] = row_of(&walk.weights, weights, head, query)
        if walk.alibi is not NULL:
            tile.slope[i] = walk.alibi[head]
            tile.position[i] = position
        if walk.sinks is not NULL:
            tile.sink[i] = walk.sinks[head]
        head += 1
        if head == (at.kv_head + 1) * walk.group:
            head = at.kv_head * walk.group
            query += 1


cdef void store_lse(
    const Walk *walk, char *to, Place at, Py_ssize_t row, double lse
) noexcept nogil:
    """`to` is the entry of the batch."""
    row += at.first
    if to is not NULL:
        to = row_of(&walk.lse, to, at.kv_head * walk.group + row % walk.group, row // walk.group)
        if walk.lse_bytes == sizeof(double):
            (<double *>to)[0] = lse
        else:
            (<float *>to)[0] = <float>lse


cdef void join_parts(const Walk *walk, Tile *tile) noexcept nogil:
    """Make one of what the parts of each key head found."""
    cdef Py_ssize_t item, i, head, dim = walk.out.dim
    cdef Py_ssize_t rows = walk.group * walk.n_queries
    cdef char *out
    cdef char *lse
    cdef Place at
    for item in range(walk.key_heads):
        at = place_of(walk, item * walk.parts)
        out = entry(walk, &walk.out, at.batch)
        lse = entry(walk, &walk.lse, at.batch)
        for i in range(rows):
            head = at.kv_head * walk.group + i % walk.group
            store_lse(walk, lse, at, i, walk.kernels.join(
                partial_of(walk, at.batch, at.kv_head), walk.parts, walk.partial_bytes, rows, i,
                tile.value_dim, row_of(&walk.out, out, head, i // walk.group), dim,
                walk.out_format,
            ))


cdef NumberFormat number_format(cnp.ndarray array):
    cdef NumberFormat format
    cdef cnp.dtype dtype = array.descr
    format.kind = ord("b") if dtype.kind == ord("V") else dtype.kind  # ml_dtypes' bfloat16
    format.bytes = dtype.itemsize
    format.swapped = dtype.byteorder == ord(">")
    return format


cdef const double *doubles(cnp.ndarray array):
    return NULL if array is None else <const double *>cnp.PyArray_DATA(array)


cdef int describe_key_range(Walk *walk, key_range) except -1:
    cdef KeyRange *keys = &walk.keys
    _, _, offset, left, right, lengths, spans = <tuple>key_range  # which it is a subclass of
    keys.offset, keys.offsets.data, keys.start.data, keys.stop.data = 0, NULL, NULL, NULL
    keys.left = UNBOUNDED if left is None else left
    keys.right = UNBOUNDED if right is None else right
    if type(offset) is int:
        keys.offset = offset
    else:
        describe(walk, &keys.offsets, offset, 0)
    describe(walk, &keys.lengths, lengths, 0)
    if spans is not None:
        describe(walk, &keys.start, spans[0], 2)
        describe(walk, &keys.stop, spans[1], 2)
    return 0


cdef int describe_walk(
    Walk *walk, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, cnp.ndarray alibi, cnp.ndarray sinks,
    key_range, cnp.ndarray mask, cnp.ndarray bias,
) except -1:
    """What both directions need of a walk; each key head is one tile's queries, one part."""
    cdef int i
    walk.n_batch = len(batch)
    walk.key_heads = walk.kv_heads = kv_heads
    for i in range(walk.n_batch):
        walk.shape[i] = batch[i]
        walk.key_heads *= walk.shape[i]
    describe(walk, &walk.q, q, 3)
    describe(walk, &walk.k, k, 3)
    describe(walk, &walk.v, v, 3)
    describe(walk, &walk.out, out, 3)
    describe_key_range(walk, key_range)
    describe(walk, &walk.mask, mask, 3)
    describe(walk, &walk.bias, bias, 3)
    describe(walk, &walk.weights, None, 3)
    describe(walk, &walk.k_scales, None, 2)
    describe(walk, &walk.v_scales, None, 2)
    walk.alibi = doubles(alibi)
    walk.sinks = doubles(sinks)
    walk.group = heads // kv_heads if kv_heads else 1
    walk.n_queries = q.shape[q.ndim - 2]
    walk.n_keys = k.shape[k.ndim - 2]
    walk.out_format = number_format(out)
    walk.order = NULL
    walk.tiles = walk.parts = 1
    walk.survey.sums, walk.survey.top_k = NULL, 0
    return 0


cdef int describe_tile(
    const Walk *walk, Tile *tile, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out,
    double scale, double softcap, cnp.ndarray bias,
) except -1:
    """What all tiles of a walk have in common."""
    tile.k_scales = tile.v_scales = NULL
    tile.q_format = number_format(q)
    tile.k_format, tile.v_format = number_format(k), number_format(v)
    tile.out_format = walk.out_format
    tile.q_dim, tile.out_dim = walk.q.dim, walk.out.dim
    tile.k_dim, tile.k_key = walk.k.dim, walk.k.row
    tile.v_dim, tile.v_key = walk.v.dim, walk.v.row
    tile.head_dim = q.shape[q.ndim - 1]
    tile.value_dim = v.shape[v.ndim - 1]
    tile.block_k = min(walk.kernels.block_k, walk.n_keys)
    tile.scale = scale
    tile.softcap = softcap
    tile.score_function = DOT
    tile.dim_weights = NULL
    tile.has_mask = walk.mask.data is not NULL
    tile.has_bias = walk.bias.data is not NULL
    tile.has_alibi = walk.alibi is not NULL
    tile.has_sinks = walk.sinks is not NULL
    tile.mask_key = walk.mask.dim
    tile.bias_key = walk.bias.dim
    if bias is not None:
        tile.bias_format = number_format(bias)
    tile.weights_key = tile.top_k = 0
    tile.want_lse = tile.differentiating = False
    tile.margin = 0
    return 0


cdef char *share_scratch(
    Tile *tiles, int threads, char *scratch, Py_ssize_t scratch_bytes
) noexcept nogil:
    """Make all tiles like the first, with scratch of their own. Returns what is left of it."""
    cdef int i
    scratch += (-<uintptr_t>scratch) % 64
    for i in range(threads):
        if i > 0:
            tiles[i] = tiles[0]
        tiles[i].scratch = scratch + i * scratch_bytes
    return scratch + threads * scratch_bytes
