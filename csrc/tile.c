/* The kernels of a tile, one body for every instruction set and dtype.
 *
 * Compiled once for each pair, with that instruction set's flags, -DTABLE=<the table's name> and
 * -DREAL_IS_DOUBLE for float64. A panel is what one register tile holds: PANEL queries in
 * TILE_VECS vectors. Within a block of keys, S^T = K Q^T, the weights P^T = exp(S^T - max) and
 * O^T = V^T P^T follow each other as in FlashAttention (Dao et al. 2022, algorithm 1), except that
 * the maximum is that of the whole block and O^T is rescaled once per block.
 */
#include <stdbool.h>
#include <string.h>

#include "simd.h"
#include "tile.h"

#define PANEL (TILE_VECS * LANES)
#define TILE_QUERIES ((int)(TILE_BYTES / sizeof(real)))
#define PANELS (TILE_QUERIES / PANEL)

/* Keys whose weights stay in the first-level cache between the softmax and the second product. */
#define STRIP_KEYS 64

/* A strip's keys as bits, in words as wide as a lane, so that lanes can test their own. */
#define STRIPS (BLOCK_KEYS / STRIP_KEYS)
#define WORDS (STRIP_KEYS / LANE_BITS)

/* The tile's scratch: [panel][row][PANEL] throughout, so that a panel is contiguous. */
typedef struct {
    real *row_max, *row_sum; /* [panel][PANEL] */
    real *q;                 /* [panel][head_dim][PANEL], scaled */
    real *out;               /* [panel][value_dim][PANEL], the running sum */
    real *block_out;         /* [panel][value_dim][PANEL], the sum of one block */
    real *scores;            /* [panel][keys of the block][PANEL], then the weights */
    real *bias;              /* [STRIP_KEYS][PANEL], of one panel */
    lane_int *saw;           /* [panel][PANEL]: has the query seen a key? -1 or 0 */
    lane_int *seen;          /* [panel][strip of the block][WORDS][PANEL]: see Seen */
} Scratch;

static int panels_for(ptrdiff_t queries) { return (int)((queries + PANEL - 1) / PANEL); }

static int fewer(ptrdiff_t left, int most) { return left < most ? (int)left : most; }

static size_t scratch_bytes(ptrdiff_t queries, ptrdiff_t head_dim, ptrdiff_t value_dim,
                            ptrdiff_t n_keys) {
    size_t row = sizeof(real) * (size_t)(panels_for(queries) * PANEL);
    return row * (size_t)(3 + head_dim + 2 * value_dim + fewer(n_keys, BLOCK_KEYS)) +
           row * STRIPS * WORDS + sizeof(real) * PANEL * STRIP_KEYS;
}

static Scratch scratch_of(const Tile *t) {
    ptrdiff_t row = t->panels * PANEL;
    Scratch s;
    s.row_max = t->scratch;
    s.row_sum = s.row_max + row;
    s.q = s.row_sum + row;
    s.out = s.q + row * t->head_dim;
    s.block_out = s.out + row * t->value_dim;
    s.bias = s.block_out + row * t->value_dim;
    s.saw = (lane_int *)(s.bias + STRIP_KEYS * PANEL);
    s.seen = s.saw + row;
    s.scores = (real *)(s.seen + row * STRIPS * WORDS);
    return s;
}

/* c[r][lane] = (accumulate ? c[r][lane] : 0) + sum over t of a[r * a_row + t * a_step] * b[t][lane],
 * and where `top` is given top[lane] = max(top[lane], c[r][lane]). Both products of attention have
 * this form; constant `rows`, `vecs` and one unit stride keep the accumulators in registers. Each
 * step fetches one line `ahead`: hardware prefetchers do not follow the narrow columns of V, nor
 * keep up with K once it lies in the third-level cache. */
INLINE void register_tile(const int rows, const int vecs, const real *a, ptrdiff_t a_row,
                          ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,
                          bool accumulate, vec *top, const real *ahead, ptrdiff_t ahead_step) {
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++)
            sum[r][n] = accumulate ? load(c + r * PANEL + n * LANES) : splat(0);
    for (ptrdiff_t t = 0; t < steps; t++) {
        __builtin_prefetch(ahead, 0, 2);
        vec operand[TILE_VECS];
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) operand[n] = load(b + n * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vec factor = splat(a[r * a_row]);
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) sum[r][n] = factor * operand[n] + sum[r][n];
        }
        a += a_step;
        b += PANEL;
        ahead += ahead_step;
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) store(c + r * PANEL + n * LANES, sum[r][n]);
    if (top)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
            for (int n = 0; n < vecs; n++) top[n] = larger(sum[r][n], top[n]);
}

