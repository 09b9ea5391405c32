/* The instruction sets that the kernels are compiled for, fastest first. */
#ifndef FASTATTN_INSTRUCTION_SETS_H
#define FASTATTN_INSTRUCTION_SETS_H

#include "tile.h"

typedef struct {
    const char *name;
    const char *features; /* what it needs, by the names of FASTATTN_DISABLE_CPU_FEATURES */
    int (*runs_here)(void);
    const TileKernels *float64, *float32, *float16, *bfloat16; /* by the dtype of the result */
} InstructionSet;

extern const InstructionSet INSTRUCTION_SETS[]; /* ends in the one that always runs */
extern const int N_INSTRUCTION_SETS;

#endif
