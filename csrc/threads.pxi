# Part of kernels.pyx: OpenMP's threads, a fork and Ctrl-C.

def _is_forked():
    """Was this process forked without an exec since? Only Linux tells."""
    cdef int FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of include/linux/sched.h
    try:
        with open("/proc/self/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[6]) & FORKED_WITHOUT_EXEC != 0
    except (OSError, IndexError, ValueError):
        return False


# The threads of OpenMP's pool do not survive a fork, and GNU's runtime does not notice: a parallel
# region of the forked thread, which owns the pool, would wait for them forever. All libraries of a
# process share the pool, so a child must not use it, no matter which library started it.
cdef bint was_forked = _is_forked()
cdef int own_process = getpid()


cdef bint inherits_pool() noexcept nogil:
    """Does the calling thread's pool, if any, stem from before a fork?"""
    return (was_forked or getpid() != own_process) and is_first_thread()


cdef int available_threads(int most) noexcept:
    """How many threads `parallel_for` can have, at most `most`. Call it with the GIL held, so that
    no other call takes the threads that this one has found it can create.
    """
    if most <= 1:
        return 1
    return creatable_threads(most) if inherits_pool() else grow_pool(most)


def openmp_threads():
    """How many threads OpenMP would use now: OMP_NUM_THREADS, threadpoolctl, the affinity."""
    return omp_get_max_threads()


def cpus_in_places():
    """The number of usable CPUs in OpenMP's places; 0 if it has no places to bind threads to."""
    cdef int place
    cdef cnp.ndarray cpus
    total = set()
    for place in range(omp_get_num_places()):
        cpus = np.empty(omp_get_place_num_procs(place), np.intc)
        omp_get_place_proc_ids(place, <int *>cnp.PyArray_DATA(cpus))
        total.update(cpus.tolist())
    return min(len(total), omp_get_num_procs())


# How often the caller's thread looks for Ctrl-C, in seconds.
cdef double SIGNAL_INTERVAL = 0.05


cdef bint interrupted(double *last_look) noexcept nogil:
    """Has a signal handler raised? The exception stays set in the calling thread."""
    cdef double now = seconds()
    if now - last_look[0] < SIGNAL_INTERVAL:
        return False
    last_look[0] = now
    with gil:
        return PyErr_CheckSignals() < 0


# The memory that the threads of a call work in: for each a tile, which begins as a copy of the
# prototype, its scratch, its arrays of rows, and room for a reduction of weights or of the gradient
# of the relative bias. A thread is the
# first to write its own.
cdef struct Workspace:
    Tile prototype
    void *allocated
    char *threads
    Py_ssize_t rows  # of a tile, in whole micropanels
    Py_ssize_t scratch_at, rows_at, reduction_at, thread_bytes


cdef inline Py_ssize_t padded(Py_ssize_t bytes) noexcept nogil:
    """To whole cache lines."""
    return (bytes + 63) // 64 * 64


cdef char *allocate_workspace(
    Workspace *workspace, int threads, Py_ssize_t scratch_bytes, Py_ssize_t reduction_bytes,
    Py_ssize_t shared_bytes,
) except NULL:
    """Allocate the memory of so many threads. Return `shared_bytes` of it that all share."""
    cdef Py_ssize_t total
    cdef int thread
    cdef char *memory
    workspace.scratch_at = padded(sizeof(Tile))
    workspace.rows_at = workspace.scratch_at + padded(scratch_bytes)
    workspace.reduction_at = workspace.rows_at + <Py_ssize_t>lay_out_rows(
        &workspace.prototype, workspace.rows, NULL
    )
    workspace.thread_bytes = workspace.reduction_at + padded(reduction_bytes)
    total = threads * workspace.thread_bytes + shared_bytes + 64
    workspace.allocated = malloc(total)
    if workspace.allocated is NULL:
        raise MemoryError(f"{total} bytes of scratch")
    memory = <char *>workspace.allocated
    memory += (-<uintptr_t>memory) % 64
    workspace.threads = memory
    for thread in range(threads):
        (<Tile *>(memory + thread * workspace.thread_bytes)).scratch = NULL
    return memory + threads * workspace.thread_bytes


cdef Tile *tile_of(Workspace *workspace, int thread) noexcept nogil:
    """The tile of a thread, which is made when the thread first asks for it."""
    cdef char *memory = workspace.threads + thread * workspace.thread_bytes
    cdef Tile *tile = <Tile *>memory
    if tile.scratch is NULL:
        tile[0] = workspace.prototype
        tile.scratch = memory + workspace.scratch_at
        lay_out_rows(tile, workspace.rows, memory + workspace.rows_at)
        tile.bins = <double *>(memory + workspace.reduction_at)
        tile.heaps = <Candidate *>(memory + workspace.reduction_at)
        tile.grad_relative_bias = <double *>(memory + workspace.reduction_at)
    return tile


# Run one item of a call with a thread's tile. False if `stopped`, or if a signal came in between,
# which only the caller's thread listens for.
ctypedef bint (*Item)(
    const void *call, Tile *tile, Py_ssize_t item, bint listen, double *last_look, bint *stopped
) noexcept nogil

cdef struct Region:
    Item run
    const void *call
    Workspace *workspace
    Py_ssize_t items
    int threads
    double last_look
    bint stopped


cdef inline void run_item(Region *region, Py_ssize_t item, int thread) noexcept nogil:
    if not region.stopped and not region.run(
        region.call, tile_of(region.workspace, thread), item, thread == 0, &region.last_look,
        &region.stopped,
    ):
        region.stopped = True


cdef void run_in_parallel(Region *region) noexcept nogil:
    cdef Py_ssize_t item
    # Items start in order: some wait for items before them.
    for item in prange(
        region.items, num_threads=region.threads, schedule="dynamic", chunksize=1
    ):
        run_item(region, item, threadid())


cdef bint parallel_for(
    Item run, const void *call, Workspace *workspace, Py_ssize_t items, int threads
) noexcept nogil:
    """Run all items on `threads` of the `available_threads`. False if a signal handler raised: its
    exception is set.
    """
    cdef Py_ssize_t item
    cdef Region region
    region.run, region.call, region.workspace = run, call, workspace
    region.items, region.threads = items, threads
    region.last_look, region.stopped = seconds(), False
    if threads == 1:
        for item in range(items):
            run_item(&region, item, 0)
    elif inherits_pool():
        # A nested region has its own threads, which end with it.
        with parallel(num_threads=1):
            run_in_parallel(&region)
    else:
        run_in_parallel(&region)
    return not region.stopped
