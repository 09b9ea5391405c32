/* What matmul_bf16-inl.h asks of bfloat16 hardware: terms of the numbers of a vector, and matmuls.
 *
 *   bf16_avx512-inl.h  AMX, whose registers are matrices, or AVX512_BF16's dot products of pairs
 *   bf16_neon-inl.h    the BFMMLA of arm64, which multiplies matrices of 2 x 4 and 4 x 2
 */
#ifndef FASTATTN_BF16_H
#define FASTATTN_BF16_H

#include "simd-inl.h"

typedef uint16_t bfloat;

/* The BUNDLE numbers of a lane that the hardware multiplies at once, the first one lowest. */
#if BUNDLE == 2
typedef uint32_t bundle;
#else
typedef uint64_t bundle;
#endif
#define BUNDLES (CHUNK / BUNDLE)

/* Some of the lanes of a vector. */
#if defined(__AVX512F__)
typedef uint16_t flags;
#else
typedef ivec flags;
#endif
INLINE uint64_t flag_bits(flags);
INLINE vec without(flags, vec); /* 0 in these lanes */

/* Lanes that terms cannot represent: NaN and Inf, and with three terms numbers so small that their
 * third term would be subnormal. */
INLINE flags unrepresentable(vec);

/* Store the terms of CHUNK numbers, `term` apart. */
INLINE void split_chunk(const vec x[CHUNK / LANES], bfloat *to, ptrdiff_t term);

/* Store the terms of LANES bundles. */
INLINE void split_bundles(const vec x[BUNDLE], bundle *to, ptrdiff_t term);

/* Store the bundles of the dims [d, d + LANES) of BUNDLE rows of bfloat16. NaN and Inf become 0,
 * and their lanes are added to the `special` ones of their row. */
INLINE void bundle_bfloats(const char *const rows[BUNDLE], ptrdiff_t d, bundle *to,
                           flags special[BUNDLE]);

/* Set the terms of LANES bundles to 0 where `kept` is. */
INLINE void drop_bundles(const ivec kept[BUNDLE], bundle *at, ptrdiff_t term);

#if BUNDLES > 1
/* Transpose BUNDLES rows of LANES bundles, which are `from_row` apart, to contiguous ones. */
INLINE void transpose_bundles(const bundle *from, ptrdiff_t from_row, bundle *to);
#endif

/* The terms of the operands of a matmul; strides in elements. */
typedef struct {
    const bfloat *data; /* [row][CHUNK] */
    ptrdiff_t term, chunk;
} Rows;
typedef struct {
    const bundle *data; /* [bundle][MR] */
    ptrdiff_t term, chunk;
} Lanes;

/* c[row][lane] (+)= the products of `row_groups` times ROW_PAD rows, in steps of a chunk: those of
 * the terms i and j with i + j <= order, smaller ones first. */
INLINE void multiply_rows(const int order, const int row_groups, const int vecs, Rows a, Lanes b,
                          int chunks, real *c, bool accumulate);
#endif
