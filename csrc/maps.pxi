# Part of kernels.pyx: what the tiles of a walk know of its survey, and how their sums join.

cdef enum:
    WIDEST_LANES = 16  # a vector of sums may reach so far beyond the last column


cdef int describe_survey(Walk *walk, cnp.ndarray sums, cnp.ndarray indices) except -1:
    """Both of (batch, heads, ...), or None; after the rest of the walk."""
    cdef Survey *survey = &walk.survey
    cdef Py_ssize_t queries
    if sums is not None and walk.n_queries > 0:
        survey.sums = <double *>cnp.PyArray_DATA(sums)
        survey.rows, survey.columns = sums.shape[sums.ndim - 2], sums.shape[sums.ndim - 1]
        queries = min(walk.n_queries, (walk.kernels.block_q - 1) // walk.group + 2)
        survey.slots = min(survey.rows, (queries - 1) * survey.rows // walk.n_queries + 2)
        survey.slots *= walk.group
    describe(walk, &survey.indices, indices, 3)
    if indices is not None:
        survey.top_k = indices.shape[indices.ndim - 1]
    return 0


cdef Py_ssize_t survey_bytes(const Walk *walk) noexcept nogil:
    """How much scratch the survey takes in each thread."""
    cdef const Survey *survey = &walk.survey
    cdef Py_ssize_t queries = min(walk.kernels.block_q, walk.group * walk.n_queries), bytes = 0
    if survey.sums is not NULL:
        bytes = survey.slots * (survey.columns + WIDEST_LANES) * <Py_ssize_t>sizeof(double)
    if survey.top_k:
        bytes = queries * survey.top_k * <Py_ssize_t>sizeof(Candidate)
    return (bytes + 63) // 64 * 64


cdef void describe_surveyed(const Walk *walk, Tile *tile, char *room) noexcept nogil:
    """What all tiles of a thread have in common; `room` is survey_bytes of scratch."""
    tile.bins = <double *>room
    tile.bin_row = walk.survey.columns + WIDEST_LANES
    tile.columns, tile.n_keys = walk.survey.columns, walk.n_keys
    tile.heaps = <Candidate *>room
    tile.top_k = walk.survey.top_k


cdef void set_survey(const Walk *walk, Tile *tile, Place at) noexcept nogil:
    """What the queries of a tile, which is set, need for a survey."""
    cdef const Survey *survey = &walk.survey
    cdef Py_ssize_t i, first, query, head
    cdef char *indices
    if survey.sums is not NULL:
        first = bin_of(at.first // walk.group, walk.n_queries, survey.rows)
        for i in range(MAX_QUERIES):
            tile.slot[i] = -1
            if i < tile.n_queries:
                query, head = (at.first + i) // walk.group, (at.first + i) % walk.group
                tile.slot[i] = (
                    (bin_of(query, walk.n_queries, survey.rows) - first) * walk.group + head
                )
        memset(tile.bins, 0, survey.slots * tile.bin_row * sizeof(double))
    if survey.top_k:
        indices = entry(walk, &survey.indices, at.batch)
        for i in range(tile.n_queries):
            query, head = (at.first + i) // walk.group, (at.first + i) % walk.group
            tile.keys[i] = <int64_t *>row_of(
                &survey.indices, indices, at.kv_head * walk.group + head, query
            )


cdef void add_pooled(const Walk *walk, const Tile *tile, Place at) noexcept nogil:
    """Add the bins of a tile to the sums of all."""
    cdef const Survey *survey = &walk.survey
    cdef Py_ssize_t slot, head, row, column, first, last
    cdef const double *bins
    cdef double *sums
    if tile.last <= tile.first:
        return
    first = bin_of(tile.first, walk.n_keys, survey.columns)
    last = bin_of(tile.last - 1, walk.n_keys, survey.columns)
    row = bin_of(at.first // walk.group, walk.n_queries, survey.rows)
    head = (at.batch * walk.kv_heads + at.kv_head) * walk.group
    for slot in range(survey.slots):
        if slot > 0 and slot % walk.group == 0:
            row += 1
        if row == survey.rows:
            break
        bins = tile.bins + slot * tile.bin_row
        sums = survey.sums + ((head + slot % walk.group) * survey.rows + row) * survey.columns
        for column in range(first, last + 1):
            sums[column] += bins[column]


cdef bint add_in_turn(
    const Walk *walk, const Tile *tile, Place at, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """The tiles of a key head are added in their order, so that no sum depends on the threads.
    False if a signal came in between.
    """
    cdef int64_t *turn = walk.survey.turn + at.batch * walk.kv_heads + at.kv_head
    cdef int64_t own = walk.tiles - 1 - at.first // walk.kernels.block_q
    while read_count(turn) < own:
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        sched_yield()
    add_pooled(walk, tile, at)
    set_count(turn, own + 1)
    return True
