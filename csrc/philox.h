/* The counter-based generator of dropout: Philox4x32 of Salmon et al. (2011), "Parallel random
 * numbers: as easy as 1, 2, 3", section 3.3. fastattn/core/dropout.py documents its counters.
 */
#ifndef FASTATTN_PHILOX_H
#define FASTATTN_PHILOX_H

#include <stdint.h>

#define PHILOX_ROUNDS 7 /* the fewest that pass BigCrush (table 2) */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u

/* Keys that share a counter, half of a word each. */
#define KEYS_PER_COUNTER 8

/* Replace the counter by its random words. */
static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int r = 0; r < PHILOX_ROUNDS; r++, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        uint64_t a = (uint64_t)PHILOX_M0 * c[0], b = (uint64_t)PHILOX_M1 * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)a;
    }
}

/* The key of a batch entry and a query head. */
static inline void philox_key_of(uint64_t seed, uint64_t entry, uint64_t head, uint32_t key[2]) {
    uint32_t c[4] = {(uint32_t)entry, (uint32_t)(entry >> 32), (uint32_t)head,
                     (uint32_t)(head >> 32)};
    philox(c, (uint32_t)seed, (uint32_t)(seed >> 32));
    key[0] = c[0];
    key[1] = c[1];
}
#endif