#define PRODUCT_ARGS                                                                              \
    const real *a, ptrdiff_t a_row, ptrdiff_t a_step, ptrdiff_t steps, const real *b, real *c,    \
        bool accumulate, vec *top

INLINE void product_of_vecs(const int vecs, ptrdiff_t rows, PRODUCT_ARGS) {
    for (; rows >= TILE_ROWS; rows -= TILE_ROWS) {
        if (a_step == 1) {
            /* Rows of K, one behind the other: the same rows of the next strip. */
            bool packed = a_row == steps;
            register_tile(TILE_ROWS, vecs, a, a_row, 1, steps, b, c, accumulate, top,
                          packed ? a + STRIP_KEYS * a_row : a, packed ? TILE_ROWS : 0);
        } else if (a_row == 1)
            register_tile(TILE_ROWS, vecs, a, 1, a_step, steps, b, c, accumulate, top,
                          a + STRIP_KEYS * a_step, a_step);
        else
            register_tile(TILE_ROWS, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0);
        a += TILE_ROWS * a_row;
        c += TILE_ROWS * PANEL;
    }
    switch (rows) {
#define ROWS(n)                                                                                   \
    case n:                                                                                       \
        register_tile(n, vecs, a, a_row, a_step, steps, b, c, accumulate, top, a, 0);             \
        break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5)
#if TILE_ROWS == 8
        ROWS(6) ROWS(7)
#endif
#undef ROWS
    }
}

/* The product above for any number of rows of the first `vecs` vectors of a panel. */
static void product(int vecs, ptrdiff_t rows, PRODUCT_ARGS) {
    switch (vecs) {
    case 1: product_of_vecs(1, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
    case 2: product_of_vecs(2, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#if TILE_VECS == 3
    case 3: product_of_vecs(3, rows, a, a_row, a_step, steps, b, c, accumulate, top); break;
#endif
    }
}

/* The panel's share of the interval bookkeeping that the Tile explains. */
static void bound_panel(Tile *t, int p) {
    ptrdiff_t first = PTRDIFF_MAX, last = 0, inner_first = 0, inner_last = PTRDIFF_MAX;
    for (ptrdiff_t i = p * PANEL; i < t->n_queries && i < (p + 1) * PANEL; i++) {
        ptrdiff_t start = t->start[i], stop = t->stop[i];
        if (start < stop && start < first) first = start;
        if (start < stop && stop > last) last = stop;
        if (start > inner_first) inner_first = start;
        if (stop < inner_last) inner_last = stop;
    }
    t->panel[p].first = first;
    t->panel[p].last = last;
    t->panel[p].inner_first = inner_first;
    t->panel[p].inner_last = inner_last;
    t->panel[p].vecs = fewer((t->n_queries - p * PANEL + LANES - 1) / LANES, TILE_VECS);
    t->panel[p].started = 0;
    if (first < t->first) t->first = first;
    if (last > t->last) t->last = last;
}

/* columns[d][lane] = scale * (query `lane` of the LANES from `first` on)[d]. */
static void load_queries(const Tile *t, ptrdiff_t first, real *columns) {
    const real *rows[LANES];
    ptrdiff_t d = 0;
    for (int i = 0; i < LANES; i++) /* a lane without a query repeats the last one */
        rows[i] = t->q[first + i < t->n_queries ? first + i : t->n_queries - 1];
    vec scale = splat((real)t->scale);
    if (t->q_dim == 1)
        for (; d + LANES <= t->head_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = load_unaligned(rows[i] + d);
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(columns + (d + i) * PANEL, x[i] * scale);
        }
    for (; d < t->head_dim; d++)
        for (int i = 0; i < LANES; i++) columns[d * PANEL + i] = rows[i][d * t->q_dim] * scale[0];
}

/* The inverse: (row `lane` of the LANES from `first` on)[d] = columns[d][lane] * share[lane], but 0
 * where the query saw nothing, whatever is in its column. */
static void store_rows(const Tile *t, ptrdiff_t first, const real *columns, vec share, ivec saw) {
    int rows = fewer(t->n_queries - first, LANES);
    ptrdiff_t d = 0;
    if (t->out_dim == 1)
        for (; d + LANES <= t->value_dim; d += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                x[i] = choose(saw, load(columns + (d + i) * PANEL) * share, splat(0));
            transpose(x);
            if (rows == LANES) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++) store_unaligned((real *)t->out[first + i] + d, x[i]);
            } else
                for (int i = 0; i < rows; i++) store_unaligned((real *)t->out[first + i] + d, x[i]);
        }
    for (; d < t->value_dim; d++) {
        vec x = choose(saw, load(columns + d * PANEL) * share, splat(0));
        for (int i = 0; i < rows; i++) ((real *)t->out[first + i])[d * t->out_dim] = x[i];
    }
}

