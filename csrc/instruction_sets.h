/* The instruction sets that the kernels are compiled for, newest first. */
#ifndef FASTATTN_INSTRUCTION_SETS_H
#define FASTATTN_INSTRUCTION_SETS_H

#include "sparse.h"
#include "tile.h"

typedef struct {
    const char *name;
    const char *features; /* that it needs, as FASTATTN_DISABLE_CPU_FEATURES names them */
    int (*runs_here)(void);
    /* Is the next one faster on this processor? Then this one is passed over, unless it is named in
     * FASTATTN_ENABLE_CPU_FEATURES. NULL: no. */
    int (*slow_here)(void);
    /* The kernels by compute dtype; `fma` multiplies float32 by multiply-adds, whatever the
     * hardware: kernel_choice.pxi says when. */
    const TileKernels *float64, *float32, *float16, *bfloat16, *fma;
    const SparseKernels *sparse_float64, *sparse_float32; /* by the dtype of sums */
} InstructionSet;

extern const InstructionSet INSTRUCTION_SETS[]; /* ends in the one that always runs */
extern const int N_INSTRUCTION_SETS;

#endif
