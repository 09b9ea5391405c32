# Part of kernels.pyx: which instruction set's kernels serve a call.

# The features that may be disabled and enabled, on any machine.
FEATURES = ("avx2", "avx512", "avx512_bf16", "amx", "neon_bf16")

cdef const InstructionSet *fastest = newest_of(set(), set())


# What a call multiplies in: the dtype of its arrays, or what the user allows in its place.
cdef enum ComputeDtype:
    FLOAT64
    FLOAT32
    FLOAT16
    BFLOAT16


cdef int compute_dtype_of(str char) except -1:
    """The ComputeDtype of NumPy's character for a dtype; E is ml_dtypes' for bfloat16."""
    if char == "f":
        return FLOAT32
    if char == "d":
        return FLOAT64
    if char == "e":
        return FLOAT16
    if char == "E":
        return BFLOAT16
    raise ValueError(f"compute_dtype: expected one of d f e E, got {char!r}")


cdef const TileKernels *kernels_for(
    str compute_dtype, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
) except NULL:
    """The kernels for matmuls in that dtype and that many queries of one key head."""
    cdef const InstructionSet *isa = chosen()
    cdef int dtype = compute_dtype_of(compute_dtype)
    if dtype == FLOAT64:
        return isa.float64
    if queries <= MAX_FMA_ROWS or not dot:  # other score functions are no matmuls
        return isa.fma
    if dtype == FLOAT32:
        many = queries >= MIN_BF16X3_ROWS
        return isa.float32 if many and worth_bf16x3(head_dim, value_dim) else isa.fma
    return isa.float16 if dtype == FLOAT16 else isa.bfloat16


cdef const TileKernels *backward_kernels_for(
    str compute_dtype, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
) except NULL:
    """The kernels for gradients: those of the forward pass, so that the scores are the same bit for
    bit, or the float32 multiply-adds if these have no gradients.
    """
    cdef const TileKernels *kernels = kernels_for(compute_dtype, queries, head_dim, value_dim, dot)
    return chosen().fma if kernels.backward is NULL else kernels


cdef bint worth_bf16x3(Py_ssize_t head_dim, Py_ssize_t value_dim) noexcept nogil:
    """Are three bfloat16 terms faster than float32 multiply-adds for these dims?

    They take 3/4 of the time per dim, but dims are padded to multiples of 32 and 16, and the cost
    per key is higher. At 32, 48 and 56 dims both take as long, at 64 terms are 15 % faster, and
    20 % at 96 and 128.
    """
    cdef Py_ssize_t padded = (head_dim + 31) // 32 * 32 + (value_dim + 15) // 16 * 16
    return 4 * (head_dim + value_dim) - 3 * padded > (75 if value_dim else 37)


def tile_sizes():
    """The sizes of tile_sizes.h that are the same for every kernel, and WEIGHT_UNIT, by name."""
    return {
        "BLOCK_K": BLOCK_K,
        "SUB_BLOCK_K": SUB_BLOCK_K,
        "MAX_BLOCK_Q": MAX_BLOCK_Q,
        "FMA_BLOCK_Q_BYTES": FMA_BLOCK_Q_BYTES,
        "BLOCK_D": BLOCK_D,
        "BLOCK_D_ONE_VECTOR": BLOCK_D_ONE_VECTOR,
        "METRIC_BLOCK_D": METRIC_BLOCK_D,
        "MAX_FMA_ROWS": MAX_FMA_ROWS,
        "MIN_BF16X3_ROWS": MIN_BF16X3_ROWS,
        "MAX_SPLIT_ROWS": MAX_SPLIT_ROWS,
        "SPLIT_KEYS": SPLIT_KEYS,
        "MAX_SPLITS": MAX_SPLITS,
        "WEIGHT_UNIT": int(WEIGHT_UNIT),
    }


def tile_size(
    str compute_dtype, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """The queries of one key head in a tile and in a micropanel, and the keys in a block."""
    cdef const TileKernels *kernels = kernels_for(compute_dtype, queries, head_dim, value_dim, dot)
    return min(queries, kernels.block_q), min(queries, kernels.mr), kernels.block_k


def matmul_dtype(
    str compute_dtype, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """The numbers that the kernels for such a call multiply, in words."""
    cdef const InstructionSet *isa = chosen()
    cdef const TileKernels *kernels = kernels_for(compute_dtype, queries, head_dim, value_dim, dot)
    if kernels is isa.float64:
        return "float64"
    if kernels is isa.fma:
        return "float32"
    if kernels is isa.bfloat16:
        return "bfloat16"
    return "two bfloat16 terms" if kernels is isa.float16 else "three bfloat16 terms"


def instruction_sets():
    """The instruction sets that this machine can run, newest first."""
    return tuple(
        INSTRUCTION_SETS[i].name.decode()
        for i in range(N_INSTRUCTION_SETS)
        if INSTRUCTION_SETS[i].runs_here()
    )


def slow_instruction_sets():
    """Those of them that are passed over, as the next one is faster on this processor."""
    return tuple(
        INSTRUCTION_SETS[i].name.decode()
        for i in range(N_INSTRUCTION_SETS)
        if INSTRUCTION_SETS[i].runs_here() and is_slow(&INSTRUCTION_SETS[i])
    )


cdef bint is_slow(const InstructionSet *isa) noexcept:
    return isa.slow_here is not NULL and isa.slow_here()


def kernel_tables():
    """Which kernels serve each compute dtype, by instruction set of this machine.

    Equal kernels give equal results.
    """
    tables = {}
    for i in range(N_INSTRUCTION_SETS):
        isa = &INSTRUCTION_SETS[i]
        if isa.runs_here():
            fma = <uintptr_t> isa.fma
            tables[isa.name.decode()] = {
                "float64": (<uintptr_t> isa.float64,),
                "float32": (<uintptr_t> isa.float32, fma),
                "float16": (<uintptr_t> isa.float16, fma),
                "bfloat16": (<uintptr_t> isa.bfloat16, fma),
            }
    return tables


def instruction_set():
    """The instruction set in use: the fastest whose features are not disabled."""
    return chosen().name.decode()


cdef const InstructionSet *chosen() except NULL:
    # Read at every call: getenv of C costs next to nothing.
    cdef const char *disabled = c_getenv("FASTATTN_DISABLE_CPU_FEATURES")
    cdef const char *enabled = c_getenv("FASTATTN_ENABLE_CPU_FEATURES")
    if (disabled is NULL or disabled[0] == 0) and (enabled is NULL or enabled[0] == 0):
        return fastest
    return newest_of(
        features_in("FASTATTN_DISABLE_CPU_FEATURES"), features_in("FASTATTN_ENABLE_CPU_FEATURES")
    )


cdef const InstructionSet *newest_of(disabled, enabled) except NULL:
    """The newest instruction set without disabled features, and without slow ones that are not
    enabled. The last one needs no features.
    """
    cdef const InstructionSet *isa
    for i in range(N_INSTRUCTION_SETS):
        isa = &INSTRUCTION_SETS[i]
        if not isa.runs_here() or disabled & set(isa.features.decode().split()):
            continue
        if not is_slow(isa) or isa.name.decode() in enabled:
            return isa
    return &INSTRUCTION_SETS[N_INSTRUCTION_SETS - 1]


def features_in(str variable):
    """The features that an environment variable names."""
    names = set((getenv(variable) or "").replace(",", " ").split())
    for name in sorted(names.difference(FEATURES)):
        raise ValueError(f"{variable}: expected some of {' '.join(FEATURES)}, got {name!r}")
    return names