/* A row starts with its sink, a score without a value, or with nothing. */
static void start_rows(const Tile *t, const Scratch *s, ptrdiff_t first) {
    for (ptrdiff_t i = first; i < first + LANES; i++) {
        double sink = t->has_sinks && i < t->n_queries ? t->sink[i] : -INFINITY;
        s->row_max[i] = (real)(sink + t->margin);
        s->row_sum[i] = (real)(sink == -INFINITY ? 0 : sink == INFINITY ? 1 : WEIGHT_UNIT * exp(sink - (sink + t->margin)));
        s->saw[i] = 0;
    }
}

static void begin(Tile *t) {
    t->panels = panels_for(t->n_queries);
    t->first = PTRDIFF_MAX;
    t->last = 0;
    Scratch s = scratch_of(t);
    for (int p = 0; p < t->panels; p++) {
        bound_panel(t, p);
        for (int n = 0; n < TILE_VECS; n++) {
            ptrdiff_t at = p * PANEL + n * LANES;
            start_rows(t, &s, at);
            if (n < t->panel[p].vecs)
                load_queries(t, at, s.q + p * PANEL * t->head_dim + n * LANES);
        }
    }
}

/* What the queries of a panel see of a strip: nothing, every key, or those whose bits are set in
 * the panel's words, [WORDS][PANEL]. */
typedef enum { SEE_NONE, SEE_SOME, SEE_ALL } Seen;

/* Does each query see key j? In the sign bits, as `choose` takes them. */
INLINE ivec sees(const lane_int *words, int n, int j) {
    ivec word = *(const ivec *)(words + j / LANE_BITS * PANEL + n * LANES);
    return shift_up(word, LANE_BITS - 1 - j % LANE_BITS);
}

static uint64_t first_bits(ptrdiff_t n) {
    return n <= 0 ? 0 : n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
}

static uint64_t mask_bits(const char *mask, ptrdiff_t stride, int keys) {
    if (stride == 0) return mask[0] ? ~(uint64_t)0 : 0;
    if (stride == 1 && keys == 64) return nonzero_bytes(mask);
    uint64_t bits = 0;
    for (int j = 0; j < keys; j++) bits |= (uint64_t)(mask[j * stride] != 0) << j;
    return bits;
}

static bool all_see(const Tile *t, int p, ptrdiff_t key, int keys) {
    return t->panel[p].inner_first <= key && key + keys <= t->panel[p].inner_last;
}

/* Read who sees what of `keys` keys from `key` on, biases of -inf aside. */
static Seen look(const Tile *t, int p, ptrdiff_t key, int keys, lane_int *words) {
    ptrdiff_t first = p * PANEL;
    uint64_t every = first_bits(keys), any = 0, all = every, bits = 0, masked = ~(uint64_t)0;
    for (int i = 0; i < PANEL; i++) {
        ptrdiff_t row = first + i;
        if (row < t->n_queries) { /* a lane without a query sees what the last one does */
            bits = first_bits(t->stop[row] - key) & ~first_bits(t->start[row] - key) & every;
            if (t->has_mask) {
                if (i == 0 || t->mask[row] != t->mask[row - 1])
                    masked = mask_bits(t->mask[row] + key * t->mask_key, t->mask_key, keys);
                __builtin_prefetch(t->mask[row] + (key + 2 * STRIP_KEYS) * t->mask_key, 0, 2);
                bits &= masked;
            }
            any |= bits;
            all &= bits;
        }
        for (int w = 0; w < WORDS; w++)
            words[w * PANEL + i] = (lane_int)(bits >> (w * LANE_BITS % 64));
    }
    return any == 0 ? SEE_NONE : all == every ? SEE_ALL : SEE_SOME;
}

