# Part of kernels.pyx: the walk backward.

cdef struct Turns:
    # Key heads whose operand broadcasts add to one gradient. They do so in the order of their items, so
    # that the sum does not depend on the threads.
    Py_ssize_t sharers  # of each gradient
    Py_ssize_t parts  # of each gradient, that have their turns by themselves
    int64_t *place  # (key heads): which gradient is theirs
    int64_t *before  # (key heads): how many come before them
    int64_t *count  # (gradients, parts): how many have had their turn


cdef struct Pull:
    # A walk backward; `out` of the walk is the gradient of q.
    Walk walk
    Operand grad_out, result, lse, grad_lse, rows, grad_k, grad_v, grad_bias, row_sums
    double coarse  # the size from which on an lse has lost digits that its row's weights show
    const int64_t *key_heads  # as many of them as `sharers` are one item after another
    Py_ssize_t sharers, blocks  # of keys
    Turns q_turns, k_turns, v_turns  # parts: tiles of queries, blocks of keys


cdef Py_ssize_t place_of_gradient(const Walk *walk, const Operand *grad, Py_ssize_t head) noexcept nogil:
    """Which of the gradients is that of a key head."""
    cdef Py_ssize_t batch = head // walk.kv_heads, place = 0, step = 1
    cdef int axis
    for axis in range(walk.n_batch - 1, -1, -1):
        if grad.batch[axis] != 0:
            place += batch % walk.shape[axis] * step
            step *= walk.shape[axis]
        batch //= walk.shape[axis]
    return place + head % walk.kv_heads * step if grad.head != 0 else place


