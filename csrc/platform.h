/* OpenMP where the compiler has it, with what its runtimes leave to their callers; a clock that
 * runs without the GIL. */
#ifndef FASTATTN_PLATFORM_H
#define FASTATTN_PLATFORM_H

#include <ctype.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_num_procs(void) { return 0; }
static inline int omp_get_num_places(void) { return 0; }
static inline int omp_get_place_num_procs(int place) { return 0; }
static inline void omp_get_place_proc_ids(int place, int *ids) {}
#endif

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Is this the thread that the process began with? In a forked process it is the one that forked. */
static inline int is_first_thread(void) {
#ifdef __linux__
    return syscall(SYS_gettid) == getpid();
#else
    return 1;
#endif
}

static inline void *wait_for_all(void *mutex) {
    pthread_mutex_lock(mutex);
    pthread_mutex_unlock(mutex);
    return NULL;
}

/* The stack of a thread of OpenMP's, in bytes; 0 for the system's default. */
static inline size_t openmp_stack(void) {
    const char *setting = getenv("OMP_STACKSIZE");
    char *unit;
    if (!setting && !(setting = getenv("GOMP_STACKSIZE"))) return 0;
    size_t n = strtoul(setting, &unit, 10);
    unit += strspn(unit, " \t");
    const char *units = "BKMG",
               *at = *unit ? strchr(units, toupper((unsigned char)*unit)) : units + 1;
    return at ? n << 10 * (at - units) : 0;
}

/* How many of so many threads the system grants beside each other, one more than a pool of them
 * takes, so that something is left for what else it allocates: at least 1. */
static inline int creatable_threads(int wanted) {
    int n = 0;
    pthread_mutex_t all = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    pthread_t *threads = malloc(wanted * sizeof *threads);
    if (!threads) return 1;
    pthread_attr_init(&attributes);
    if (openmp_stack()) pthread_attr_setstacksize(&attributes, openmp_stack());
    pthread_mutex_lock(&all);
    while (n < wanted && !pthread_create(&threads[n], &attributes, wait_for_all, &all)) n++;
    pthread_mutex_unlock(&all);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    pthread_attr_destroy(&attributes);
    free(threads);
    return n > 1 ? n : 1;
}

/* Threads for a region of at most so many: how many. OpenMP's runtimes end the process if one
 * cannot be created, so it is tried before they do, where their pool must grow; it is the calling
 * thread's. */
static inline int grow_pool(int wanted) {
    static _Thread_local int pool = 1;
    if (wanted > pool) {
        wanted = creatable_threads(wanted);
#ifdef _OPENMP
#pragma omp parallel num_threads(wanted)
#pragma omp single
        wanted = omp_get_num_threads();
#endif
    }
    if (wanted > 1) pool = wanted; /* libgomp ends those that a smaller region has no use for */
    return wanted;
}

/* A count that threads wait for. */
static inline int64_t load_acquire(const int64_t *count) {
    return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}
static inline void store_release(int64_t *count, int64_t value) {
    __atomic_store_n(count, value, __ATOMIC_RELEASE);
}
#endif
