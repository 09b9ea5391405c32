# Part of kernels.pyx: the walk forward.

ctypedef void (*Step)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef bint each_block(
    Step step, Py_ssize_t keys, Tile *tile, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Take every block of keys that the tile sees. False if a signal came in between."""
    cdef Py_ssize_t key = tile.first // keys * keys
    while key < tile.last:
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        step(tile, max(key, tile.first // SUB_BLOCK_K * SUB_BLOCK_K), min(key + keys, tile.last))
        key += keys
    return True


cdef bint attend_tile(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Attend from the queries of one tile, an Item of a Walk."""
    cdef const Walk *walk = <const Walk *>call
    cdef Py_ssize_t keys = walk.kernels.block_k, i
    cdef Place at = place_of(walk, item)
    cdef char *lse = entry(walk, &walk.lse, at.batch)
    cdef double *partial
    cdef Step more = NULL  # what is made of the scores once their sums are known
    cdef bint done
    if walk.survey.sums is not NULL:
        more = walk.kernels.accumulate_bins
    elif walk.survey.top_k:
        more = walk.kernels.collect_top_k
    elif walk.weights.data is not NULL:
        more = walk.kernels.weights
    set_tile(walk, tile, at)
    set_survey(walk, tile, at)
    tile.margin = 0
    while True:
        walk.kernels.begin(tile)
        if not each_block(walk.kernels.attend, keys, tile, listen, last_look, stopped):
            return False
        done = walk.kernels.finish(tile)
        if more is not NULL:
            if not each_block(more, keys, tile, listen, last_look, stopped):
                return False
            if walk.survey.top_k:
                walk.kernels.rank_top_k(tile)
        if done:
            break
        tile.margin = log(2 * walk.n_keys * WEIGHT_UNIT)
    if walk.parts > 1:
        partial = <double *>(
            partial_of(walk, at.batch, at.kv_head) + at.part * walk.partial_bytes
        )
        memcpy(partial, tile.lse, tile.n_queries * sizeof(double))
        return True
    for i in range(tile.n_queries if lse is not NULL else 0):
        store_lse(walk, lse, at, i, tile.lse[i])
    if walk.survey.sums is not NULL:
        return add_in_turn(walk, tile, at, listen, last_look, stopped)
    return True


cdef int work(const Walk *walk, Py_ssize_t items, int threads, Tile *tiles) except -1:
    """Attend to all tiles. An interruption leaves the rest undone and raises."""
    with nogil:
        if each_item(attend_tile, walk, tiles, items, threads) and walk.parts > 1:
            join_parts(walk, tiles)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def attend(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray k_scales, cnp.ndarray v_scales, cnp.ndarray out not None, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, key_range, cnp.ndarray mask,
    cnp.ndarray lse, cnp.ndarray weights, cnp.ndarray order, str product, int threads,
    score_function, cnp.ndarray sums, cnp.ndarray indices,
):
    """Fill `out`, (batch, heads, queries, value_dim), and what else is not None.

    `q`, `k` and `v` have a dtype each: float16, bfloat16, float32, or float64 where the kernels sum
    that. Or `k` and `v` are int8 with `k_scales` and `v_scales`, float32 (batch, kv_heads, keys)
    without gaps between the keys.
    `lse`, (batch, heads, queries), is float32 or float64; `weights`, (batch, heads, queries, keys),
    must be 0 before. `key_range` is a `KeyRange`; `alibi` and `sinks` are contiguous float64.
    `order`, int64, is that in which the flattened batch entries are taken. A `softcap` of 0 is none.
    `product` says whose kernels multiply, as in `kernels_for`. `score_function` is that of the
    Problem if other than DOT. All must have
    been validated: nothing is checked here.

    To `sums`, float64 (batch, heads, rows, columns) and contiguous, the weights of each bin of
    queries x keys are added. Or `indices`, int64 (batch, heads, queries, n) without gaps along the
    last axis, and `weights` of the same shape are those of each query's n top keys, and for hidden
    keys -1 and 0. For either `out` has a value_dim of 0 and the dtype of sums.
    """
    cdef Walk walk
    cdef Tile *tiles
    cdef char *scratch = NULL
    cdef Py_ssize_t items, i, scratch_bytes, tile_bytes, total_bytes
    describe_walk(
        &walk, q, k, v, out, batch, heads, kv_heads, alibi, sinks, key_range, mask, bias,
    )
    describe(&walk, &walk.k_scales, k_scales, 2)
    describe(&walk, &walk.v_scales, v_scales, 2)
    describe(&walk, &walk.weights, weights, 3)
    describe(&walk, &walk.lse, lse, 2)
    walk.lse_bytes = 0 if lse is None else lse.descr.itemsize
    walk.order = NULL if order is None else <const int64_t *>cnp.PyArray_DATA(order)
    walk.kernels = kernels_for(
        product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1],
        score_function is None,
    )
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.block_q - 1) // walk.kernels.block_q
    describe_survey(&walk, sums, indices)
    if (
        walk.group * walk.n_queries <= MAX_SPLIT_ROWS and walk.n_keys >= 2 * SPLIT_KEYS
        and weights is None and sums is None
    ):
        walk.part_keys = (walk.n_keys // (MAX_SPLITS * SPLIT_KEYS) + 1) * SPLIT_KEYS
        walk.parts = (walk.n_keys + walk.part_keys - 1) // walk.part_keys
    items = walk.key_heads * walk.tiles * walk.parts
    if items == 0:
        return
    threads = available_threads(min(threads, items))

    tiles = <Tile *>malloc(threads * sizeof(Tile))
    if tiles is NULL:
        raise MemoryError(f"{threads * sizeof(Tile)} bytes of scratch")
    try:
        describe_tile(&walk, tiles, q, k, v, out, scale, softcap, bias)
        tiles.weights_key = walk.weights.dim
        if score_function is not None:
            tiles.score_function = {
                "distance": DISTANCE, "additive": ADDITIVE, "squared distance": SQUARED_DISTANCE,
            }[score_function[0]]
            tiles.dim_weights = doubles(score_function[1])
        tiles.want_lse = lse is not None
        if walk.parts > 1:
            tiles.want_lse = True
            tiles.out_format.kind, tiles.out_format.swapped = ord("f"), False
            tiles.out_format.bytes = tiles.out_dim = walk.kernels.real_bytes
            walk.partial_bytes = (
                walk.group * walk.n_queries
                * (<Py_ssize_t>sizeof(double) + tiles.value_dim * walk.kernels.real_bytes)
            )
            walk.partial_bytes = (walk.partial_bytes + 63) // 64 * 64
        tile_bytes = walk.kernels.scratch_bytes(
            tiles, min(walk.kernels.block_q, walk.group * walk.n_queries)
        )
        scratch_bytes = tile_bytes + survey_bytes(&walk)
        total_bytes = threads * scratch_bytes + 64
        if walk.parts > 1:
            total_bytes += items * walk.partial_bytes
        if sums is not None:
            total_bytes += walk.key_heads * sizeof(int64_t)
        scratch = <char *>malloc(total_bytes)
        if scratch is NULL:
            raise MemoryError(f"{total_bytes} bytes of scratch")
        walk.partial = share_scratch(tiles, threads, scratch, scratch_bytes)
        if sums is not None:
            walk.survey.turn = <int64_t *>walk.partial
            memset(walk.survey.turn, 0, walk.key_heads * sizeof(int64_t))
        for i in range(threads):
            describe_surveyed(&walk, &tiles[i], <char *>tiles[i].scratch + tile_bytes)
        work(&walk, items, threads, tiles)
    finally:
        free(tiles)
        free(scratch)
