# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The macro-kernel: the loop over the tiles of a problem, on several threads.

``tile.c`` computes a tile; ``instruction_sets.c`` lists its copies, one for each instruction set.
"""

import numpy as np

cimport numpy as cnp
from cpython.unicode cimport PyUnicode_AsUTF8
from cython.parallel cimport parallel, prange, threadid
from libc.float cimport DBL_EPSILON, FLT_EPSILON
from libc.math cimport INFINITY, fabs, log
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.stdlib cimport getenv as c_getenv
from libc.string cimport memcpy, memset

cnp.import_array()

cdef extern from "Python.h":
    # Without `except`: the exception stays set until the call ends.
    int PyErr_CheckSignals() noexcept
    void *PyErr_Occurred() noexcept

cdef extern from "tile_sizes.h" nogil:
    enum:
        BLOCK_K
        SUB_BLOCK_K
        MAX_BLOCK_Q
        FMA_BLOCK_Q_BYTES
        BLOCK_D
        MAX_LANES
        METRIC_BLOCK_D
        MAX_FMA_ROWS
        MIN_BF16X3_ROWS
        MAX_SPLIT_ROWS
        SPLIT_KEYS
        MAX_SPLITS

cdef extern from "tile.h" nogil:
    enum:
        ROW_SUMS
    const double WEIGHT_UNIT

    ctypedef struct NumberFormat:
        char kind
        int bytes, swapped

    ctypedef enum ScoreFunction:
        DOT
        DISTANCE
        ADDITIVE
        SQUARED_DISTANCE
    ctypedef struct Candidate:
        pass

    Py_ssize_t bin_of(Py_ssize_t i, Py_ssize_t n, Py_ssize_t bins)

    ctypedef struct Tile:
        const char *q[MAX_BLOCK_Q]
        char *out[MAX_BLOCK_Q]
        const char *k
        const char *v
        const float *k_scales
        const float *v_scales
        NumberFormat q_format, k_format, v_format, out_format, grad_out_format
        Py_ssize_t q_dim, out_dim, k_key, k_dim, v_key, v_dim
        Py_ssize_t n_queries, head_dim, value_dim, block_k
        double scale, margin
        ScoreFunction score_function
        const double *dim_weights
        Py_ssize_t start[MAX_BLOCK_Q]
        Py_ssize_t stop[MAX_BLOCK_Q]
        double softcap
        bint has_mask, has_bias, has_alibi, has_sinks
        const char *mask[MAX_BLOCK_Q]
        const char *bias[MAX_BLOCK_Q]
        Py_ssize_t mask_key, bias_key
        NumberFormat bias_format
        double slope[MAX_BLOCK_Q]
        double sink[MAX_BLOCK_Q]
        Py_ssize_t position[MAX_BLOCK_Q]
        bint has_scales
        double scales[MAX_BLOCK_Q]
        const void *relative_bias
        Py_ssize_t reach, group
        Py_ssize_t column[MAX_BLOCK_Q]
        bint plain_relative_bias, hiding_relative_bias
        double *grad_relative_bias
        char *weights[MAX_BLOCK_Q]
        Py_ssize_t weights_key
        bint want_lse, want_max
        double max_score[MAX_BLOCK_Q]
        double lse[MAX_BLOCK_Q]
        double lse_rest[MAX_BLOCK_Q]
        void *scratch
        bint differentiating
        const char *grad_out[MAX_BLOCK_Q]
        const char *result[MAX_BLOCK_Q]
        NumberFormat grad_out_format
        Py_ssize_t grad_out_dim, result_dim
        double mean[MAX_BLOCK_Q]
        double delta[MAX_BLOCK_Q]
        char *grad_k
        char *grad_v
        NumberFormat grad_k_format, grad_v_format
        Py_ssize_t grad_k_key, grad_v_key
        bint adds_k, adds_v
        bint wants_bias, wants_sums, wants_scale, rows_share_bias
        char *grad_bias[MAX_BLOCK_Q]
        double row_sums[MAX_BLOCK_Q][ROW_SUMS]
        double *bins
        int slot[MAX_BLOCK_Q]
        Py_ssize_t bin_row, columns, n_keys
        Candidate *heaps
        Py_ssize_t top_k
        double top_k_threshold[MAX_BLOCK_Q]
        int64_t *keys[MAX_BLOCK_Q]
        Py_ssize_t first, last

    ctypedef struct BackwardKernels:
        size_t (*scratch_bytes)(const Tile *) noexcept nogil
        void (*prepare)(Tile *) noexcept nogil
        void (*normalize)(Tile *) noexcept nogil
        void (*begin_keys)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        bint (*differentiate)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*add)(Tile *) noexcept nogil
        void (*store_keys)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil

    ctypedef struct TileKernels:
        int block_q, mr, block_k
        size_t (*scratch_bytes)(const Tile *, Py_ssize_t) noexcept nogil
        void (*begin)(Tile *) noexcept nogil
        void (*attend)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        bint (*finish)(Tile *) noexcept nogil
        void (*weights)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*accumulate_bins)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*collect_top_k)(Tile *, Py_ssize_t, Py_ssize_t) noexcept nogil
        void (*rank_top_k)(Tile *) noexcept nogil
        double (*combine_splits)(
            char *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t, char *, Py_ssize_t,
            NumberFormat,
        ) noexcept nogil
        int real_bytes
        const BackwardKernels *backward
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
        const TileKernels *fma

    const InstructionSet INSTRUCTION_SETS[]
    const int N_INSTRUCTION_SETS

cdef extern from "platform.h" nogil:
    int omp_get_max_threads()
    int omp_get_num_procs()
    int omp_get_num_places()
    int omp_get_place_num_procs(int)
    void omp_get_place_proc_ids(int, int *)
    bint is_first_thread()
    int creatable_threads(int)
    int grow_pool(int)
    double seconds()
    int64_t load_acquire(const int64_t *)
    void store_release(int64_t *, int64_t)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    int getpid()


def getenv(str name):
    """The environment variable `name`, or None: `os.getenv`, but faster."""
    cdef const char *value = c_getenv(PyUnicode_AsUTF8(name))
    return None if value is NULL else value.decode("utf-8", "surrogateescape")


include "kernel_choice.pxi"
include "threads.pxi"
include "call.pxi"
include "weight_maps.pxi"
include "forward.pxi"
include "backward.pxi"
include "peak.pxi"
