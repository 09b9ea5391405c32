/* Every block size and threshold of the kernels, each with its reason.
 *
 * kernel_choice.pxi exports those that are the same for every table as _kernels.tile_sizes(), and
 * tests/backends/test_twins.py compares them with their twins in the other backends.
 */
#ifndef FASTATTN_TILE_SIZES_H
#define FASTATTN_TILE_SIZES_H

/* ---- Blocks of the loop nest: see the head of tile.c ---- */

/* Keys in a block. Its keys and values stay in the second-level cache while all micropanels of a
 * tile read them, and its sums start from zero before they are added to the running sums: summing
 * over all keys at once has 3 to 25 times NumPy's rounding error, and blocks of 128 make too many
 * partial sums. */
#define BLOCK_K 512

/* Keys in a sub-block: their weights stay in the first-level cache between the softmax and the
 * second matmul. Blocks and sub-blocks begin at multiples of their sizes, whatever is visible. */
#define SUB_BLOCK_K 64

/* Queries in a tile, at most MAX_BLOCK_Q. On bfloat16 hardware as many as that, or as fit
 * MAX_MICROPANELS, because keys and values are packed again for each tile. For multiply-adds 96
 * floats or 48 doubles: a whole number of micropanels for every instruction set, and two for the
 * widest, because each tile reads all of K and V (48 floats lose 5 % to the third-level cache at
 * 4096 keys). */
#define MAX_BLOCK_Q 384
#define FMA_BLOCK_Q_BYTES 384 /* of one dim of a tile's queries */
#if defined(BF16_TERMS) && defined(__aarch64__)
#define BLOCK_Q (MAX_MICROPANELS * MR)
#elif defined(BF16_TERMS)
#define BLOCK_Q MAX_BLOCK_Q
#else
#define BLOCK_Q ((int)(FMA_BLOCK_Q_BYTES / sizeof(real)))
#endif
#define MAX_MICROPANELS 12 /* of a tile: 384 / 32 with AMX, 96 / 8 with SSE2 */

/* Head dims whose products are summed from zero before they are added to the score, at least: see
 * block_d. NumPy gives few queries a matmul that keeps many partial sums, and one vector of queries
 * has the time for as many. */
#define BLOCK_D 32
#define BLOCK_D_ONE_VECTOR 16
#define BF16_BLOCK_D 256 /* each of whose sums the hardware splits again */

/* Rows of scores and of sums are padded to a multiple of ROW_PAD: a register of AMX has 16 rows. */
#define ROW_PAD 16

/* Sub-blocks of keys begin at a multiple of ROW_MULTIPLE: whole steps of both matmuls, of which one
 * has keys as rows, two times ROW_PAD at once. */
#ifdef BF16_TERMS
#define ROW_MULTIPLE (2 * ROW_PAD)
#else
#define ROW_MULTIPLE 1
#endif

/* Keys whose scores are kept: with the delayed rescaling of online_softmax_bf16-inl.h only those of
 * one sub-block. */
#ifdef BF16_TERMS
#define SCORE_KEYS SUB_BLOCK_K
#else
#define SCORE_KEYS BLOCK_K
#endif

/* ---- The register tile: NR rows x MR queries, in MR_VECS vectors ---- */

/* NR x MR_VECS accumulators, MR_VECS operands and one broadcast number fill the register file of 32
 * or 16 vectors. With AMX, two of its registers lie side by side. */
#if defined(__AMX_TILE__) || defined(__AMXTILE__) /* Clang's name until version 15 */
#define HAS_AMX
#define VEC_BYTES 64
#define NR 8
#define MR_VECS 2
#elif defined(__AVX512F__)
#define VEC_BYTES 64
#define NR 8
#define MR_VECS 3
#elif defined(__AVX2__)
#define VEC_BYTES 32
#define NR 6
#define MR_VECS 2
#elif defined(__aarch64__)
#define VEC_BYTES 16
#define NR 8
#define MR_VECS 3
#else
#define VEC_BYTES 16
#define NR 6
#define MR_VECS 2
#endif
#define MAX_LANES 16 /* of any vector */

/* ---- Decoding: few queries, dims in the lanes ---- */

/* Queries of a tile up to which dims are in the lanes. With queries in the lanes a key costs as
 * much for one query as for LANES, which is about ten times what it costs one query with dims in
 * the lanes. */
#define MAX_DECODE_ROWS (LANES < 8 ? LANES : 8)

/* Queries and keys, or queries and vectors of dims, that share each load: as many as the registers
 * hold sums of. */
#define DECODE_QUERIES 4
#define DECODE_KEYS (LANES < 4 ? LANES : NR * MR_VECS < 24 ? 2 : 4)

/* How many rows ahead keys and values are prefetched: saves a third of the time of four queries
 * that share a key head, on two threads. */
#define DECODE_PREFETCH_ROWS 32

/* Dims whose products are summed from zero, 64 steps of each lane. */
#define DECODE_BLOCK_D (64 * LANES)

/* ---- Sparse masks ---- */

/* Listed rows are anywhere in memory: as many of those that are listed next are fetched while sums
 * are made, and the rows of queries and results as many ahead. */
#define PREFETCHED_PAIRS 16
#define PREFETCHED_ROWS 2

/* ---- Metrics and additive scores ---- */

/* Dims whose terms are summed from zero; one sum over all has several times NumPy's rounding error.
 */
#define METRIC_BLOCK_D 16

/* ---- bfloat16 hardware ---- */

/* Head dims or keys that one step of a matmul sums, and those of them that are side by side in a
 * lane: a row and an element of AMX's registers, or a row of the matrices of arm64's BFMMLA. */
#ifdef __aarch64__
#define CHUNK 4
#define BUNDLE 4
#else
#define CHUNK 32
#define BUNDLE 2
#endif

/* The running maximum of a row is updated, and its sums rescaled, only if a score exceeds it by
 * this power of 2. */
#define RESCALE_THRESHOLD 8

/* Micropanels whose contributions to the gradients of a sub-block of keys are added by one matmul.
 */
#define PENDING_MICROPANELS (BF16_TERMS == 1 ? 4 : 2)

/* ---- The choice of kernels, by the queries of one key head ---- */

/* Up to MAX_FMA_ROWS, packing keys for bfloat16 hardware costs more than it saves. */
#define MAX_FMA_ROWS 16

/* From MIN_BF16X3_ROWS on, three bfloat16 terms are faster for float32: they take 1.5 times as long
 * as multiply-adds for 32 queries, as long for 112, and 0.8 times as long for 384. */
#define MIN_BF16X3_ROWS 128

/* ---- Split-KV ---- */

/* Up to MAX_SPLIT_ROWS queries a key head would be one work item, which may leave threads idle, so
 * its keys are split, in a way that depends on their number alone: into runs of a multiple of
 * SPLIT_KEYS, at most MAX_SPLITS of them, because each needs room for a partial result, and time
 * even if all its keys are hidden. */
#define MAX_SPLIT_ROWS 32
#define SPLIT_KEYS 2048
#define MAX_SPLITS 64

#endif
