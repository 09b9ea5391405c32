/* OpenMP where the compiler has it; a clock that runs without the GIL. */
#ifndef FASTATTN_OPENMP_H
#define FASTATTN_OPENMP_H

#include <stdint.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
#endif

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}


/* A count that threads wait for. */
static inline int64_t read_count(const int64_t *count) {
    return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}
static inline void set_count(int64_t *count, int64_t value) {
    __atomic_store_n(count, value, __ATOMIC_RELEASE);
}
#endif
