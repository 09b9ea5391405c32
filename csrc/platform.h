/* OpenMP, if the compiler has it, and what its runtimes leave to their callers; clock; atomics. */
#ifndef FASTATTN_PLATFORM_H
#define FASTATTN_PLATFORM_H

#include <ctype.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <process.h>
#include <windows.h>
#else
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 0; } /* which OpenMP never says */
static inline int omp_get_num_procs(void) { return 0; }
static inline int omp_get_num_places(void) { return 0; }
static inline int omp_get_place_num_procs(int place) { return 0; }
static inline void omp_get_place_proc_ids(int place, int *ids) {}
#endif

#ifdef _WIN32
static inline double seconds(void) {
    LARGE_INTEGER ticks, per_second;
    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&per_second);
    return (double)ticks.QuadPart / (double)per_second.QuadPart;
}

#ifdef _MSC_VER /* MinGW has these under their POSIX names */
static inline int sched_yield(void) { return !SwitchToThread(); }
static inline int getpid(void) { return _getpid(); }
#endif
#else
static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#endif

/* Is this the thread that the process began with? In a forked process it is the one that forked. */
static inline int is_first_thread(void) {
#ifdef __linux__
    return syscall(SYS_gettid) == getpid();
#else
    return 1;
#endif
}

#ifdef _WIN32
static inline int creatable_threads(int wanted) { return wanted; }
#else
static inline void *wait_for_all(void *mutex) {
    pthread_mutex_lock(mutex);
    pthread_mutex_unlock(mutex);
    return NULL;
}

/* The stack size of OpenMP's threads in bytes; 0 for the system's default. */
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

/* How many of `most` threads the system can run at once: at least 1. Tries one more than a pool of
 * them creates, so that some memory is left for other allocations. */
static inline int creatable_threads(int most) {
    int n = 0;
    pthread_mutex_t all = PTHREAD_MUTEX_INITIALIZER;
    pthread_attr_t attributes;
    pthread_t *threads = malloc(most * sizeof *threads);
    if (!threads) return 1;
    pthread_attr_init(&attributes);
    if (openmp_stack()) pthread_attr_setstacksize(&attributes, openmp_stack());
    pthread_mutex_lock(&all);
    while (n < most && !pthread_create(&threads[n], &attributes, wait_for_all, &all)) n++;
    pthread_mutex_unlock(&all);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
    pthread_attr_destroy(&attributes);
    free(threads);
    return n > 1 ? n : 1;
}
#endif

/* Grow the calling thread's pool for a region of at most `most` threads; returns how many it has.
 * OpenMP's runtimes end the process if a thread cannot be created, so try that before they do. */
static inline int grow_pool(int most) {
    static _Thread_local int pool = 1;
    if (most > pool) {
        most = creatable_threads(most);
#ifdef _OPENMP
#pragma omp parallel num_threads(most)
#pragma omp single
        most = omp_get_num_threads();
#endif
    }
    if (most > 1) pool = most; /* libgomp ends those that a smaller region has no use for */
    return most;
}

/* Counters that threads wait for, and flags that one of them takes. */
static inline int64_t load_acquire(const int64_t *count) {
    return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}
static inline void store_release(int64_t *count, int64_t value) {
    __atomic_store_n(count, value, __ATOMIC_RELEASE);
}
static inline int64_t exchange(int64_t *flag, int64_t value) {
    return __atomic_exchange_n(flag, value, __ATOMIC_ACQUIRE);
}
#endif
