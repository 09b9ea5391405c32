# Part of kernels.pyx: the declarations of tile_sizes.h, tile.h, philox.h, sparse.h and
# instruction_sets.h.

cdef extern from "tile_sizes.h" nogil:
    enum:
        BLOCK_K
        SUB_BLOCK_K
        MAX_BLOCK_Q
        FMA_BLOCK_Q_BYTES
        BLOCK_D
        BLOCK_D_ONE_VECTOR
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

    void set_drop_words(
        Tile *t, Py_ssize_t i, uint64_t seed, uint64_t entry, uint64_t head, uint64_t query
    )
    Py_ssize_t bin_of(Py_ssize_t i, Py_ssize_t n, Py_ssize_t bins)

    ctypedef struct Tile:
        const char **q
        char **out
        const char *k
        const char *v
        const float *k_scales
        const float *v_scales
        NumberFormat q_format, k_format, v_format, out_format, grad_out_format
        Py_ssize_t q_dim, out_dim, k_key, k_dim, v_key, v_dim, k_scales_key, v_scales_key
        const int64_t *pages
        Py_ssize_t page, k_page, v_page, k_scales_page, v_scales_page
        Py_ssize_t n_queries, head_dim, value_dim, block_k
        double scale, margin
        ScoreFunction score_function
        const double *dim_weights
        Py_ssize_t *start
        Py_ssize_t *stop
        double softcap
        bint has_mask, has_bias, has_alibi, has_sinks
        const char **mask
        const char **bias
        Py_ssize_t mask_key, bias_key
        NumberFormat bias_format
        double *slope
        double *sink
        Py_ssize_t *position
        bint has_scales
        double *scales
        const void *relative_bias
        Py_ssize_t reach, group
        Py_ssize_t *column
        bint plain_relative_bias, hiding_relative_bias
        bint has_dropout
        uint32_t drop_threshold
        uint64_t drop_first_key
        double keep_factor
        char **weights
        Py_ssize_t weights_key
        bint want_lse, want_max
        double *lse
        double *max_score
        bint forward_mode, has_d_q, has_d_k, has_d_v, tangents_alone
        const char **d_q
        const char *d_k
        const char *d_v
        NumberFormat d_q_format, d_k_format, d_v_format
        Py_ssize_t d_q_dim, d_k_key, d_k_dim, d_v_key, d_v_dim
        char **d_out
        double *d_lse
        double *lse_rest
        void *scratch
        bint differentiating
        const char **grad_out
        const char **result
        NumberFormat grad_out_format
        Py_ssize_t grad_out_dim, result_dim
        double *mean
        double *delta
        char *grad_k
        char *grad_v
        NumberFormat grad_k_format, grad_v_format
        Py_ssize_t grad_k_key, grad_v_key
        bint adds_k, adds_v
        bint wants_bias, wants_relative_bias, wants_sums, wants_scale, rows_share_bias
        char **grad_bias
        double *grad_relative_bias
        bint wants_dim_weights
        double *grad_dim_weights
        double (*row_sums)[ROW_SUMS]
        double *bins
        int *slot
        Py_ssize_t bin_row, columns, n_keys
        Candidate *heaps
        Py_ssize_t top_k
        double *top_k_threshold
        int64_t **keys
        Py_ssize_t first, last

    size_t lay_out_rows(Tile *, Py_ssize_t rows, char *base)

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

cdef extern from "philox.h" nogil:
    void philox_key_of(uint64_t seed, uint64_t entry, uint64_t head, uint32_t *key)

cdef extern from "sparse.h" nogil:
    ctypedef struct SparseLists:
        const int64_t *starts
        const char *items
        int item_bytes
        int64_t count

    ctypedef struct SparseRow:
        pass

    ctypedef struct SparseHead:
        const char *q
        const char *k
        const char *v
        const char *bias
        Py_ssize_t q_row, bias_row
        const char *k_scales
        const char *v_scales
        const void *relative_bias
        Py_ssize_t left, right, offset, length
        const char *start
        const char *stop
        Py_ssize_t start_row, stop_row
        double scale, slope, sink
        uint32_t drop_key[2]
        uint64_t drop_first_query
        char *out
        char *weights
        char *lse
        char *max_score
        Py_ssize_t out_row, weights_row, lse_row, max_score_row
        double *bins
        Py_ssize_t bin_rows, bin_columns, n_queries, n_keys
        const char *grad_out
        const char *result
        const char *grad_lse
        Py_ssize_t grad_out_row, result_row, grad_lse_row
        double coarse
        SparseRow *rows
        double (*row_sums)[ROW_SUMS]
        char *grad_bias
        Py_ssize_t grad_bias_row, grad_bias_key
        char *grad_k
        char *grad_v

    ctypedef struct SparseKernels:
        int real_bytes
        size_t (*scratch_bytes)(const Tile *) noexcept nogil
        void (*attend)(
            Tile *, const SparseHead *, const SparseLists *, Py_ssize_t, Py_ssize_t
        ) noexcept nogil
        void (*differentiate_queries)(
            Tile *, const SparseHead *, const SparseLists *, Py_ssize_t, Py_ssize_t
        ) noexcept nogil
        void (*differentiate_keys)(
            Tile *, const SparseHead *, Py_ssize_t, const SparseLists *, Py_ssize_t, Py_ssize_t
        ) noexcept nogil

cdef extern from "instruction_sets.h" nogil:
    ctypedef struct InstructionSet:
        const char *name
        const char *features
        bint (*runs_here)() noexcept nogil
        bint (*slow_here)() noexcept nogil
        const TileKernels *float64
        const TileKernels *float32
        const TileKernels *float16
        const TileKernels *bfloat16
        const TileKernels *fma
        const SparseKernels *sparse_float64
        const SparseKernels *sparse_float32

    const InstructionSet INSTRUCTION_SETS[]
    const int N_INSTRUCTION_SETS