/* One number of any format as a double. */
static double read_number(const char *at, NumberFormat format) {
    union {
        char bytes[16];
        int8_t i8; int16_t i16; int32_t i32; int64_t i64;
        uint8_t u8; uint16_t u16; uint32_t u32; uint64_t u64;
        float f32; double f64; long double f80;
    } x;
    memset(&x, 0, sizeof x);
    for (int i = 0; i < format.bytes; i++)
        x.bytes[i] = at[format.swapped ? format.bytes - 1 - i : i];
    switch (format.kind) {
    case 'i':
        return format.bytes == 1   ? x.i8
               : format.bytes == 2 ? x.i16
               : format.bytes == 4 ? x.i32
                                   : (double)x.i64;
    case 'u':
        return format.bytes == 1   ? x.u8
               : format.bytes == 2 ? x.u16
               : format.bytes == 4 ? x.u32
                                   : (double)x.u64;
    case 'b': /* bfloat16 is the upper half of a float */
        x.u32 = (uint32_t)x.u16 << 16;
        return x.f32;
    }
    if (format.bytes == 4) return x.f32;
    if (format.bytes == 8) return x.f64;
    if (format.bytes == 16) return (double)x.f80;
    int exponent = x.u16 >> 10 & 31, fraction = x.u16 & 1023; /* float16 */
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : ldexp(exponent ? fraction + 1024 : fraction,
                                         exponent ? exponent - 25 : -24);
    return x.u16 >> 15 ? -size : size;
}

/* A finite number stays one, however large. */
static real as_real(double x) {
    if (x > REAL_MAX) return x == INFINITY ? INFINITY : REAL_MAX;
    if (x < -REAL_MAX) return x == -INFINITY ? -INFINITY : -REAL_MAX;
    return (real)x;
}

/* tile[j][lane] = the bias of `keys` keys from `key` on. Returns the largest magnitude. */
static real load_bias(const Tile *t, int p, ptrdiff_t key, int keys, real *tile) {
    const char *rows[PANEL];
    NumberFormat format = t->bias_format;
    bool direct = format.kind == 'f' && format.bytes == sizeof(real) && !format.swapped &&
                  t->bias_key == sizeof(real);
    vec most = splat(0);
    for (int i = 0; i < PANEL; i++) {
        ptrdiff_t row = p * PANEL + i < t->n_queries ? p * PANEL + i : t->n_queries - 1;
        rows[i] = t->bias[row] + key * t->bias_key;
        for (int ahead = 0; ahead <= STRIP_KEYS * (int)sizeof(real) && direct; ahead += 64)
            __builtin_prefetch(rows[i] + STRIP_KEYS * sizeof(real) + ahead, 0, 2);
    }
    for (int n = 0; n < t->panel[p].vecs; n++) {
        int j = 0;
        for (; direct && j + LANES <= keys; j += LANES) {
            vec x[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                x[i] = load_unaligned((const real *)(rows[n * LANES + i]) + j);
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                store(tile + (j + i) * PANEL + n * LANES, x[i]);
                most = larger(magnitude(x[i]), most);
            }
        }
        for (; j < keys; j++) {
            real *x = tile + j * PANEL + n * LANES;
            for (int i = 0; i < LANES; i++)
                x[i] = as_real(read_number(rows[n * LANES + i] + j * t->bias_key, format));
            most = larger(magnitude(load(x)), most);
        }
    }
    real largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    return largest;
}

/* Take the keys whose bias is -inf out of the words. */
static void exclude(const real *bias, int vecs, int keys, lane_int *words) {
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            ivec excluded = load(bias + j * PANEL + n * LANES) == splat(-INFINITY);
            ivec *word = (ivec *)(words + j / LANE_BITS * PANEL + n * LANES);
            *word &= ~(excluded & splat_int((lane_int)((uint64_t)1 << j % LANE_BITS)));
        }
}

INLINE void add_bias(const real *bias, int vecs, int keys, real *scores, bool bounded) {
    const vec most = splat(REAL_MAX);
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * PANEL + n * LANES;
            vec score = load(s), b = load(bias + j * PANEL + n * LANES), sum = score + b;
            if (bounded) { /* a sum of finite numbers that overflows is the largest number still */
                ivec finite = (magnitude(score) <= most) & (magnitude(b) <= most);
                vec bound = choose(magnitude(sum) > most, with_sign_of(most, sum), sum);
                sum = choose(finite, bound, sum);
            }
            store(s, sum);
        }
}

