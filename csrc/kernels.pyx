# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The macro-kernel: walks the tiles of a problem on several threads.

What happens inside a tile is ``tile.c``; which instruction set's copy of it runs is
``instruction_sets.c``.
"""

import os

import numpy as np

cimport numpy as cnp
from cython.parallel cimport prange, threadid
from libc.math cimport log
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.stdlib cimport getenv as c_getenv

cnp.import_array()

cdef extern from "Python.h":
    # Without `except`: the exception stays set until the walk is over.
    int PyErr_CheckSignals() noexcept
    void *PyErr_Occurred() noexcept

cdef extern from "tile.h" nogil:
    enum:
        BLOCK_KEYS
        MAX_QUERIES

    ctypedef struct Tile:
        const void *q[MAX_QUERIES]
        void *out[MAX_QUERIES]
        const void *k
        const void *v
        Py_ssize_t q_dim, out_dim, k_key, k_dim, v_key, v_dim
        Py_ssize_t n_queries, head_dim, value_dim
        double scale, margin
        Py_ssize_t start[MAX_QUERIES]
        Py_ssize_t stop[MAX_QUERIES]
        bint want_lse
        double lse[MAX_QUERIES]
        void *scratch
        Py_ssize_t first, last

    ctypedef struct TileKernels:
        int queries
        size_t (*scratch_bytes)(Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*begin)(Tile *) noexcept nogil
        void (*attend)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        bint (*finish)(Tile *) noexcept nogil
        double (*peak)(Py_ssize_t) noexcept nogil

cdef extern from "instruction_sets.h" nogil:
    ctypedef struct InstructionSet:
        const char *name
        const char *features
        bint (*runs_here)() noexcept nogil
        const TileKernels *float32
        const TileKernels *float64

    const InstructionSet INSTRUCTION_SETS[]
    const int N_INSTRUCTION_SETS

cdef extern from "openmp.h" nogil:
    int omp_get_max_threads()
    double seconds()


def getenv(str name):
    """The environment variable `name`, or None; as `os.getenv`, but fast."""
    cdef const char *value = c_getenv(name.encode())
    return None if value is NULL else value.decode("utf-8", "surrogateescape")


# Instruction sets ------------------------------------------------------------------------------

FEATURES = ("avx2", "avx512", "avx512_bf16")  # the names that may be disabled, on any machine

cdef const InstructionSet *best = NULL
for _i in range(N_INSTRUCTION_SETS):
    if INSTRUCTION_SETS[_i].runs_here():
        best = &INSTRUCTION_SETS[_i]
        break


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
    # An array of (batch, heads, rows, dims), by base pointer and byte strides.
    char *data
    Py_ssize_t head, row, dim
    Py_ssize_t n_batch
    Py_ssize_t *batch  # one stride per batch axis, 0 where it broadcasts


cdef struct Walk:
    # Everything that the tiles of one call share.
    const TileKernels *kernels
    Operand q, k, v, out, start, stop
    bint bounded  # does any query not see every key?
    int n_batch
    Py_ssize_t shape[64]  # of the batch
    Py_ssize_t strides[6][64]
    Py_ssize_t itemsize, kv_heads, group, n_queries, n_keys, head_dim, value_dim
    Py_ssize_t tiles  # per key head
    double scale
    double *lse  # (batch, heads, queries), contiguous; NULL: not wanted


cdef int describe(Walk *walk, int which, Operand *operand, cnp.ndarray array, int rank) except -1:
    """Read an array of (batch..., heads, rows[, dims]) whose axes of length 1 broadcast."""
    cdef int extra = array.ndim - rank, missing = walk.n_batch - extra, axis
    cdef Py_ssize_t *strides = walk.strides[which]
    operand.data = <char *>cnp.PyArray_DATA(array)
    operand.n_batch = walk.n_batch
    operand.batch = strides
    for axis in range(walk.n_batch):
        strides[axis] = 0
        if axis >= missing and array.shape[axis - missing] != 1:
            strides[axis] = array.strides[axis - missing]
    operand.head = array.strides[extra] if array.shape[extra] != 1 else 0
    operand.row = array.strides[extra + 1] if array.shape[extra + 1] != 1 else 0
    operand.dim = array.strides[extra + 2] if rank == 3 else 0
    return 0


cdef char *entry(const Walk *walk, const Operand *operand, Py_ssize_t batch) noexcept nogil:
    """Where the batch entry of that flattened index begins."""
    cdef char *at = operand.data
    cdef int axis
    for axis in range(walk.n_batch - 1, -1, -1):
        at += (batch % walk.shape[axis]) * operand.batch[axis]
        batch //= walk.shape[axis]
    return at


cdef bint attend_tile(
    const Walk *walk, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil:
    """Attend from the queries of one tile. False if a signal came in between."""
    cdef Py_ssize_t queries = walk.kernels.queries
    # The last queries first: under a causal mask they have the most to do, and a run that ends in
    # small pieces leaves no thread waiting for another.
    cdef Py_ssize_t index = walk.tiles - 1 - item % walk.tiles
    cdef Py_ssize_t kv_head = (item // walk.tiles) % walk.kv_heads
    cdef Py_ssize_t batch = item // walk.tiles // walk.kv_heads
    cdef Py_ssize_t rows = walk.group * walk.n_queries, first = index * queries
    cdef Py_ssize_t n = min(queries, rows - first), i, query, head, key, row
    cdef char *q = entry(walk, &walk.q, batch)
    cdef char *out = entry(walk, &walk.out, batch)
    cdef char *start = NULL
    cdef char *stop = NULL
    tile.n_queries = n
    tile.k = entry(walk, &walk.k, batch) + kv_head * walk.k.head
    tile.v = entry(walk, &walk.v, batch) + kv_head * walk.v.head
    if walk.bounded:
        start = entry(walk, &walk.start, batch)
        stop = entry(walk, &walk.stop, batch)
    # The heads of a group lie side by side, so that a tile's queries are neighbours in position.
    for i in range(n):
        query = (first + i) // walk.group
        head = kv_head * walk.group + (first + i) % walk.group
        tile.q[i] = q + head * walk.q.head + query * walk.q.row
        tile.out[i] = out + head * walk.out.head + query * walk.out.row
        tile.start[i] = 0
        tile.stop[i] = walk.n_keys
        if walk.bounded:
            tile.start[i] = (<int64_t *>(start + head * walk.start.head + query * walk.start.row))[0]
            tile.stop[i] = (<int64_t *>(stop + head * walk.stop.head + query * walk.stop.row))[0]
    tile.margin = 0
    while True:
        walk.kernels.begin(tile)
        key = tile.first // BLOCK_KEYS * BLOCK_KEYS
        while key < tile.last:
            if stopped[0] or (listen and interrupted(last_look)):
                return False
            walk.kernels.attend(tile, max(key, tile.first), min(key + BLOCK_KEYS, tile.last))
            key += BLOCK_KEYS
        if walk.kernels.finish(tile):
            break
        tile.margin = log(2.0 * walk.n_keys)
    if walk.lse is not NULL:
        for i in range(n):
            query = (first + i) // walk.group
            head = kv_head * walk.group + (first + i) % walk.group
            row = (batch * walk.kv_heads * walk.group + head) * walk.n_queries + query
            walk.lse[row] = tile.lse[i]
    return True


cdef int work(const Walk *walk, Py_ssize_t items, int threads, Tile *tiles) except -1:
    """Attend to all tiles. An interruption leaves the rest undone and raises."""
    global pool_started
    cdef bint stopped = False
    cdef double last_look = seconds()
    cdef Py_ssize_t item
    if threads > 1:
        pool_started = True
    with nogil:
        if threads == 1:
            for item in range(items):
                if not attend_tile(walk, tiles, item, True, &last_look, &stopped):
                    stopped = True
                    break
        else:
            for item in prange(items, num_threads=threads, schedule="dynamic", chunksize=1):
                if not stopped:
                    if not attend_tile(
                        walk, &tiles[threadid()], item, threadid() == 0, &last_look, &stopped
                    ):
                        stopped = True
    if PyErr_Occurred() is not NULL:
        return -1
    return 0


def attend(
    cnp.ndarray q not None, cnp.ndarray k not None, cnp.ndarray v not None,
    cnp.ndarray out not None, tuple batch, Py_ssize_t heads, Py_ssize_t kv_heads, double scale,
    cnp.ndarray start, cnp.ndarray stop, cnp.ndarray lse, int threads,
):
    """Fill `out`, (batch, heads, queries, value_dim), and, unless None, `lse`, float64.

    `start` and `stop`, both int64 or both None, broadcast to (batch, heads, queries). All must
    have been validated: nothing is checked here.
    """
    cdef Walk walk
    cdef Tile *tiles
    cdef char *scratch
    cdef Py_ssize_t items = kv_heads, i, scratch_bytes
    cdef bint single = q.descr.type_num == cnp.NPY_FLOAT32
    cdef const InstructionSet *isa = chosen()
    walk.kernels = isa.float32 if single else isa.float64
    walk.itemsize = 4 if single else 8
    walk.n_batch = len(batch)
    for i in range(walk.n_batch):
        walk.shape[i] = batch[i]
        items *= walk.shape[i]
    describe(&walk, 0, &walk.q, q, 3)
    describe(&walk, 1, &walk.k, k, 3)
    describe(&walk, 2, &walk.v, v, 3)
    describe(&walk, 3, &walk.out, out, 3)
    walk.bounded = start is not None
    if walk.bounded:
        describe(&walk, 4, &walk.start, start, 2)
        describe(&walk, 5, &walk.stop, stop, 2)
    walk.kv_heads = kv_heads
    walk.group = heads // kv_heads if kv_heads else 1
    walk.n_queries = q.shape[q.ndim - 2]
    walk.n_keys = k.shape[k.ndim - 2]
    walk.head_dim = q.shape[q.ndim - 1]
    walk.value_dim = v.shape[v.ndim - 1]
    walk.scale = scale
    walk.lse = NULL if lse is None else <double *>cnp.PyArray_DATA(lse)
    walk.tiles = (walk.group * walk.n_queries + walk.kernels.queries - 1) // walk.kernels.queries
    items *= walk.tiles
    if items == 0:
        return
    threads = 1 if alone else min(threads, items)

    scratch_bytes = walk.kernels.scratch_bytes(
        min(walk.kernels.queries, walk.group * walk.n_queries),
        walk.head_dim, walk.value_dim, walk.n_keys,
    )
    tiles = <Tile *>malloc(threads * sizeof(Tile))
    scratch = <char *>malloc(threads * scratch_bytes + 64)
    try:
        if tiles is NULL or scratch is NULL:
            raise MemoryError(f"{threads * scratch_bytes} bytes of scratch")
        for i in range(threads):
            tiles[i].scratch = scratch + (-<uintptr_t>scratch) % 64 + i * scratch_bytes
            tiles[i].q_dim = walk.q.dim // walk.itemsize
            tiles[i].k_dim = walk.k.dim // walk.itemsize
            tiles[i].k_key = walk.k.row // walk.itemsize
            tiles[i].v_dim = walk.v.dim // walk.itemsize
            tiles[i].v_key = walk.v.row // walk.itemsize
            tiles[i].out_dim = walk.out.dim // walk.itemsize
            tiles[i].head_dim = walk.head_dim
            tiles[i].value_dim = walk.value_dim
            tiles[i].scale = scale
            tiles[i].want_lse = walk.lse is not NULL
        work(&walk, items, threads, tiles)
    finally:
        free(tiles)
        free(scratch)


def peak_flops(dtype, int threads, Py_ssize_t rounds=2_000_000):
    """Flop/s of multiply-adds that never leave the registers: the roof over every kernel."""
    cdef const InstructionSet *isa = chosen()
    cdef const TileKernels *kernels = isa.float32 if dtype == np.float32 else isa.float64
    cdef double flops = 0, began = seconds()
    cdef int i
    for i in prange(threads, nogil=True, num_threads=threads, schedule="static"):
        flops += kernels.peak(rounds)
    return flops / (seconds() - began)
