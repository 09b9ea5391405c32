# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The macro-kernel: walks the tiles of a problem on several threads.

What happens inside a tile is ``tile.c``; which instruction set's copy of it runs is
``instruction_sets.c``.
"""

import os

import numpy as np

cimport numpy as cnp
from cpython.unicode cimport PyUnicode_AsUTF8
from cython.parallel cimport prange, threadid
from libc.math cimport log
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.stdlib cimport getenv as c_getenv
from libc.string cimport memcpy, memset

cnp.import_array()

cdef extern from "Python.h":
    # Without `except`: the exception stays set until the walk is over.
    int PyErr_CheckSignals() noexcept
    void *PyErr_Occurred() noexcept

cdef extern from "tile.h" nogil:
    enum:
        STRIP_KEYS
        MAX_QUERIES
    const double WEIGHT_UNIT

    ctypedef struct NumberFormat:
        char kind
        int bytes, swapped

    ctypedef enum Measure:
        DOT
        DISTANCE
        ADDITIVE
    ctypedef struct Candidate:
        pass

    Py_ssize_t cell_of(Py_ssize_t i, Py_ssize_t n, Py_ssize_t cells)

    ctypedef struct Tile:
        const char *q[MAX_QUERIES]
        char *out[MAX_QUERIES]
        const char *k
        const char *v
        const float *k_scales
        const float *v_scales
        NumberFormat q_format, kv_format, out_format
        Py_ssize_t q_dim, out_dim, k_key, k_dim, v_key, v_dim
        Py_ssize_t n_queries, head_dim, value_dim, pass_keys
        double scale, margin
        Measure measure
        const double *measure_weights
        Py_ssize_t start[MAX_QUERIES]
        Py_ssize_t stop[MAX_QUERIES]
        double softcap
        bint has_mask, has_bias, has_alibi, has_sinks
        const char *mask[MAX_QUERIES]
        const char *bias[MAX_QUERIES]
        Py_ssize_t mask_key, bias_key
        NumberFormat bias_format
        double slope[MAX_QUERIES]
        double sink[MAX_QUERIES]
        Py_ssize_t position[MAX_QUERIES]
        char *weights[MAX_QUERIES]
        Py_ssize_t weights_key
        bint want_lse
        double lse[MAX_QUERIES]
        void *scratch
        bint differentiating
        const char *grad_out[MAX_QUERIES]
        Py_ssize_t grad_out_dim
        double delta[MAX_QUERIES]
        char *grad_k
        char *grad_v
        bint wants_bias, wants_slope, rows_share_bias
        char *grad_bias[MAX_QUERIES]
        double grad_slope[MAX_QUERIES][3]
        double *pooled
        int slot[MAX_QUERIES]
        Py_ssize_t pooled_row, columns, n_keys
        Candidate *best
        Py_ssize_t n_best
        double least[MAX_QUERIES]
        int64_t *keys[MAX_QUERIES]
        Py_ssize_t first, last

    ctypedef struct GradientKernels:
        size_t (*scratch_bytes)(const Tile *) noexcept nogil
        void (*open)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        bint (*differentiate)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*add)(Tile *) noexcept nogil
        void (*close)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil

    ctypedef struct TileKernels:
        int queries, panel, pass_keys
        size_t (*scratch_bytes)(const Tile *, Py_ssize_t) noexcept nogil
        void (*begin)(Tile *) noexcept nogil
        void (*attend)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        bint (*finish)(Tile *) noexcept nogil
        void (*weights)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*pool)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*collect)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*rank)(Tile *) noexcept nogil
        double (*join)(
            char *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, char *, Py_ssize_t,
            NumberFormat,
        ) noexcept nogil
        int real_bytes
        const GradientKernels *gradient
        double (*peak)(Py_ssize_t) noexcept nogil

cdef extern from "instruction_sets.h" nogil:
    ctypedef struct InstructionSet:
        const char *name
        const char *features
        bint (*runs_here)() noexcept nogil
        const TileKernels *float64
        const TileKernels *float32
        const TileKernels *float16
        const TileKernels *bfloat16
        const TileKernels *few

    const InstructionSet INSTRUCTION_SETS[]
    const int N_INSTRUCTION_SETS

cdef extern from "openmp.h" nogil:
    int omp_get_max_threads()
    double seconds()
    int64_t read_count(const int64_t *)
    void set_count(int64_t *, int64_t)

cdef extern from "sched.h" nogil:
    int sched_yield()


def getenv(str name):
    """The environment variable `name`, or None; as `os.getenv`, but fast."""
    cdef const char *value = c_getenv(PyUnicode_AsUTF8(name))
    return None if value is NULL else value.decode("utf-8", "surrogateescape")


# Instruction sets ------------------------------------------------------------------------------

FEATURES = ("avx2", "avx512", "avx512_bf16", "amx")  # the names that may be disabled, on any machine

cdef const InstructionSet *best = NULL
for _i in range(N_INSTRUCTION_SETS):
    if INSTRUCTION_SETS[_i].runs_here():
        best = &INSTRUCTION_SETS[_i]
        break


# Queries of one key head up to which packing keys for the other kernels would cost more than it saves.
cdef enum:
    FEW = 16

# With no more queries than these a key head is one item of work, which may leave threads idle, so
# its keys are split between them, in parts that depend on their number alone. No more than so many,
# because each takes room for what it finds, and time though nobody sees it.
cdef enum:
    SPLIT = 32
    PART_KEYS = 2048
    MOST_PARTS = 64


cdef const TileKernels *kernels_for(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
) except NULL:
    """The kernels in use for products of that kind and that many queries of one key head.

    `product` is a dtype by NumPy's character: d, f, e, or E, which is ml_dtypes' for bfloat16.
    """
    cdef const InstructionSet *isa = chosen()
    if product == "d":
        return isa.float64
    if queries <= FEW or not dot:  # other measures have no parts to multiply
        return isa.few
    if product == "f":
        return isa.float32 if worth_three_parts(head_dim, value_dim) else isa.few
    return isa.float16 if product == "e" else isa.bfloat16


cdef const TileKernels *gradient_kernels_for(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim
) except NULL:
    """The kernels of gradients, likewise. Three parts are worth their packing from 64 queries and 64 dims
    on, where they take 3/4 to 5/6 of the time."""
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, True)
    if product == "f":
        kernels = chosen().float32 if queries >= 64 and head_dim + value_dim >= 128 else chosen().few
    return chosen().few if kernels.gradient is NULL else kernels


cdef bint worth_three_parts(Py_ssize_t head_dim, Py_ssize_t value_dim) noexcept nogil:
    """Do parts multiply so many dims of float32 sooner than multiply-adds? They take 3/4 of the time
    a dim, but dims in whole chunks of 32 and of 16, and longer for what comes with every key: at 32,
    48 and 56 both take as long, at 64 parts are 15 % faster, and 20 % at 96 and 128.
    """
    cdef Py_ssize_t padded = (head_dim + 31) // 32 * 32 + (value_dim + 15) // 16 * 16
    return 4 * (head_dim + value_dim) - 3 * padded > (75 if value_dim else 37)


def tile_size(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """How many of the queries of one key head a tile and a panel take, and how many keys a pass."""
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, dot)
    return min(queries, kernels.queries), min(queries, kernels.panel), kernels.pass_keys


def multiplied_as(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """What the kernels for such products multiply, in words."""
    cdef const InstructionSet *isa = chosen()
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, dot)
    if kernels is isa.float64:
        return "float64"
    if kernels is isa.few:
        return "float32"
    if kernels is isa.bfloat16:
        return "bfloat16"
    return "two bfloat16 parts" if kernels is isa.float16 else "three bfloat16 parts"


def instruction_sets():
    """The instruction sets that this machine can run, fastest first."""
    return tuple(
        INSTRUCTION_SETS[i].name.decode()
        for i in range(N_INSTRUCTION_SETS)
        if INSTRUCTION_SETS[i].runs_here()
    )


def instruction_set():
    """The instruction set in use: the fastest whose features are not disabled."""
    return chosen().name.decode()


cdef const InstructionSet *chosen() except NULL:
    # Read at every call, and from C, where it costs next to nothing.
    cdef const char *setting = c_getenv("FASTATTN_DISABLE_CPU_FEATURES")
    if setting is NULL or setting[0] == 0:
        return best
    disabled = setting.decode().replace(",", " ").split()
    for name in disabled:
        if name not in FEATURES:
            raise ValueError(
                f"FASTATTN_DISABLE_CPU_FEATURES: {name!r} given, some of {' '.join(FEATURES)} wanted"
            )
    for i in range(N_INSTRUCTION_SETS):
        needs = INSTRUCTION_SETS[i].features.decode().split()
        if INSTRUCTION_SETS[i].runs_here() and not set(needs) & set(disabled):
            return &INSTRUCTION_SETS[i]
    return best  # an instruction set without optional features


# Threads ---------------------------------------------------------------------------------------

# OpenMP's threads do not survive a fork, and its runtime does not notice: a child of a process that
# has used them must go on alone.
cdef bint pool_started = False
cdef bint alone = False


def _after_fork():
    global alone
    alone = pool_started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def openmp_threads():
    """How many threads OpenMP would use now: OMP_NUM_THREADS, threadpoolctl, the affinity."""
    return 1 if alone else omp_get_max_threads()


# The caller's thread looks for Ctrl-C this often.
cdef double SIGNAL_INTERVAL = 0.05


cdef bint interrupted(double *last_look) noexcept nogil:
    """Has a signal handler raised? The exception stays set in the calling thread."""
    cdef double now = seconds()
    if now - last_look[0] < SIGNAL_INTERVAL:
        return False
    last_look[0] = now
    with gil:
        return PyErr_CheckSignals() < 0


# The walk --------------------------------------------------------------------------------------

cdef struct Operand:
    # An array of (batch, heads, rows, dims), by base pointer and byte strides; NULL: not given.
    char *data
    Py_ssize_t head, row, dim
    Py_ssize_t batch[64]  # one stride per batch axis, 0 where it broadcasts


cdef struct Survey:
    # What is made of the weights besides: their sums over cells of queries x keys, or each query's
    # strongest keys; see maps.pxi.
    double *sums  # (batch, heads, rows, columns); NULL: not asked for
    Py_ssize_t rows, columns, slots  # slots: the most rows, by head, that a tile's queries are in
    int64_t *turn  # (batch, kv_heads): whose turn it is to add to the sums
    Operand indices  # (batch, heads, queries, n_best)
    Py_ssize_t n_best  # 0: not asked for


cdef struct Walk:
    # Everything that the tiles of one call share.
    const TileKernels *kernels
    Operand q, k, v, k_scales, v_scales, out, start, stop, q_offset, mask, bias, weights, lse
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
    at.first = (walk.tiles - 1 - item % walk.tiles) * walk.kernels.queries
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
    cdef Py_ssize_t offset = 0, i, query, head, first_key = 0, last_key = walk.n_keys
    cdef char *q = entry(walk, &walk.q, at.batch)
    cdef char *out = entry(walk, &walk.out, at.batch)
    cdef char *start = entry(walk, &walk.start, at.batch)
    cdef char *stop = entry(walk, &walk.stop, at.batch)
    cdef char *mask = entry(walk, &walk.mask, at.batch)
    cdef char *bias = entry(walk, &walk.bias, at.batch)
    cdef char *weights = entry(walk, &walk.weights, at.batch)
    cdef char *partial = NULL
    if walk.q_offset.data is not NULL:
        offset = (<int64_t *>entry(walk, &walk.q_offset, at.batch))[0]
    tile.n_queries = min(walk.kernels.queries, walk.group * walk.n_queries - at.first)
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
        last_key = first_key + walk.part_keys
        partial = partial_of(walk, at.batch, at.kv_head) + at.part * walk.partial_bytes
        partial += tile.n_queries * sizeof(double)
    # The heads of a group lie side by side, so that a tile's queries are neighbours in position.
    query = at.first // walk.group
    head = at.kv_head * walk.group + at.first % walk.group
    for i in range(tile.n_queries):
        tile.q[i] = row_of(&walk.q, q, head, query)
        tile.out[i] = row_of(&walk.out, out, head, query)
        if partial is not NULL:
            tile.out[i] = partial + i * tile.value_dim * walk.kernels.real_bytes
        tile.start[i] = 0
        tile.stop[i] = walk.n_keys
        if start is not NULL:
            tile.start[i] = (<int64_t *>row_of(&walk.start, start, head, query))[0]
            tile.stop[i] = (<int64_t *>row_of(&walk.stop, stop, head, query))[0]
        tile.start[i] = max(tile.start[i], first_key)
        tile.stop[i] = min(tile.stop[i], last_key)
        if mask is not NULL:
            tile.mask[i] = row_of(&walk.mask, mask, head, query)
        if bias is not NULL:
            tile.bias[i] = row_of(&walk.bias, bias, head, query)
        if weights is not NULL:
            tile.weights[i] = row_of(&walk.weights, weights, head, query)
        if walk.alibi is not NULL:
            tile.slope[i] = walk.alibi[head]
            tile.position[i] = query + offset
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


include "maps.pxi"


ctypedef void (*Step)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil

cdef bint each_pass(
    Step step, Py_ssize_t keys, Tile *tile, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Take every pass of keys that the tile sees. False if a signal came in between."""
    cdef Py_ssize_t key = tile.first // keys * keys
    while key < tile.last:
        if stopped[0] or (listen and interrupted(last_look)):
            return False
        step(tile, max(key, tile.first // STRIP_KEYS * STRIP_KEYS), min(key + keys, tile.last))
        key += keys
    return True


cdef bint attend_tile(
    const Walk *walk, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Attend from the queries of one tile. False if a signal came in between."""
    cdef Py_ssize_t keys = walk.kernels.pass_keys, i
    cdef Place at = place_of(walk, item)
    cdef char *lse = entry(walk, &walk.lse, at.batch)
    cdef double *partial
    set_tile(walk, tile, at)
    set_survey(walk, tile, at)
    tile.margin = 0
    while True:
        walk.kernels.begin(tile)
        if not each_pass(walk.kernels.attend, keys, tile, listen, last_look, stopped):
            return False
        if walk.kernels.finish(tile):
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
        if not each_pass(walk.kernels.pool, keys, tile, listen, last_look, stopped):
            return False
        return add_in_turn(walk, tile, at, listen, last_look, stopped)
    if walk.survey.n_best:
        if not each_pass(walk.kernels.collect, keys, tile, listen, last_look, stopped):
            return False
        walk.kernels.rank(tile)
        return True
    if walk.weights.data is not NULL:
        return each_pass(walk.kernels.weights, keys, tile, listen, last_look, stopped)
    return True


cdef int work(const Walk *walk, Py_ssize_t items, int threads, Tile *tiles) except -1:
    """Attend to all tiles. An interruption leaves the rest undone and raises."""
    global pool_started
    cdef bint stopped = False
    cdef bint *stop = &stopped  # what a prange assigns to by name is each thread's own
    cdef double last_look = seconds()
    cdef Py_ssize_t item
    if threads > 1:
        pool_started = True
    with nogil:
        if threads == 1:
            for item in range(items):
                if not attend_tile(walk, tiles, item, True, &last_look, stop):
                    stop[0] = True
                    break
        else:
            for item in prange(items, num_threads=threads, schedule="dynamic", chunksize=1):
                if not stop[0]:
                    if not attend_tile(
                        walk, &tiles[threadid()], item, threadid() == 0, &last_look, stop
                    ):
                        stop[0] = True
        if walk.parts > 1 and not stop[0]:
            join_parts(walk, tiles)
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


cdef NumberFormat number_format(cnp.ndarray array):
    cdef NumberFormat format
    cdef cnp.dtype dtype = array.descr
    format.kind = ord("b") if dtype.kind == ord("V") else dtype.kind  # ml_dtypes' bfloat16
    format.bytes = dtype.itemsize
    format.swapped = dtype.byteorder == ord(">")
    return format


cdef const double *doubles(cnp.ndarray array):
    return NULL if array is None else <const double *>cnp.PyArray_DATA(array)


def attend(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray k_scales, cnp.ndarray v_scales, cnp.ndarray out not None, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, double scale, double softcap,
    cnp.ndarray bias, cnp.ndarray alibi, cnp.ndarray sinks, cnp.ndarray q_offset,
    cnp.ndarray start, cnp.ndarray stop, cnp.ndarray mask,
    cnp.ndarray lse, cnp.ndarray weights, cnp.ndarray order, str product, int threads,
    bint for_gradients, measure, cnp.ndarray sums, cnp.ndarray indices,
):
    """Fill `out`, (batch, heads, queries, value_dim), and what else is not None.

    `k` and `v` have one dtype: float16, bfloat16, that of the kernels, or int8 with `k_scales` and
    `v_scales`, float32 (batch, kv_heads, keys) without gaps between the keys.
    `lse`, (batch, heads, queries), is float32 or float64; `weights`, (batch, heads, queries, keys),
    must be 0 before. `start` and `stop` are int64, `alibi` and `sinks` contiguous float64,
    `q_offset` int64.
    `order`, int64, is that in which the flattened batch entries are taken. A `softcap` of 0 is none.
    `product` says whose kernels multiply, as in `kernels_for`; `for_gradients` makes scores bit for
    bit as `differentiate` does. `measure` is that of a Problem if other than DOT. All must have
    been validated: nothing is checked here.

    To `sums`, float64 (batch, heads, rows, columns) and contiguous, the weights of each cell of
    queries x keys are added. Or `indices`, int64 (batch, heads, queries, n) without gaps along the
    last axis, and `weights` of the same shape are those of each query's n strongest keys, and out of
    sight -1 and 0. For either `out` has a value_dim of 0 and the dtype of sums.
    """
    cdef Walk walk
    cdef Tile *tiles
    cdef char *scratch = NULL
    cdef Py_ssize_t items, i, scratch_bytes, tile_bytes, total_bytes
    describe_walk(
        &walk, q, k, v, out, batch, heads, kv_heads, alibi, sinks, q_offset, start, stop, mask, bias
    )
    describe(&walk, &walk.k_scales, k_scales, 2)
    describe(&walk, &walk.v_scales, v_scales, 2)
    describe(&walk, &walk.weights, weights, 3)
    describe(&walk, &walk.lse, lse, 2)
    walk.lse_bytes = 0 if lse is None else lse.descr.itemsize
    walk.order = NULL if order is None else <const int64_t *>cnp.PyArray_DATA(order)
    if for_gradients:
        walk.kernels = gradient_kernels_for(
            product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1]
        )
    else:
        walk.kernels = kernels_for(
            product, walk.group * walk.n_queries, q.shape[q.ndim - 1], v.shape[v.ndim - 1],
            measure is None,
        )
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.queries - 1) // walk.kernels.queries
    describe_survey(&walk, sums, indices)
    if (
        walk.group * walk.n_queries <= SPLIT and walk.n_keys >= 2 * PART_KEYS
        and weights is None and sums is None
    ):
        walk.part_keys = (walk.n_keys // (MOST_PARTS * PART_KEYS) + 1) * PART_KEYS
        walk.parts = (walk.n_keys + walk.part_keys - 1) // walk.part_keys
    items = walk.key_heads * walk.tiles * walk.parts
    if items == 0:
        return
    threads = 1 if alone else min(threads, items)

    tiles = <Tile *>malloc(threads * sizeof(Tile))
    if tiles is NULL:
        raise MemoryError(f"{threads * sizeof(Tile)} bytes of scratch")
    try:
        describe_tile(&walk, tiles, q, k, v, out, scale, softcap, bias)
        tiles.weights_key = walk.weights.dim
        if measure is not None:
            tiles.measure = {"distance": DISTANCE, "additive": ADDITIVE}[measure[0]]
            tiles.measure_weights = doubles(measure[1])
        tiles.want_lse = lse is not None
        tiles.differentiating = for_gradients  # no other layout for few queries
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
            tiles, min(walk.kernels.queries, walk.group * walk.n_queries)
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


cdef int describe_walk(
    Walk *walk, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out, tuple batch,
    Py_ssize_t heads, Py_ssize_t kv_heads, cnp.ndarray alibi, cnp.ndarray sinks,
    cnp.ndarray q_offset, cnp.ndarray start, cnp.ndarray stop, cnp.ndarray mask, cnp.ndarray bias,
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
    describe(walk, &walk.start, start, 2)
    describe(walk, &walk.stop, stop, 2)
    describe(walk, &walk.q_offset, q_offset, 0)
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
    walk.survey.sums, walk.survey.n_best = NULL, 0
    return 0


cdef int describe_tile(
    const Walk *walk, Tile *tile, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, cnp.ndarray out,
    double scale, double softcap, cnp.ndarray bias,
) except -1:
    """What all tiles of a walk have in common."""
    tile.k_scales = tile.v_scales = NULL
    tile.q_format = number_format(q)
    tile.kv_format = number_format(k)
    tile.out_format = walk.out_format
    tile.q_dim, tile.out_dim = walk.q.dim, walk.out.dim
    tile.k_dim, tile.k_key = walk.k.dim, walk.k.row
    tile.v_dim, tile.v_key = walk.v.dim, walk.v.row
    tile.head_dim = q.shape[q.ndim - 1]
    tile.value_dim = v.shape[v.ndim - 1]
    tile.pass_keys = min(walk.kernels.pass_keys, walk.n_keys)
    tile.scale = scale
    tile.softcap = softcap
    tile.measure = DOT
    tile.measure_weights = NULL
    tile.has_mask = walk.mask.data is not NULL
    tile.has_bias = walk.bias.data is not NULL
    tile.has_alibi = walk.alibi is not NULL
    tile.has_sinks = walk.sinks is not NULL
    tile.mask_key = walk.mask.dim
    tile.bias_key = walk.bias.dim
    if bias is not None:
        tile.bias_format = number_format(bias)
    tile.weights_key = tile.n_best = 0
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


# Gradients -------------------------------------------------------------------------------------

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
    threads = 1 if alone else min(threads, key_heads.shape[0] * pull.blocks)
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


def peak_flops(dtype, int threads, Py_ssize_t rounds=2_000_000):
    """Flop/s of multiply-adds that never leave the registers: the roof over every kernel, but those
    of float32 in parts, which have another.
    """
    kind = np.dtype(dtype).char
    cdef const TileKernels *kernels = kernels_for(
        kind, 1 if kind == "f" else MAX_QUERIES, 0, 0, True
    )
    cdef double flops = 0, began = seconds()
    cdef int i
    for i in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        flops += kernels.peak(rounds)
    return flops / (seconds() - began)


cdef int64_t sum_streams(const int64_t *at, Py_ssize_t n) noexcept nogil:
    """Of 4 * n numbers, read from four places at once, as memory likes best."""
    cdef int64_t a = 0, b = 0, c = 0, d = 0
    cdef Py_ssize_t i
    for i in range(n):
        a += at[i]
        b += at[n + i]
        c += at[2 * n + i]
        d += at[3 * n + i]
    return a + b + c + d


def read_bandwidth(int threads, Py_ssize_t thread_bytes=128 << 20):
    """Bytes per second that so many threads read from memory: the roof over decoding."""
    cdef Py_ssize_t n = thread_bytes // 32
    cdef cnp.ndarray numbers = np.ones(threads * 4 * n, np.int64)
    cdef const int64_t *data = <const int64_t *>cnp.PyArray_DATA(numbers)
    cdef int64_t found = 0
    cdef double began, taken = 0
    cdef int i, rounds
    for rounds in range(2):  # the first wakes the threads
        found = 0
        began = seconds()
        for i in prange(threads, nogil=True, num_threads=threads, schedule="static"):
            found += sum_streams(data + i * 4 * n, n)
        taken = seconds() - began
        assert found == numbers.size
    return numbers.nbytes / taken