static void cap(real softcap, int vecs, int keys, real *scores) {
    real inverse = 1 / softcap;
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * PANEL + n * LANES;
            store(s, softcap * tanh_vec(load(s) * inverse));
        }
}

static void subtract_alibi(const Tile *t, int p, ptrdiff_t key, int vecs, int keys, real *scores) {
    for (int n = 0; n < vecs; n++) {
        real slopes[LANES] = {0}, distances[LANES] = {0};
        for (int i = 0; i < LANES && p * PANEL + n * LANES + i < t->n_queries; i++) {
            slopes[i] = (real)t->slope[p * PANEL + n * LANES + i];
            distances[i] = (real)(t->position[p * PANEL + n * LANES + i] - key);
        }
        vec slope = load_unaligned(slopes), distance = load_unaligned(distances);
        for (int j = 0; j < keys; j++) {
            real *s = scores + j * PANEL + n * LANES;
            store(s, load(s) - slope * magnitude(distance));
            distance -= 1;
        }
    }
}

static void take_max(int vecs, int keys, const real *scores, vec *top) {
    for (int n = 0; n < vecs; n++) top[n] = splat(-INFINITY);
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++)
            top[n] = larger(load(scores + j * PANEL + n * LANES), top[n]);
}

/* Put -inf where a query does not see a key, and take the maximum of what is left. */
static void hide_unseen(const lane_int *words, int vecs, int keys, real *scores, vec *top) {
    for (int n = 0; n < vecs; n++) {
        vec most = splat(-INFINITY);
        for (int w = 0; w * LANE_BITS < keys; w++) {
            int count = fewer(keys - w * LANE_BITS, LANE_BITS);
            ivec word = shift_up(*(const ivec *)(words + w * PANEL + n * LANES), LANE_BITS - count);
            for (int j = w * LANE_BITS + count - 1; j >= w * LANE_BITS; j--) {
                real *s = scores + j * PANEL + n * LANES;
                vec x = choose(word, load(s), splat(-INFINITY));
                store(s, x);
                most = larger(x, most);
                word = shift_up(word, 1); /* the next lower key in the sign bit */
            }
        }
        top[n] = most;
    }
}

/* What comes after the product: softcap, bias, alibi, and who sees what. */
static Seen finish_scores(const Tile *t, const Scratch *s, int p, ptrdiff_t key, int keys, Seen seen,
                          real *scores, lane_int *words, vec *top) {
    int vecs = t->panel[p].vecs;
    if (t->softcap > 0) cap((real)t->softcap, vecs, keys, scores);
    if (t->has_bias) {
        real largest = load_bias(t, p, key, keys, s->bias);
        if (largest == INFINITY) {
            exclude(s->bias, vecs, keys, words);
            seen = SEE_SOME;
        }
        if (largest <= REAL_MAX / 4)
            add_bias(s->bias, vecs, keys, scores, false);
        else
            add_bias(s->bias, vecs, keys, scores, true);
    }
    if (t->has_alibi) subtract_alibi(t, p, key, vecs, keys, scores);
    if (seen == SEE_SOME)
        hide_unseen(words, vecs, keys, scores, top);
    else if (t->softcap > 0 || t->has_bias || t->has_alibi)
        take_max(vecs, keys, scores, top);
    return seen;
}

/* One panel's scores for some keys, -inf where unseen; `top` takes part in their maximum. */
static Seen score(const Tile *t, const Scratch *s, int p, ptrdiff_t key, int keys, real *scores,
                  lane_int *words, vec *top) {
    int vecs = t->panel[p].vecs;
    Seen seen = SEE_ALL;
    if (t->has_mask || t->has_bias || !all_see(t, p, key, keys)) seen = look(t, p, key, keys, words);
    if (seen == SEE_NONE) return seen;

    vec strip_top[TILE_VECS];
    for (int n = 0; n < vecs; n++) strip_top[n] = splat(-INFINITY);
    product(vecs, keys, (const real *)t->k + key * t->k_key, t->k_key, t->k_dim, t->head_dim,
            s->q + p * PANEL * t->head_dim, scores, false, strip_top);
    seen = finish_scores(t, s, p, key, keys, seen, scores, words, strip_top);
    for (int n = 0; n < vecs; n++) {
        ivec *saw = (ivec *)(s->saw + p * PANEL + n * LANES);
        for (int w = 0; w < WORDS && seen == SEE_SOME; w++)
            *saw |= *(const ivec *)(words + w * PANEL + n * LANES) != 0;
        if (seen == SEE_ALL) *saw = splat_int(-1);
        top[n] = larger(strip_top[n], top[n]);
    }
    return seen;
}

