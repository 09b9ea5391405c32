/* The interface of the matmul engines.
 *
 * An engine computes S^T = K Q^T and O^T = V^T P^T for a micropanel of queries and a block of keys,
 * from operands that it packs as it likes. There are three:
 *
 *   matmul_fma-inl.h   multiply-adds, queries in the lanes, keys and values read where they are
 *   decode-inl.h       multiply-adds, dims in the lanes, for up to MAX_DECODE_ROWS queries
 *   matmul_bf16-inl.h  bfloat16 hardware, BF16_TERMS terms of each number
 *
 * A table compiled with BF16_TERMS has the last one, any other table has the first two.
 */
#ifndef FASTATTN_MATMUL_H
#define FASTATTN_MATMUL_H

#include "scratch-inl.h"

#if !defined(BF16_TERMS) || defined(HAS_AMX)
#define HAS_BACKWARD /* without AMX, gradients use the float32 multiply-adds */
#endif

struct MatmulEngine {
    /* Must Tile.q_scale be a power of 2, so that the terms of a query's numbers are exact? */
    bool exact_queries;
    /* Pack a micropanel's queries, times Tile.q_scale. */
    void (*pack_queries)(Tile *, const Scratch *, int p);
    /* Pack the keys or values [begin, end) of one sub-block: see ensure_packed. */
    void (*pack_keys)(const Tile *, const Scratch *, ptrdiff_t begin, ptrdiff_t end);
    void (*pack_values)(const Tile *, const Scratch *, ptrdiff_t begin, ptrdiff_t end);
    /* The scores of a sub-block, before Tile.score_scale and all options. Unless it is NULL, `top`
     * is raised to their maximum. */
    void (*multiply_keys)(const Tile *, const Scratch *, int p, const SubBlock *, vec *top);
    /* The online softmax of the keys [begin, end) of one block, and the sum of their values:
     * updates row_max, row_sum and out of the micropanel. */
    void (*attend_block)(Tile *, const Scratch *, int p, ptrdiff_t begin, ptrdiff_t end);
};

/* The engine for a tile. */
static const MatmulEngine *choose_engine(const Tile *t);

/* Configure the hardware before the matmuls of a call, and release it after them. */
static void begin_matmuls(void);
static void end_matmuls(void);

/* The peak FLOP/s of the hardware: runs `rounds` independent instructions per accumulator, and
 * returns the FLOPs. */
static double peak(ptrdiff_t rounds);

#ifdef HAS_BACKWARD
/* The matmuls of gradients: see backward-inl.h. backward_fma-inl.h and backward_bf16-inl.h each
 * define them. */
typedef struct BackwardScratch BackwardScratch;
typedef struct Accumulated Accumulated;

/* Pack the queries of a micropanel and the gradients of their results. */
static void begin_micropanel(const Tile *, const BackwardScratch *, int p);

/* Pack the keys and values [begin, end) of one sub-block, in addition to `pack_keys`. */
static void pack_for_gradients(const Tile *, const Scratch *, ptrdiff_t begin, ptrdiff_t end);

/* grad_scores = V dO^T / unit for a sub-block. Returns whether the engine can represent all
 * operands; if not they are multiplied as real numbers. */
static bool multiply_values(const Tile *, const BackwardScratch *, int p, const SubBlock *,
                            real *unit);

/* Add K^T dS^T to the gradients of a micropanel's queries, and P^T dO and dS^T Q to those of a
 * sub-block's values and keys, or keep them pending; `fits` says whether the engine can represent
 * all operands. */
static void sum_sub_block(const Tile *, const BackwardScratch *, int p, const SubBlock *, bool fits,
                          Accumulated *);

/* Add what is pending for a sub-block of `keys` keys. */
static void flush_pending(const Tile *, const BackwardScratch *, int keys, Accumulated *);
#endif

#endif
