/* Dropout: which weights of a sub-block are kept, from a generator with queries in the lanes.
 *
 * The sums of a row take all weights, the sums of values only those that are kept; these are
 * multiplied by Tile.keep_factor = 1 / (1 - rate) at the end.
 */
#ifndef FASTATTN_DROPOUT_INL_H
#define FASTATTN_DROPOUT_INL_H

#include "scratch-inl.h"

/* How many vectors of 64-bit lanes hold the words of one vector of queries: those of its even and
 * of its odd lanes, or with doubles those of all. */
#define WIDES ((int)(sizeof(wide) / sizeof(uint64_t) == LANES ? 1 : 2))

/* Philox of 64-bit lanes, of each of which the lower half counts. */
INLINE void philox_lanes(wide c[4], wide k0, wide k1) {
#pragma GCC unroll 8
    for (int r = 0; r < PHILOX_ROUNDS; r++) {
        wide a = multiply_low(c[0], PHILOX_M0), b = multiply_low(c[2], PHILOX_M1);
        c[0] = (b >> 32) ^ c[1] ^ k0;
        c[1] = b;
        c[2] = (a >> 32) ^ c[3] ^ k1;
        c[3] = a;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
}

/* Words of queries as 64-bit lanes, and back; of what is above the lower halves nothing is said. */
INLINE void widen_words(const uint32_t *from, wide to[2]) {
#ifdef REAL_IS_DOUBLE
    half_wide x;
    __builtin_memcpy(&x, from, sizeof x);
    to[0] = __builtin_convertvector(x, wide);
#else
    __builtin_memcpy(to, from, sizeof *to);
    to[1] = to[0] >> 32;
#endif
}
INLINE uvec join_words(const wide x[2]) {
#ifdef REAL_IS_DOUBLE
    return x[0] & 0xffffffffu;
#else
    return (uvec)((x[0] & 0xffffffffu) | x[1] << 32);
#endif
}
INLINE uvec exchange_halves(uvec x) {
#ifdef REAL_IS_DOUBLE
    return (x << 16 | x >> 16) & 0xffffffffu;
#else
    return x << 16 | x >> 16;
#endif
}

/* Of the LANES queries from `lane` on and the keys of one counter: all bits or none. */
INLINE void keep_lanes(const Tile *t, ptrdiff_t lane, uint64_t counter,
                       ivec kept[KEYS_PER_COUNTER]) {
    wide key0[2], key1[2], low[2], high[2], words[4][2];
    widen_words(t->drop_words[0] + lane, key0);
    widen_words(t->drop_words[1] + lane, key1);
    widen_words(t->drop_words[2] + lane, low);
    widen_words(t->drop_words[3] + lane, high);
#pragma GCC unroll 2
    for (int i = 0; i < WIDES; i++) {
        wide c[4] = {(wide){0} + (counter & 0xffffffffu), (wide){0} + (counter >> 32), low[i],
                     high[i]};
        philox_lanes(c, key0[i], key1[i]);
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) words[w][i] = c[w];
    }
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
        uvec x = join_words(words[w]), threshold = (uvec){0} + (lane_uint)t->drop_threshold;
        kept[2 * w] = (ivec)(x >= threshold);
        kept[2 * w + 1] = (ivec)(exchange_halves(x) >= threshold);
    }
}

/* Fill Scratch.kept for a sub-block; a counter may begin before it and end behind it. */
static void draw_kept(const Tile *t, const Scratch *s, int p, const SubBlock *sub) {
    uint64_t first = t->drop_first_key + (uint64_t)sub->key;
    int before = (int)(first % KEYS_PER_COUNTER);
    for (int j = -before; j < sub->keys; j += KEYS_PER_COUNTER) {
        uint64_t counter = (first + (uint64_t)(int64_t)j) / KEYS_PER_COUNTER;
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            ivec kept[KEYS_PER_COUNTER];
            keep_lanes(t, p * MR + n * LANES, counter, kept);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS_PER_COUNTER; i++)
                *(ivec *)(s->kept + (j + i) * MR + n * LANES) = kept[i];
        }
    }
}

/* [key][MR] of a sub-block: 0 where a weight is dropped. */
static inline void drop(const Tile *t, const Scratch *s, int p, const SubBlock *sub, real *x) {
    for (int j = 0; j < sub->keys; j++)
        for (int n = 0; n < t->micropanel[p].vecs; n++) {
            ptrdiff_t at = j * MR + n * LANES;
            store(x + at, (vec)((ivec)load(x + at) & *(const ivec *)(s->kept + at)));
        }
}
#endif