/* Scores to weights relative to `top`; their sum is added to `sum`. Subtracting before scaling by
 * log2(e) costs an instruction more than a multiply-add, but the largest weight is exact and no
 * finite score overflows. */
INLINE void weigh_vecs(const int vecs, int keys, real *scores, const vec *top, vec *sum) {
    vec shift[TILE_VECS], total[TILE_VECS];
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) shift[n] = top[n], total[n] = sum[n];
    for (int j = 0; j < keys; j++) {
#pragma GCC unroll 3
        for (int n = 0; n < vecs; n++) {
            real *s = scores + j * PANEL + n * LANES;
            vec p = weight_of(load(s) - shift[n]);
            store(s, p);
            total[n] += p;
        }
    }
#pragma GCC unroll 3
    for (int n = 0; n < vecs; n++) sum[n] = total[n];
}

static void weigh(int vecs, int keys, real *scores, const vec *top, vec *sum) {
    switch (vecs) {
    case 1: weigh_vecs(1, keys, scores, top, sum); break;
    case 2: weigh_vecs(2, keys, scores, top, sum); break;
#if TILE_VECS == 3
    case 3: weigh_vecs(3, keys, scores, top, sum); break;
#endif
    }
}

/* Is each value of these keys finite? x * 0 is 0 for finite x only. */
static bool all_finite(const Tile *t, const real *v, int keys) {
    vec sums[4] = {{0}}; /* independent, or the latency of one sum would be the time of the loop */
    real rest = 0;
    for (int j = 0; j < keys; j++) {
        const real *row = v + j * t->v_key;
        ptrdiff_t d = 0;
        if (t->v_dim == 1) {
            for (; d + 4 * LANES <= t->value_dim; d += 4 * LANES)
#pragma GCC unroll 4
                for (int n = 0; n < 4; n++) sums[n] += load_unaligned(row + d + n * LANES) * 0;
            for (; d + LANES <= t->value_dim; d += LANES) sums[0] += load_unaligned(row + d) * 0;
        }
        for (; d < t->value_dim; d++) rest += row[d * t->v_dim] * 0;
    }
    vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; i < LANES; i++) rest += sum[i];
    return rest == 0;
}

/* The second product where some query must not meet a NaN or an Inf in some v that it does not
 * see: 0 * NaN is a NaN, so unseen keys are left out lane by lane. */
static void careful_product(const Tile *t, const lane_int *words, int vecs, const real *v,
                            int keys, const real *weights, real *out) {
    for (int j = 0; j < keys; j++)
        for (int n = 0; n < vecs; n++) {
            ivec seen = sees(words, n, j);
            vec p = load(weights + j * PANEL + n * LANES);
            for (ptrdiff_t d = 0; d < t->value_dim; d++) {
                real *o = out + d * PANEL + n * LANES;
                vec sum = load(o);
                store(o, choose(seen, splat(v[j * t->v_key + d * t->v_dim]) * p + sum, sum));
            }
        }
}

/* The weighted sum of some keys' values, for one panel. */
static void sum_values(const Tile *t, int p, ptrdiff_t key, int keys, Seen seen,
                       const lane_int *words, const real *weights, real *out, bool accumulate) {
    int vecs = t->panel[p].vecs;
    const real *v = (const real *)t->v + key * t->v_key;
    if (seen == SEE_SOME && !all_finite(t, v, keys)) {
        if (!accumulate) memset(out, 0, sizeof(real) * PANEL * (size_t)t->value_dim);
        careful_product(t, words, vecs, v, keys, weights, out);
        return;
    }
    product(vecs, t->value_dim, v, t->v_dim, t->v_key, keys, weights, out, accumulate, NULL);
}

/* A strip of keys for one panel: those of the STRIP_KEYS that the panel sees some of. */
typedef struct {
    ptrdiff_t key;
    int keys;
    real *scores;
    lane_int *words;
    Seen seen;
} Strip;

/* What one panel knows of the block under way. */
typedef struct {
    Strip strips[STRIPS];
    bool live; /* does it see anything? */
    vec top[TILE_VECS], sum[TILE_VECS], rescale[TILE_VECS];
} PanelBlock;

