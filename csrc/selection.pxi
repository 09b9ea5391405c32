# Part of kernels.pyx: which instruction set's kernels serve what.

FEATURES = ("avx2", "avx512", "avx512_bf16", "amx")  # the names that may be disabled, on any machine

cdef const InstructionSet *best = NULL
for _i in range(N_INSTRUCTION_SETS):
    if INSTRUCTION_SETS[_i].runs_here():
        best = &INSTRUCTION_SETS[_i]
        break


# Queries of one key head up to which packing keys for the other kernels would cost more than it saves,
# and from which on splitting float32 keys in parts costs less: they take 1.5 times as long as
# multiply-adds for 32 queries, as long for 112, and 0.8 of it for 384.
cdef enum:
    FEW = 16
    MANY = 128

# With no more queries than these a key head is one item of work, which may leave threads idle, so
# its keys are split between them, in parts that depend on their number alone. No more than so many,
# because each takes room for what it finds, and time though nobody sees it.
cdef enum:
    SPLIT = 32
    PART_KEYS = 2048
    MOST_PARTS = 64


cdef const TileKernels *kernels_for(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
) except NULL:
    """The kernels in use for products of that kind and that many queries of one key head.

    `product` is a dtype by NumPy's character: d, f, e, or E, which is ml_dtypes' for bfloat16.
    """
    cdef const InstructionSet *isa = chosen()
    if product == "d":
        return isa.float64
    if queries <= FEW or not dot:  # other measures have no parts to multiply
        return isa.few
    if product == "f":
        many = queries >= MANY
        return isa.float32 if many and worth_three_parts(head_dim, value_dim) else isa.few
    return isa.float16 if product == "e" else isa.bfloat16


cdef const TileKernels *gradient_kernels_for(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim
) except NULL:
    """The kernels of gradients: those that made the results, so that scores are the same bit for bit,
    or where these have no gradients those of float32.
    """
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, True)
    return chosen().few if kernels.gradient is NULL else kernels


cdef bint worth_three_parts(Py_ssize_t head_dim, Py_ssize_t value_dim) noexcept nogil:
    """Do parts multiply so many dims of float32 sooner than multiply-adds? They take 3/4 of the time
    a dim, but dims in whole chunks of 32 and of 16, and longer for what comes with every key: at 32,
    48 and 56 both take as long, at 64 parts are 15 % faster, and 20 % at 96 and 128.
    """
    cdef Py_ssize_t padded = (head_dim + 31) // 32 * 32 + (value_dim + 15) // 16 * 16
    return 4 * (head_dim + value_dim) - 3 * padded > (75 if value_dim else 37)


def tile_size(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """How many of the queries of one key head a tile and a panel take, and how many keys a pass."""
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, dot)
    return min(queries, kernels.queries), min(queries, kernels.panel), kernels.pass_keys


def multiplied_as(
    str product, Py_ssize_t queries, Py_ssize_t head_dim, Py_ssize_t value_dim, bint dot
):
    """What the kernels for such products multiply, in words."""
    cdef const InstructionSet *isa = chosen()
    cdef const TileKernels *kernels = kernels_for(product, queries, head_dim, value_dim, dot)
    if kernels is isa.float64:
        return "float64"
    if kernels is isa.few:
        return "float32"
    if kernels is isa.bfloat16:
        return "bfloat16"
    return "two bfloat16 parts" if kernels is isa.float16 else "three bfloat16 parts"


def instruction_sets():
    """The instruction sets that this machine can run, fastest first."""
    return tuple(
        INSTRUCTION_SETS[i].name.decode()
        for i in range(N_INSTRUCTION_SETS)
        if INSTRUCTION_SETS[i].runs_here()
    )


def kernel_tables():
    """By the instruction sets of this machine and by a product's dtype: which kernels these are.
    Where two are equal, so is every result.
    """
    tables = {}
    for i in range(N_INSTRUCTION_SETS):
        isa = &INSTRUCTION_SETS[i]
        if isa.runs_here():
            few = <uintptr_t> isa.few
            tables[isa.name.decode()] = {
                "float64": (<uintptr_t> isa.float64,),
                "float32": (<uintptr_t> isa.float32, few),
                "float16": (<uintptr_t> isa.float16, few),
                "bfloat16": (<uintptr_t> isa.bfloat16, few),
            }
    return tables


def instruction_set():
    """The instruction set in use: the fastest whose features are not disabled."""
    return chosen().name.decode()


cdef const InstructionSet *chosen() except NULL:
    # Read at every call, and from C, where it costs next to nothing.
    cdef const char *setting = c_getenv("FASTATTN_DISABLE_CPU_FEATURES")
    if setting is NULL or setting[0] == 0:
        return best
    disabled = setting.decode().replace(",", " ").split()
    for name in disabled:
        if name not in FEATURES:
            raise ValueError(
                f"FASTATTN_DISABLE_CPU_FEATURES: {name!r} given, some of {' '.join(FEATURES)} wanted"
            )
    for i in range(N_INSTRUCTION_SETS):
        needs = INSTRUCTION_SETS[i].features.decode().split()
        if INSTRUCTION_SETS[i].runs_here() and not set(needs) & set(disabled):
            return &INSTRUCTION_SETS[i]
    return best  # an instruction set without optional features
