#include "instruction_sets.h"

/* setup.py compiles tile.c once for each name and dtype, with the flags that belong to the name. */
#define DECLARE(name) extern const TileKernels name##_float32, name##_float64;
/* float16 and bfloat16 are widened as they are read. */
#define KERNELS(name) &name##_float64, &name##_float32, &name##_float32, &name##_float32

static int always(void) { return 1; }

#if defined(__x86_64__)

DECLARE(avx512)
DECLARE(avx2)
DECLARE(baseline)

static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

/* Every processor with AVX2 has F16C. */
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const InstructionSet INSTRUCTION_SETS[] = {
    {"avx512", "avx2 avx512", has_avx512, KERNELS(avx512)},
    {"avx2", "avx2", has_avx2, KERNELS(avx2)},
    {"baseline", "", always, KERNELS(baseline)},
};

#elif defined(__aarch64__)

DECLARE(neon)
const InstructionSet INSTRUCTION_SETS[] = {{"neon", "", always, KERNELS(neon)}};

#else

DECLARE(baseline)
const InstructionSet INSTRUCTION_SETS[] = {{"baseline", "", always, KERNELS(baseline)}};

#endif

const int N_INSTRUCTION_SETS = sizeof INSTRUCTION_SETS / sizeof *INSTRUCTION_SETS;
