# Part of kernels.pyx: OpenMP's threads, a fork and Ctrl-C.

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