static void open_block(const Tile *t, const Scratch *s, int p, ptrdiff_t begin, ptrdiff_t end,
                       PanelBlock *b) {
    b->live = false;
    for (int n = 0; n < TILE_VECS; n++) b->top[n] = splat(-INFINITY), b->sum[n] = splat(0);
    for (int i = 0; begin + i * STRIP_KEYS < end; i++) {
        ptrdiff_t from = begin + i * STRIP_KEYS, to = from + STRIP_KEYS < end ? from + STRIP_KEYS : end;
        if (from < t->panel[p].first) from = t->panel[p].first;
        if (to > t->panel[p].last) to = t->panel[p].last;
        b->strips[i] = (Strip){
            .key = from,
            .keys = to > from ? (int)(to - from) : 0,
            .scores = s->scores + (p * (end - begin) + (from - begin)) * PANEL,
            .words = s->seen + (p * STRIPS + i) * WORDS * PANEL,
            .seen = SEE_NONE,
        };
    }
}

static void raise_max(PanelBlock *b, real *row_max, real margin) {
    for (int n = 0; n < TILE_VECS; n++) {
        vec before = load(row_max + n * LANES);
        vec now = larger(before, b->top[n] + margin);
        store(row_max + n * LANES, now);
        /* While a row has seen nothing its maximum is -inf; any finite one will do. */
        b->top[n] = choose(now == splat(-INFINITY), splat(0), now);
        /* An unchanged maximum may be an infinite sink. */
        b->rescale[n] = choose(before == now, splat(1), weight_of(before - b->top[n]) * (real)(1 / WEIGHT_UNIT));
    }
}

static void join_block(const PanelBlock *b, int vecs, ptrdiff_t value_dim, real *row_sum,
                       const real *block_out, real *out) {
    for (int n = 0; n < vecs; n++) {
        real *sum = row_sum + n * LANES;
        store(sum, load(sum) * b->rescale[n] + b->sum[n]);
        if (block_out == out) continue; /* the first block */
        for (ptrdiff_t d = 0; d < value_dim; d++) {
            real *total = out + d * PANEL + n * LANES;
            store(total, load(total) * b->rescale[n] + load(block_out + d * PANEL + n * LANES));
        }
    }
}

static void attend(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    Scratch s = scratch_of(t);
    int strips = (int)((end - begin + STRIP_KEYS - 1) / STRIP_KEYS);
    PanelBlock blocks[PANELS];
    for (int p = 0; p < t->panels; p++) open_block(t, &s, p, begin, end, &blocks[p]);

    for (int i = 0; i < strips; i++)
        for (int p = 0; p < t->panels; p++) {
            Strip *strip = &blocks[p].strips[i];
            if (strip->keys == 0) continue;
            strip->seen = score(t, &s, p, strip->key, strip->keys, strip->scores, strip->words,
                                blocks[p].top);
            if (strip->seen != SEE_NONE) blocks[p].live = true;
        }
    for (int p = 0; p < t->panels; p++)
        if (blocks[p].live) raise_max(&blocks[p], s.row_max + p * PANEL, (real)t->margin);

    bool begun[PANELS] = {false};
    for (int i = 0; i < strips; i++)
        for (int p = 0; p < t->panels; p++) {
            PanelBlock *b = &blocks[p];
            Strip *strip = &b->strips[i];
            if (strip->seen == SEE_NONE) continue;
            real *out = (t->panel[p].started ? s.block_out : s.out) + p * PANEL * t->value_dim;
            weigh(t->panel[p].vecs, strip->keys, strip->scores, b->top, b->sum);
            sum_values(t, p, strip->key, strip->keys, strip->seen, strip->words, strip->scores, out,
                       begun[p]);
            begun[p] = true;
        }
    for (int p = 0; p < t->panels; p++) {
        if (!blocks[p].live) continue;
        ptrdiff_t at = p * PANEL * t->value_dim;
        join_block(&blocks[p], t->panel[p].vecs, t->value_dim, s.row_sum + p * PANEL,
                   (t->panel[p].started ? s.block_out : s.out) + at, s.out + at);
        t->panel[p].started = 1;
    }
}

