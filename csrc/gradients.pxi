# Part of kernels.pyx: the walk backward.

cdef struct Pull:
    # A walk backward; `out` of the walk is the gradient of q.
    Walk walk
    Operand grad_out, result, lse, grad_lse, rows, grad_bias, row_sums
    double coarse  # the size from which on an lse has lost digits that its row's weights show
    char *grad_k
    char *grad_v
    const int64_t *key_heads  # as many of them as `sharers` are one item after another
    Py_ssize_t sharers, blocks  # of keys
    int64_t *turn  # (batch, kv_heads, tiles): whose turn it is to add to the gradients of q


cdef struct Row:
    # What a row of scores brings along; weights are exp(score - lse - lse_rest).
    double lse, lse_rest, mean  # of the weights' gradients


cdef inline double real_at(const Walk *walk, const char *at) noexcept nogil:
    """A number of the dtype of sums."""
    return (<double *>at)[0] if walk.kernels.real_bytes == sizeof(double) else (<float *>at)[0]


cdef bint is_coarse(const Pull *pull, double lse) noexcept nogil:
    return pull.coarse < fabs(lse) < INFINITY


cdef bint prepare_tile(
    const Pull *pull, Tile *tile, Place at, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Fill the rows of a tile. Where the lse of one is coarse it is what the kernels find themselves;
    but one that stands for more keys than this call sees stays, unless no digit of it is left for
    their number. False if the walk was stopped.
    """
    cdef const Walk *walk = &pull.walk
    cdef char *grad_out = entry(walk, &pull.grad_out, at.batch)
    cdef char *result = entry(walk, &pull.result, at.batch)
    cdef char *lse = entry(walk, &pull.lse, at.batch)
    cdef char *rows = entry(walk, &pull.rows, at.batch)
    cdef Py_ssize_t value_dim = tile.value_dim, i, head, query
    cdef double eps = DBL_EPSILON if walk.kernels.real_bytes == sizeof(double) else FLT_EPSILON
    cdef double apart
    cdef Row *row
    cdef bint any_coarse = False
    set_tile(walk, tile, at)
    for i in range(tile.n_queries):
        head = at.kv_head * walk.group + (at.first + i) % walk.group
        query = (at.first + i) // walk.group
        tile.grad_out[i] = row_of(&pull.grad_out, grad_out, head, query)
        tile.result[i] = row_of(&pull.result, result, head, query)
    walk.kernels.gradient.prepare(tile)
    for i in range(tile.n_queries):
        head = at.kv_head * walk.group + (at.first + i) % walk.group
        query = (at.first + i) // walk.group
        row = <Row *>row_of(&pull.rows, rows, head, query)
        row.lse = real_at(walk, row_of(&pull.lse, lse, head, query))
        row.lse_rest, row.mean = 0, tile.mean[i]
        any_coarse |= is_coarse(pull, row.lse)
    if not any_coarse:
        return True
    tile.value_dim = 0
    walk.kernels.begin(tile)
    if not each_pass(walk.kernels.attend, walk.kernels.pass_keys, tile, listen, last_look, stopped):
        return False
    walk.kernels.gradient.normalize(tile)
    tile.value_dim = value_dim
    for i in range(tile.n_queries):
        head = at.kv_head * walk.group + (at.first + i) % walk.group
        query = (at.first + i) // walk.group
        row = <Row *>row_of(&pull.rows, rows, head, query)
        apart = fabs((tile.lse[i] - row.lse) + tile.lse_rest[i])
        if is_coarse(pull, row.lse) and (
            apart <= 4 * eps * fabs(row.lse) or fabs(row.lse) > 1 / eps
        ):
            row.lse, row.lse_rest = tile.lse[i], tile.lse_rest[i]
    return True


cdef bint differentiate_tile(
    const Pull *pull, Tile *tile, Place at, Py_ssize_t block, bint *stopped
) noexcept nogil:
    """One tile of queries and one block of keys. False if the walk was stopped."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t begin = block * walk.kernels.pass_keys, i, n, head, query
    cdef Py_ssize_t end = min(begin + walk.kernels.pass_keys, walk.n_keys)
    cdef char *grad_out = entry(walk, &pull.grad_out, at.batch)
    cdef char *grad_lse = entry(walk, &pull.grad_lse, at.batch)
    cdef char *rows = entry(walk, &pull.rows, at.batch)
    cdef Row *row
    cdef char *grad_bias = entry(walk, &pull.grad_bias, at.batch)
    cdef char *row_sums = entry(walk, &pull.row_sums, at.batch)
    cdef int64_t *turn = pull.turn
    set_tile(walk, tile, at)
    for i in range(tile.n_queries):
        head = at.kv_head * walk.group + (at.first + i) % walk.group
        query = (at.first + i) // walk.group
        tile.grad_out[i] = row_of(&pull.grad_out, grad_out, head, query)
        row = <Row *>row_of(&pull.rows, rows, head, query)
        tile.lse[i], tile.lse_rest[i], tile.delta[i] = row.lse, row.lse_rest, row.mean
        if grad_lse is not NULL:
            tile.delta[i] -= real_at(walk, row_of(&pull.grad_lse, grad_lse, head, query))
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
        for i in range(tile.n_queries if row_sums is not NULL else 0):
            head = at.kv_head * walk.group + (at.first + i) % walk.group
            query = (at.first + i) // walk.group
            for n in range(4):
                (<double *>row_of(&pull.row_sums, row_sums, head, query))[n] += tile.row_sums[i][n]
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
    const Pull *pull, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """One block of keys of key heads that share a bias, in their order. False if stopped."""
    cdef const int64_t *heads = pull.key_heads + item // pull.blocks * pull.sharers
    cdef Py_ssize_t i
    for i in range(pull.sharers):
        if not differentiate_block(
            pull, tile, heads[i], item % pull.blocks, listen, last_look, stopped
        ):
            return False
    return True


cdef int pull_back(const Pull *pull, int threads, Tile *tiles) except -1:
    global pool_started
    cdef bint stopped = False
    cdef bint *stop = &stopped  # as in work
    cdef double last_look = seconds()
    cdef Py_ssize_t item, items = pull.walk.key_heads // pull.sharers * pull.blocks
    if threads > 1:
        pool_started = True
    with nogil:
        for item in prange(
            pull.walk.key_heads * pull.walk.tiles, num_threads=threads, schedule="dynamic"
        ):
            if not stop[0]:
                if not prepare_tile(
                    pull, &tiles[threadid()], place_of(&pull.walk, item), threadid() == 0,
                    &last_look, stop,
                ):
                    stop[0] = True
        # In the order of their numbers: a block waits only for those before it.
        for item in prange(items, num_threads=threads, schedule="dynamic", chunksize=1):
            if not stop[0]:
                if not differentiate_item(
                    pull, &tiles[threadid()], item, threadid() == 0, &last_look, stop
                ):
                    stop[0] = True
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def differentiate(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray out not None, cnp.ndarray lse not None, cnp.ndarray grad_out not None,
    cnp.ndarray grad_lse, cnp.ndarray rows not None, double coarse,
    cnp.ndarray grad_q not None, cnp.ndarray grad_k not None, cnp.ndarray grad_v not None,
    tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, cnp.ndarray q_offset,
    cnp.ndarray start, cnp.ndarray stop, cnp.ndarray mask, str product, int threads,
    cnp.ndarray grad_bias, cnp.ndarray row_sums, cnp.ndarray key_heads not None,
):
    """Add to `grad_q`, (batch, heads, queries, head_dim), which must be 0 before, and fill `grad_k`
    and `grad_v`, (batch, kv_heads, keys, dim): contiguous, of the dtype of sums.

    `lse` and `grad_lse`, (batch, heads, queries), are of the dtype of sums. An lse beyond `coarse` is
    found once more by the kernels. `rows`, float64 (batch, heads, queries, 3) and contiguous, is
    filled: the lse, what is missing in it, and the mean of the weights' gradients. What is not None of `grad_bias` and `row_sums` is added to: one broadcasts to the scores, of the dtype of
    sums, or float64 if it broadcasts along the queries, and without gaps between the keys; the other
    is float64 (batch, heads, queries, 4) and contiguous, as the Tile explains. `key_heads`, int64
    (items, sharers), are all the flattened key heads, those side by side whose `grad_bias` is one.
    The rest as for `attend`.
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
    describe(walk, &pull.result, out, 3)
    describe(walk, &pull.lse, lse, 2)
    describe(walk, &pull.grad_lse, grad_lse, 2)
    describe(walk, &pull.rows, rows, 3)
    describe(walk, &pull.grad_bias, grad_bias, 3)
    describe(walk, &pull.row_sums, row_sums, 3)
    pull.coarse = coarse
    pull.key_heads = <const int64_t *>cnp.PyArray_DATA(key_heads)
    pull.sharers = key_heads.shape[1]
    pull.grad_k = <char *>cnp.PyArray_DATA(grad_k)
    pull.grad_v = <char *>cnp.PyArray_DATA(grad_v)
    walk.kernels = gradient_kernels_for(
        product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1]
    )
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.queries - 1) // walk.kernels.queries
    pull.blocks = (walk.n_keys + walk.kernels.pass_keys - 1) // walk.kernels.pass_keys
    if walk.key_heads == 0:
        return
    threads = 1 if alone else min(threads, max(1, key_heads.shape[0] * pull.blocks))
    tiles = <Tile *>malloc(threads * sizeof(Tile))
    if tiles is NULL:
        raise MemoryError(f"{threads * sizeof(Tile)} bytes of scratch")
    try:
        describe_tile(walk, tiles, q, k, v, grad_q, scale, softcap, bias)
        tiles.differentiating = True
        tiles.grad_out_format = number_format(grad_out)
        tiles.grad_out_dim, tiles.result_dim = pull.grad_out.dim, pull.result.dim
        tiles.wants_bias, tiles.wants_sums = grad_bias is not None, row_sums is not None
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
