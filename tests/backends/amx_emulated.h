/* AMX's instructions by those of AVX512_BF16, for the kernels' tests on machines without AMX: to be
 * included before all else, with -D__AMX_TILE__. */
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

typedef struct {
    char rows[16][64];
} EmulatedTile;
static EmulatedTile emulated_tiles[8];

static inline void emulated_load(int tile, const char *at, ptrdiff_t stride) {
    for (int i = 0; i < 16; i++) memcpy(emulated_tiles[tile].rows[i], at + i * stride, 64);
}
static inline void emulated_store(int tile, char *at, ptrdiff_t stride) {
    for (int i = 0; i < 16; i++) memcpy(at + i * stride, emulated_tiles[tile].rows[i], 64);
}
static inline void emulated_multiply(int to, int a, int b) {
    for (int i = 0; i < 16; i++) {
        __m512 sum = _mm512_loadu_ps(emulated_tiles[to].rows[i]);
        for (int k = 0; k < 16; k++) {
            int pair;
            memcpy(&pair, &emulated_tiles[a].rows[i][4 * k], 4);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair),
                                   (__m512bh)_mm512_loadu_si512(emulated_tiles[b].rows[k]));
        }
        _mm512_storeu_ps(emulated_tiles[to].rows[i], sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(&emulated_tiles[tile], 0, sizeof(EmulatedTile))
#define _tile_loadd(tile, at, stride) emulated_load(tile, (const char *)(at), stride)
#define _tile_stored(tile, at, stride) emulated_store(tile, (char *)(at), stride)
#define _tile_dpbf16ps(to, a, b) emulated_multiply(to, a, b)
