# Part of kernels.pyx: the peak FLOP/s and the peak bandwidth of the machine.

def peak_flops(dtype, int threads, Py_ssize_t rounds=2_000_000):
    """Peak FLOP/s: multiply-adds between registers. It bounds every kernel of that dtype except the
    float32 ones in bfloat16 terms.
    """
    kind = np.dtype(dtype).char
    cdef const TileKernels *kernels = kernels_for(
        kind, 1 if kind == "f" else MAX_BLOCK_Q, 0, 0, True
    )
    cdef double flops = 0, start = seconds()
    cdef int i, at_once = 1 if inherits_pool() else available_threads(threads)
    for i in prange(threads, nogil=True, num_threads=at_once, schedule="static"):
        flops += kernels.peak(rounds)
    return flops / (seconds() - start)


cdef int64_t sum_streams(const int64_t *at, Py_ssize_t n) noexcept nogil:
    """The sum of 4 * n numbers in four streams, which read faster than one."""
    cdef int64_t a = 0, b = 0, c = 0, d = 0
    cdef Py_ssize_t i
    for i in range(n):
        a += at[i]
        b += at[n + i]
        c += at[2 * n + i]
        d += at[3 * n + i]
    return a + b + c + d


def read_bandwidth(int threads, Py_ssize_t thread_bytes=128 << 20):
    """Peak read bandwidth of so many threads, in bytes per second. It bounds decoding."""
    cdef Py_ssize_t n = thread_bytes // 32
    cdef cnp.ndarray numbers = np.ones(threads * 4 * n, np.int64)
    cdef const int64_t *data = <const int64_t *>cnp.PyArray_DATA(numbers)
    cdef int64_t total = 0
    cdef double start, taken = 0
    cdef int i, rounds, at_once = 1 if inherits_pool() else available_threads(threads)
    for rounds in range(2):  # the first wakes the threads
        total = 0
        start = seconds()
        for i in prange(threads, nogil=True, num_threads=at_once, schedule="static"):
            total += sum_streams(data + i * 4 * n, n)
        taken = seconds() - start
        assert total == numbers.size
    return numbers.nbytes / taken
