# Part of kernels.pyx: what the machine can do at most.

def peak_flops(dtype, int threads, Py_ssize_t rounds=2_000_000):
    """Flop/s of multiply-adds that never leave the registers: the roof over every kernel, but those
    of float32 in bfloat16 terms, which have another.
    """
    kind = np.dtype(dtype).char
    cdef const TileKernels *kernels = kernels_for(
        kind, 1 if kind == "f" else MAX_QUERIES, 0, 0, True
    )
    cdef double flops = 0, began = seconds()
    cdef int i, at_once = 1 if inherits_pool() else available_threads(threads)
    for i in prange(threads, nogil=True, num_threads=at_once, schedule="static"):
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
    cdef int64_t total = 0
    cdef double began, taken = 0
    cdef int i, rounds, at_once = 1 if inherits_pool() else available_threads(threads)
    for rounds in range(2):  # the first wakes the threads
        total = 0
        began = seconds()
        for i in prange(threads, nogil=True, num_threads=at_once, schedule="static"):
            total += sum_streams(data + i * 4 * n, n)
        taken = seconds() - began
        assert total == numbers.size
    return numbers.nbytes / taken
