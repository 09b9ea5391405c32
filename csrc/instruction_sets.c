#include "instruction_sets.h"

/* setup.py compiles tile.c once for each table, with the flags of its instruction set, and defines
 * WITHOUT_<instruction set> if the compiler lacks them. */
#define DECLARE(name)                                                                              \
    extern const TileKernels name##_float32, name##_float64;                                       \
    extern const SparseKernels name##_sparse_float32, name##_sparse_float64;

/* A gather multiplies no matrices. */
#define SPARSE_KERNELS(name)                                                                       \
    .sparse_float64 = &name##_sparse_float64, .sparse_float32 = &name##_sparse_float32

/* Without bfloat16 hardware float16 and bfloat16 are widened to float32 as they are read. */
#define MULTIPLY_ADD_KERNELS(name)                                                                 \
    .float64 = &name##_float64, .float32 = &name##_float32, .float16 = &name##_float32,            \
    .bfloat16 = &name##_float32, .fma = &name##_float32, SPARSE_KERNELS(name)

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

DECLARE(avx512)
DECLARE(avx2)
DECLARE(baseline)
extern const TileKernels amx_float32, amx_float16, amx_bfloat16, avx512_bf16_bfloat16;

/* Every processor with AVX2 has F16C. */
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#if !defined(WITHOUT_amx) || !defined(WITHOUT_avx512_bf16)
static int has_avx512_bf16(void) {
    unsigned a, b, c, d;
    return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

#ifndef WITHOUT_avx512_bf16
/* VDPBF16PS makes two multiply-adds per lane. On AMD's Zen 4 a matmul by it has twice the speed of
 * float32 (iree-org/iree#15089). Intel's start one for four multiply-adds of float32: on Emerald
 * Rapids its peak is 86 GFLOP/s where that of float32 is 174, and attention takes 1.2 to 2.4
 * times as long as with bfloat16 widened to float32 (24 to 2048 queries of 32 to 256 dims, one
 * thread). */
static int has_slow_avx512_bf16(void) {
    __builtin_cpu_init();
    return !__builtin_cpu_is("amd");
}
#endif

#ifndef WITHOUT_amx
/* Tiles take the processor, an operating system that saves them, and its leave to this process. */
static int has_amx(void) {
#ifdef __linux__
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; /* arch_prctl(2) */
    unsigned a, b, c, d, saved, unused;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return 0; /* bfloat16, tiles */
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    return (saved >> 17 & 3) == 3 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

const InstructionSet INSTRUCTION_SETS[] = {
#ifndef WITHOUT_amx
    {
        .name = "amx",
        .features = "avx2 avx512 avx512_bf16 amx",
        .runs_here = has_amx,
        .float64 = &avx512_float64,
        .float32 = &amx_float32,
        .float16 = &amx_float16,
        .bfloat16 = &amx_bfloat16,
        .fma = &avx512_float32,
        SPARSE_KERNELS(avx512),
    },
#endif
#ifndef WITHOUT_avx512_bf16
    {
        .name = "avx512_bf16",
        .features = "avx2 avx512 avx512_bf16",
        .runs_here = has_avx512_bf16,
        .slow_here = has_slow_avx512_bf16,
        .float64 = &avx512_float64,
        .float32 = &avx512_float32,
        .float16 = &avx512_float32,
        .bfloat16 = &avx512_bf16_bfloat16,
        .fma = &avx512_float32,
        SPARSE_KERNELS(avx512),
    },
#endif
    {
        .name = "avx512",
        .features = "avx2 avx512",
        .runs_here = has_avx512,
        MULTIPLY_ADD_KERNELS(avx512),
    },
    {
        .name = "avx2",
        .features = "avx2",
        .runs_here = has_avx2,
        MULTIPLY_ADD_KERNELS(avx2),
    },
    {
        .name = "baseline",
        .features = "",
        .runs_here = always,
        MULTIPLY_ADD_KERNELS(baseline),
    },
};

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

DECLARE(neon)
extern const TileKernels neon_bf16_bfloat16;

#ifndef WITHOUT_neon_bf16
static int has_neon_bf16(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP2) >> 14 & 1; /* HWCAP2_BF16 */
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}
#endif

const InstructionSet INSTRUCTION_SETS[] = {
#ifndef WITHOUT_neon_bf16
    {
        /* The inner loop of a matmul has 39 instructions where multiply-adds have 176. Of float16
         * as two terms and of float32 as three it would have 146 and 263: the first is too little
         * gain for splitting numbers, as BFMMLA may be the slower instruction, too. */
        .name = "neon_bf16",
        .features = "neon_bf16",
        .runs_here = has_neon_bf16,
        .float64 = &neon_float64,
        .float32 = &neon_float32,
        .float16 = &neon_float32,
        .bfloat16 = &neon_bf16_bfloat16,
        .fma = &neon_float32,
        SPARSE_KERNELS(neon),
    },
#endif
    {
        .name = "neon",
        .features = "",
        .runs_here = always,
        MULTIPLY_ADD_KERNELS(neon),
    },
};

#else

DECLARE(baseline)
const InstructionSet INSTRUCTION_SETS[] = {{
    .name = "baseline",
    .features = "",
    .runs_here = always,
    MULTIPLY_ADD_KERNELS(baseline),
}};

#endif

const int N_INSTRUCTION_SETS = sizeof INSTRUCTION_SETS / sizeof *INSTRUCTION_SETS;