/* Is some sum of values not finite although the sum of its weights is? */
static bool overflowed(const Tile *t, const Scratch *s) {
    vec wrong = splat(0);
    for (int p = 0; p < t->panels; p++)
        for (int n = 0; n < t->panel[p].vecs && t->panel[p].started; n++) {
            const real *out = s->out + p * PANEL * t->value_dim + n * LANES;
            vec not_finite = splat(0); /* x * 0 is a NaN then, and so is every sum with it */
            for (ptrdiff_t d = 0; d < t->value_dim; d++) not_finite += load(out + d * PANEL) * 0;
            vec sum = load(s->row_sum + p * PANEL + n * LANES);
            wrong += choose(sum * 0 == splat(0), not_finite, splat(0));
        }
    real all = 0;
    for (int i = 0; i < LANES; i++) all += wrong[i];
    return all != 0;
}

static int finish(Tile *t) {
    Scratch s = scratch_of(t);
    if (t->margin == 0 && overflowed(t, &s)) return 0;
    for (int p = 0; p < t->panels; p++)
        for (int n = 0; n < t->panel[p].vecs; n++) {
            ptrdiff_t at = p * PANEL + n * LANES;
            ivec saw = *(const ivec *)(s.saw + at);
            /* A sum of 0 with a key in sight: all scores are -inf, 0 / 0 as the formula says. */
            vec sum = load(s.row_sum + at);
            vec share = choose(sum == splat(0), splat(NAN), splat(1) / sum);
            store_rows(t, at, s.out + p * PANEL * t->value_dim + n * LANES, share, saw);
        }
    if (t->want_lse)
        for (ptrdiff_t i = 0; i < t->n_queries; i++) {
            double top = s.row_max[i]; /* log(NaN) where the top is Inf: Inf - Inf was weighed */
            t->lse[i] = top == INFINITY ? top : top + log((double)s.row_sum[i] / WEIGHT_UNIT);
        }
    return 1;
}

static void store_weights(const Tile *t, const Scratch *s, int p, const Strip *strip) {
    for (int n = 0; n < t->panel[p].vecs; n++) {
        vec top = load(s->row_max + p * PANEL + n * LANES);
        vec sum = load(s->row_sum + p * PANEL + n * LANES);
        top = choose(top == splat(-INFINITY), splat(0), top);
        for (int j = 0; j < strip->keys; j++) {
            vec weight = weight_of(load(strip->scores + j * PANEL + n * LANES) - top) / sum;
            ivec seen = strip->seen == SEE_ALL ? splat_int(-1) : sees(strip->words, n, j);
            for (int i = 0; i < LANES; i++) {
                ptrdiff_t row = p * PANEL + n * LANES + i;
                if (row >= t->n_queries) break;
                if (seen[i] < 0) ((real *)t->weights[row])[(strip->key + j) * t->weights_key] = weight[i];
            }
        }
    }
}

/* The weights of the keys [begin, end): their scores once more, now that the sum is known. */
static void weights(Tile *t, ptrdiff_t begin, ptrdiff_t end) {
    Scratch s = scratch_of(t);
    for (int p = 0; p < t->panels; p++) {
        PanelBlock b;
        open_block(t, &s, p, begin, end, &b);
        for (int i = 0; begin + i * STRIP_KEYS < end; i++) {
            Strip *strip = &b.strips[i];
            if (strip->keys == 0) continue;
            strip->seen = score(t, &s, p, strip->key, strip->keys, strip->scores, strip->words, b.top);
            if (strip->seen != SEE_NONE) store_weights(t, &s, p, strip);
        }
    }
}

/* Flops of `rounds` rounds of independent multiply-adds: what the machine can do at most. */
static double peak(ptrdiff_t rounds) {
    vec sum[TILE_ROWS][TILE_VECS], factor = splat((real)0.5), term = splat((real)1);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
        for (int n = 0; n < TILE_VECS; n++) {
            sum[r][n] = splat(1);
            HIDE_VALUE(sum[r][n]); /* or equal ones would be computed once */
        }
    HIDE_VALUE(factor);
    HIDE_VALUE(term);
    for (ptrdiff_t i = 0; i < rounds; i++)
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 3
            for (int n = 0; n < TILE_VECS; n++) sum[r][n] = sum[r][n] * factor + term;
    vec all = splat(0);
    for (int r = 0; r < TILE_ROWS; r++)
        for (int n = 0; n < TILE_VECS; n++) all += sum[r][n];
    HIDE_VALUE(all);
    return 2.0 * (double)rounds * TILE_ROWS * TILE_VECS * LANES;
}

const TileKernels TABLE = {TILE_QUERIES, scratch_bytes, begin, attend, finish, weights, peak};
