/* The instruction sets that the kernels are compiled for, fastest first. */
#ifndef FASTATTN_INSTRUCTION_SETS_H
#define FASTATTN_INSTRUCTION_SETS_H

#include "tile.h"

typedef struct {
    const char *name;
    const char *features; /* what it needs, by the names of FASTATTN_DISABLE_CPU_FEATURES */
    int (*runs_here)(void);
    /* By the dtype of the result, and for queries that do not fill a vector of 16 (but float64). */
    const TileKernels *float64, *float32, *float16, *bfloat16, *fma;
} InstructionSet;

extern const InstructionSet INSTRUCTION_SETS[]; /* ends in the one that always runs */
extern const int N_INSTRUCTION_SETS;

#endif
