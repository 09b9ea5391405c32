# Part of kernels.pyx: the walk backward.

cdef struct Pull:
    # A walk backward; `out` of the walk is the gradient of q.
    Walk walk
    Operand grad_out, lse, delta, grad_bias, grad_slope
    char *grad_k
    char *grad_v
    const int64_t *key_heads  # as many of them as `sharers` are one item after another
    Py_ssize_t sharers, blocks  # of keys
    int64_t *turn  # (batch, kv_heads, tiles): whose turn it is to add to the gradients of q


cdef bint differentiate_tile(
    const Pull *pull, Tile *tile, Place at, Py_ssize_t block, bint *stopped
) noexcept nogil:
    """One tile of queries and one block of keys. False if the walk was stopped."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t begin = block * walk.kernels.pass_keys, i, n, head, query
    cdef Py_ssize_t end = min(begin + walk.kernels.pass_keys, walk.n_keys)
    cdef char *grad_out = entry(walk, &pull.grad_out, at.batch)
    cdef char *lse = entry(walk, &pull.lse, at.batch)
    cdef char *delta = entry(walk, &pull.delta, at.batch)
    cdef char *grad_bias = entry(walk, &pull.grad_bias, at.batch)
    cdef char *grad_slope = entry(walk, &pull.grad_slope, at.batch)
    cdef int64_t *turn = pull.turn
    set_tile(walk, tile, at)
    for i in range(tile.n_queries):
        head = at.kv_head * walk.group + (at.first + i) % walk.group
        query = (at.first + i) // walk.group
        tile.grad_out[i] = row_of(&pull.grad_out, grad_out, head, query)
        tile.lse[i] = (<double *>row_of(&pull.lse, lse, head, query))[0]
        tile.delta[i] = (<double *>row_of(&pull.delta, delta, head, query))[0]
        if grad_bias is not NULL:
            tile.grad_bias[i] = row_of(&pull.grad_bias, grad_bias, head, query)
    walk.kernels.begin(tile)
    if end <= tile.first or tile.last <= begin:
        return True
    some = walk.kernels.gradient.differentiate(tile, begin, end)
    # Blocks are added in their order, so that the sum does not depend on the threads.
    turn += (at.batch * walk.kv_heads + at.kv_head) * walk.tiles + at.first // walk.kernels.queries
    while tile.first < begin and read_count(turn) < block:
        if stopped[0]:
            return False
        sched_yield()
    if some:
        walk.kernels.gradient.add(tile)
        for i in range(tile.n_queries if grad_slope is not NULL else 0):
            head = at.kv_head * walk.group + (at.first + i) % walk.group
            query = (at.first + i) // walk.group
            for n in range(3):
                (<double *>row_of(&pull.grad_slope, grad_slope, head, query))[n] += tile.grad_slope[i][n]
    set_count(turn, block + 1)
    return True


cdef bint differentiate_block(
    const Pull *pull, Tile *tile, Py_ssize_t head, Py_ssize_t block, bint listen, double *last_look,
    bint *stopped,
) noexcept nogil:
    """One block of keys of one key head. False if a signal came in between."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t n
    cdef Py_ssize_t begin = block * walk.kernels.pass_keys
    cdef Py_ssize_t end = min(begin + walk.kernels.pass_keys, walk.n_keys)
    cdef Py_ssize_t row = walk.n_keys * walk.kernels.real_bytes
    tile.k = entry(walk, &walk.k, head // walk.kv_heads) + head % walk.kv_heads * walk.k.head
    tile.v = entry(walk, &walk.v, head // walk.kv_heads) + head % walk.kv_heads * walk.v.head
    tile.grad_k = pull.grad_k + head * row * tile.head_dim
    tile.grad_v = pull.grad_v + head * row * tile.value_dim
    walk.kernels.gradient.open(tile, begin, end)
    for n in range(walk.tiles):
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        if not differentiate_tile(pull, tile, place_of(walk, head * walk.tiles + n), block, stopped):
            return False
    walk.kernels.gradient.close(tile, begin, end)
    return True


cdef bint differentiate_item(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """One block of keys of key heads that share a bias, in their order: an Item of a Pull."""
    cdef const Pull *pull = <const Pull *>call
    cdef const int64_t *heads = pull.key_heads + item // pull.blocks * pull.sharers
    cdef Py_ssize_t i
    for i in range(pull.sharers):
        if not differentiate_block(
            pull, tile, heads[i], item % pull.blocks, listen, last_look, stopped
        ):
            return False
    return True


cdef int pull_back(const Pull *pull, int threads, Tile *tiles) except -1:
    cdef Py_ssize_t items = pull.walk.key_heads // pull.sharers * pull.blocks
    with nogil:
        each_item(differentiate_item, pull, tiles, items, threads)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def differentiate(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray grad_out not None, cnp.ndarray lse not None, cnp.ndarray delta not None,
    cnp.ndarray grad_q not None, cnp.ndarray grad_k not None, cnp.ndarray grad_v not None,
    tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, cnp.ndarray q_offset,
    cnp.ndarray start, cnp.ndarray stop, cnp.ndarray mask, str product, int threads,
    cnp.ndarray grad_bias, cnp.ndarray grad_slope, cnp.ndarray key_heads not None,
):
    """Add to `grad_q`, (batch, heads, queries, head_dim), which must be 0 before, and fill `grad_k`
    and `grad_v`, (batch, kv_heads, keys, dim): contiguous, of the dtype of sums.

    `lse` and `delta`, (batch, heads, queries), are float64. What is not None of `grad_bias` and
    `grad_slope` is added to: one broadcasts to the scores, of the dtype of sums, or float64 if it
    broadcasts along the queries, and without gaps between the keys; the other is float64 (batch,
    heads, queries, 3) and contiguous, what the Tile says of slopes. `key_heads`, int64 (items, sharers), are all the flattened key heads, those
    side by side whose `grad_bias` is one. The rest as for `attend`.
    """
    cdef Pull pull
    cdef Tile *tiles
    cdef char *scratch = NULL
    cdef Py_ssize_t scratch_bytes, total_bytes, counts
    cdef Walk *walk = &pull.walk
    describe_walk(
        walk, q, k, v, grad_q, batch, heads, kv_heads, alibi, sinks, q_offset, start, stop, mask,
        bias,
    )
    describe(walk, &pull.grad_out, grad_out, 3)
    describe(walk, &pull.lse, lse, 2)
    describe(walk, &pull.delta, delta, 2)
    describe(walk, &pull.grad_bias, grad_bias, 3)
    describe(walk, &pull.grad_slope, grad_slope, 3)
    pull.key_heads = <const int64_t *>cnp.PyArray_DATA(key_heads)
    pull.sharers = key_heads.shape[1]
    pull.grad_k = <char *>cnp.PyArray_DATA(grad_k)
    pull.grad_v = <char *>cnp.PyArray_DATA(grad_v)
    walk.kernels = gradient_kernels_for(
        product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1]
    )
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.queries - 1) // walk.kernels.queries
    pull.blocks = (walk.n_keys + walk.kernels.pass_keys - 1) // walk.kernels.pass_keys
    if walk.key_heads * pull.blocks == 0:
        return
    threads = ready_threads(min(threads, key_heads.shape[0] * pull.blocks))
    tiles = <Tile *>malloc(threads * sizeof(Tile))
    if tiles is NULL:
        raise MemoryError(f"{threads * sizeof(Tile)} bytes of scratch")
    try:
        describe_tile(walk, tiles, q, k, v, grad_q, scale, softcap, bias)
        tiles.differentiating = True
        tiles.grad_out_dim = pull.grad_out.dim
        tiles.wants_bias, tiles.wants_slope = grad_bias is not None, grad_slope is not None
        tiles.rows_share_bias = grad_bias is not None and pull.grad_bias.row == 0
        scratch_bytes = walk.kernels.gradient.scratch_bytes(tiles)
        counts = walk.key_heads * walk.tiles * sizeof(int64_t)
        total_bytes = threads * scratch_bytes + counts + 64
        scratch = <char *>malloc(total_bytes)
        if scratch is NULL:
            raise MemoryError(f"{total_bytes} bytes of scratch")
        pull.turn = <int64_t *>share_scratch(tiles, threads, scratch, scratch_bytes)
        memset(pull.turn, 0, counts)
        pull_back(&pull, threads, tiles)
    finally:
        free(tiles)
        free(scratch)