cdef int64_t *take_turns(
    Pull *pull, Turns *turns, const Operand *grad, Py_ssize_t parts, int64_t *room
) noexcept nogil:
    """Settle who takes turns. Returns what is left of the room, which is 0 before."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t n, head, heads = walk.key_heads
    turns.sharers, turns.parts = 1, parts
    turns.place, turns.before, turns.count = room, room + heads, room + 2 * heads
    for n in range(heads):
        head = pull.key_heads[n]
        turns.place[head] = place_of_gradient(walk, grad, head)
        turns.before[head] = turns.count[turns.place[head]]
        turns.count[turns.place[head]] += 1
        turns.sharers = max(turns.sharers, turns.count[turns.place[head]])
    memset(turns.count, 0, heads * sizeof(int64_t))
    return turns.count + heads * max(parts, 1)


cdef inline int64_t *turn_of(const Turns *turns, Py_ssize_t head, Py_ssize_t part) noexcept nogil:
    return turns.count + turns.place[head] * turns.parts + part


cdef inline bint await_turn(const int64_t *turn, int64_t own, bint *stopped) noexcept nogil:
    """False if the walk was stopped."""
    while read_count(turn) < own:
        if stopped[0]:
            return False
        sched_yield()
    return True


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
    walk.kernels.backward.prepare(tile)
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
    if not each_block(walk.kernels.attend, walk.kernels.block_k, tile, listen, last_look, stopped):
        return False
    walk.kernels.backward.normalize(tile)
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


cdef bint prepare_item(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """The rows of one tile: an Item of a Pull."""
    cdef const Pull *pull = <const Pull *>call
    return prepare_tile(pull, tile, place_of(&pull.walk, item), listen, last_look, stopped)


cdef bint differentiate_tile(
    const Pull *pull, Tile *tile, Place at, Py_ssize_t block, bint *stopped
) noexcept nogil:
    """One tile of queries and one block of keys. False if the walk was stopped."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t begin = block * walk.kernels.block_k, i, n, head, query
    cdef Py_ssize_t end = min(begin + walk.kernels.block_k, walk.n_keys)
    cdef char *grad_out = entry(walk, &pull.grad_out, at.batch)
    cdef char *grad_lse = entry(walk, &pull.grad_lse, at.batch)
    cdef char *rows = entry(walk, &pull.rows, at.batch)
    cdef Row *row
    cdef char *grad_bias = entry(walk, &pull.grad_bias, at.batch)
    cdef char *row_sums = entry(walk, &pull.row_sums, at.batch)
    cdef Py_ssize_t key_head = at.batch * walk.kv_heads + at.kv_head
    cdef int64_t *turn = turn_of(&pull.q_turns, key_head, at.first // walk.kernels.block_q)
    cdef int64_t own = block * pull.q_turns.sharers + pull.q_turns.before[key_head]
    cdef bint shared = pull.q_turns.sharers > 1, some = False
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
    if tile.first < end and begin < tile.last:
        some = walk.kernels.backward.differentiate(tile, begin, end)
    elif not shared:
        return True
    # Blocks are added in their order, so that the sum does not depend on the threads.
    if (shared or tile.first < begin) and not await_turn(turn, own, stopped):
        return False
    if some:
        walk.kernels.backward.add(tile)
        for i in range(tile.n_queries if row_sums is not NULL else 0):
            head = at.kv_head * walk.group + (at.first + i) % walk.group
            query = (at.first + i) // walk.group
            for n in range(4):
                (<double *>row_of(&pull.row_sums, row_sums, head, query))[n] += tile.row_sums[i][n]
    set_count(turn, own + 1)
    return True


cdef bint differentiate_block(
    const Pull *pull, Tile *tile, Py_ssize_t head, Py_ssize_t block, bint listen, double *last_look,
    bint *stopped,
) noexcept nogil:
    """One block of keys of one key head. False if a signal came in between."""
    cdef const Walk *walk = &pull.walk
    cdef Py_ssize_t n
    cdef Py_ssize_t begin = block * walk.kernels.block_k
    cdef Py_ssize_t end = min(begin + walk.kernels.block_k, walk.n_keys)
    cdef Py_ssize_t batch = head // walk.kv_heads, kv_head = head % walk.kv_heads
    cdef int64_t *k_turn = turn_of(&pull.k_turns, head, block)
    cdef int64_t *v_turn = turn_of(&pull.v_turns, head, block)
    tile.k = entry(walk, &walk.k, batch) + kv_head * walk.k.head
    tile.v = entry(walk, &walk.v, batch) + kv_head * walk.v.head
    tile.grad_k = entry(walk, &pull.grad_k, batch) + kv_head * pull.grad_k.head
    tile.grad_v = entry(walk, &pull.grad_v, batch) + kv_head * pull.grad_v.head
    tile.adds_k = pull.k_turns.before[head] > 0
    tile.adds_v = pull.v_turns.before[head] > 0
    walk.kernels.backward.begin_keys(tile, begin, end)
    for n in range(walk.tiles):
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        if not differentiate_tile(pull, tile, place_of(walk, head * walk.tiles + n), block, stopped):
            return False
    if not await_turn(k_turn, pull.k_turns.before[head], stopped):
        return False
    if not await_turn(v_turn, pull.v_turns.before[head], stopped):
        return False
    walk.kernels.backward.store_keys(tile, begin, end)
    set_count(k_turn, pull.k_turns.before[head] + 1)
    set_count(v_turn, pull.v_turns.before[head] + 1)
    return True


cdef bint differentiate_item(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """One block of keys of key heads that share a bias, in their order: an Item of a Pull."""
    cdef const Pull *pull = <const Pull *>call
    cdef Py_ssize_t groups = pull.walk.key_heads // pull.sharers
    cdef Py_ssize_t group = item // pull.blocks, block = item % pull.blocks, i
    cdef const int64_t *heads
    if pull.q_turns.sharers > 1:  # who waits for a turn waits for items before it
        group, block = item % groups, item // groups
    heads = pull.key_heads + group * pull.sharers
    for i in range(pull.sharers):
        if not differentiate_block(pull, tile, heads[i], block, listen, last_look, stopped):
            return False
    return True


cdef int pull_back(const Pull *pull, int threads, Tile *tiles) except -1:
    cdef Py_ssize_t items = pull.walk.key_heads // pull.sharers * pull.blocks
    with nogil:
        # In the order of their numbers: a block waits only for those before it.
        if each_item(prepare_item, pull, tiles, pull.walk.key_heads * pull.walk.tiles, threads):
            each_item(differentiate_item, pull, tiles, items, threads)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def differentiate(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray out not None, cnp.ndarray lse not None, cnp.ndarray grad_out not None,
    cnp.ndarray grad_lse, cnp.ndarray rows not None, double coarse,
    cnp.ndarray grad_q not None, cnp.ndarray grad_k not None, cnp.ndarray grad_v not None,
    tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, key_range, cnp.ndarray mask,
    str product, int threads,
    cnp.ndarray grad_bias, cnp.ndarray row_sums, cnp.ndarray key_heads not None,
):
    """Add to `grad_q`, (batch, heads, queries, head_dim), which must be 0 before, and fill `grad_k`
    and `grad_v`, (batch, kv_heads, keys, dim): of the dtype of sums, without gaps between the dims.
    Along axes of length 1 that the call has more of they are summed; where there are none `grad_k` and
    `grad_v` may also be of half precision.

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
    cdef int64_t *turns
    cdef Py_ssize_t scratch_bytes, total_bytes, counts
    cdef Walk *walk = &pull.walk
    describe_walk(
        walk, q, k, v, grad_q, batch, heads, kv_heads, alibi, sinks, key_range, mask, bias,
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
    describe(walk, &pull.grad_k, grad_k, 3)
    describe(walk, &pull.grad_v, grad_v, 3)
    walk.kernels = backward_kernels_for(
        product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1]
    )
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.block_q - 1) // walk.kernels.block_q
    pull.blocks = (walk.n_keys + walk.kernels.block_k - 1) // walk.kernels.block_k
    if walk.key_heads * pull.blocks == 0:
        grad_k.fill(0)
        grad_v.fill(0)
    if walk.key_heads == 0:
        return
    threads = available_threads(min(threads, max(1, key_heads.shape[0] * pull.blocks)))
    tiles = <Tile *>malloc(threads * sizeof(Tile))
    if tiles is NULL:
        raise MemoryError(f"{threads * sizeof(Tile)} bytes of scratch")
    try:
        describe_tile(walk, tiles, q, k, v, grad_q, scale, softcap, bias)
        tiles.differentiating = True
        tiles.grad_out_format = number_format(grad_out)
        tiles.grad_out_dim, tiles.result_dim = pull.grad_out.dim, pull.result.dim
        tiles.grad_out_format = number_format(grad_out)
        tiles.grad_k_format, tiles.grad_v_format = number_format(grad_k), number_format(grad_v)
        tiles.grad_k_key, tiles.grad_v_key = pull.grad_k.row, pull.grad_v.row
        tiles.wants_bias, tiles.wants_sums = grad_bias is not None, row_sums is not None
        tiles.rows_share_bias = grad_bias is not None and pull.grad_bias.row == 0
        scratch_bytes = walk.kernels.backward.scratch_bytes(tiles)
        counts = walk.key_heads * (6 + max(walk.tiles, 1) + 2 * max(pull.blocks, 1)) * sizeof(int64_t)
        total_bytes = threads * scratch_bytes + counts + 64
        scratch = <char *>malloc(total_bytes)
        if scratch is NULL:
            raise MemoryError(f"{total_bytes} bytes of scratch")
        turns = <int64_t *>share_scratch(tiles, threads, scratch, scratch_bytes)
        memset(turns, 0, counts)
        turns = take_turns(&pull, &pull.q_turns, &walk.out, walk.tiles, turns)
        turns = take_turns(&pull, &pull.k_turns, &pull.grad_k, pull.blocks, turns)
        take_turns(&pull, &pull.v_turns, &pull.grad_v, pull.blocks, turns)
        pull_back(&pull, threads, tiles)
    finally:
        free(tiles)
        free(scratch)
