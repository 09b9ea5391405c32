/* Numbers of any format in memory, to lanes of `real` and back.
 *
 * Queries, keys and values may be float32, float16, bfloat16 (and float64 if `real` is), each of
 * its own format; keys and values may also be int8. Results are `real`, or halves if that is
 * float32. A bias may be of any real dtype and byte order. */
#ifndef FASTATTN_CONVERT_INL_H
#define FASTATTN_CONVERT_INL_H

#include <string.h>

#include "simd-inl.h"

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double half_to_double(uint16_t x) {
    int exponent = x >> 10 & 31, fraction = x & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : ldexp(exponent ? fraction + 1024 : fraction,
                                         exponent ? exponent - 25 : -24);
    return x >> 15 ? -size : size;
}

/* To the nearest float16, ties to even. */
static uint16_t float_to_half(float x) {
    uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 rounds to infinity */
    if (size < 0x38800000) /* subnormal: adding 1/2 leaves it in the lowest bits */
        return (uint16_t)(sign | (as_bits(as_float(size) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

/* To the nearest bfloat16, ties to even. */
static uint16_t float_to_bfloat(float x) {
    uint32_t bits = as_bits(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double float8_to_double(uint8_t x) {
    int exponent = x >> 3 & 15, fraction = x & 7;
    double size = ldexp(exponent ? fraction + 8 : fraction, exponent ? exponent - 10 : -9);
    if ((x & 127) == 127) size = NAN;
    return x >> 7 ? -size : size;
}

/* One number of any format as a double, but of two in a byte: see read_dim. */
static double read_number(const char *at, NumberFormat format) {
    union {
        char bytes[16];
        int8_t i8;
        int16_t i16;
        int32_t i32;
        int64_t i64;
        uint8_t u8;
        uint16_t u16;
        uint32_t u32;
        uint64_t u64;
        float f32;
        double f64;
        long double f80;
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
    case '8': return float8_to_double(x.u8);
    case 'b': /* bfloat16 is the upper half of a float */ return as_float((uint32_t)x.u16 << 16);
    }
    if (format.bytes == 4) return x.f32;
    if (format.bytes == 8) return x.f64;
    if (format.bytes == 16) {
        double y = (double)x.f80; /* a finite number stays finite */
        return isinf(y) && !isinf(x.f80) ? copysign(DBL_MAX, y) : y;
    }
    return half_to_double(x.u16);
}

/* The number of dim `d` of a row. */
static double read_dim(const char *row, ptrdiff_t dim, ptrdiff_t d, NumberFormat format) {
    if (format.kind == '4') return ((uint8_t)row[d / 2] >> d % 2 * 4 & 15) - 8;
    return read_number(row + d * dim, format);
}

/* Where dim `d` is in a row without gaps; an even one. */
INLINE ptrdiff_t dim_offset(NumberFormat format, ptrdiff_t d) {
    return format.kind == '4' ? d / 2 : d * format.bytes;
}

/* What dim `d` of a row with these scales is multiplied by. */
INLINE real scale_of_dim(const float *scales, NumberFormat format, ptrdiff_t d) {
    return scales ? (real)scales[format.kind == '4' ? d / INT4_GROUP : 0] : 1;
}

/* A finite number stays finite, however large. */
static real as_real(double x) {
    if (x > REAL_MAX) return x == INFINITY ? INFINITY : REAL_MAX;
    if (x < -REAL_MAX) return x == -INFINITY ? -INFINITY : -REAL_MAX;
    return (real)x;
}

INLINE bool is_real(NumberFormat format) {
    return format.kind == 'f' && format.bytes == sizeof(real) && !format.swapped;
}

/* LANES contiguous numbers, of which halves and doubles are in this machine's byte order. */
INLINE vec load_numbers(const char *at, NumberFormat format) {
    if (is_real(format)) return load_unaligned((const real *)at);
    if (format.kind == 'b') return load_bfloats(at);
    if (format.kind == 'i' && format.bytes == 1) return load_bytes(at);
#ifdef REAL_IS_DOUBLE
    if (format.kind == 'f' && format.bytes == 4 && !format.swapped) return load_floats(at);
#endif
#ifdef HAS_HALF
    if (format.kind == 'f' && format.bytes == 2) return load_halves(at);
#endif
#ifdef HAS_FLOAT8
    if (format.kind == '8') return load_float8(at);
#endif
#ifndef REAL_IS_DOUBLE
    if (format.kind == '4') return load_nibbles(at);
    if (format.kind == 'f' && format.bytes == 8) return load_doubles(at);
#endif
    vec x = {0};
    for (int i = 0; i < LANES; i++) x[i] = as_real(read_dim(at, format.bytes, i, format));
    return x;
}

/* The first `n` of LANES contiguous numbers, then 0. Reads no more than these. */
INLINE vec load_some(const char *at, ptrdiff_t n, NumberFormat format) {
    if (n >= LANES) return load_numbers(at, format);
    if (is_real(format)) return load_first((const real *)at, n);
    char some[LANES * sizeof(real)] __attribute__((aligned(64))) = {0};
    if (format.kind == '4') memset(some, 0x88, sizeof some); /* two zeros */
    memcpy(some, at, (size_t)dim_offset(format, n + (format.kind == '4')));
    return load_numbers(some, format);
}

/* The first `n` of LANES numbers that are `dim` bytes apart, then 0. */
NOINLINE vec load_strided(const char *at, ptrdiff_t dim, ptrdiff_t n, NumberFormat format) {
    if (dim == format.bytes) return load_some(at, n, format);
    char some[LANES * sizeof(double)] __attribute__((aligned(64))) = {0};
    for (int i = 0; i < LANES && i < n; i++, at += dim) switch (format.bytes) {
        case 1: some[i] = *at; break;
        case 2: memcpy(some + 2 * i, at, 2); break;
        case 4: memcpy(some + 4 * i, at, 4); break;
        default: memcpy(some + 8 * i, at, 8);
        }
    return load_numbers(some, format);
}

INLINE void write_number(char *at, NumberFormat format, real x) {
    if (is_real(format)) {
        memcpy(at, &x, sizeof x);
    } else {
        uint16_t bits = format.kind == 'b' ? float_to_bfloat((float)x) : float_to_half((float)x);
        memcpy(at, &bits, sizeof bits);
    }
}

/* The inverse of load_numbers, rounded to nearest. */
INLINE void store_numbers(char *at, NumberFormat format, vec x) {
    if (is_real(format)) {
        store_unaligned((real *)at, x);
        return;
    }
#ifndef REAL_IS_DOUBLE
    if (format.kind == 'b') {
        store_bfloats(at, x);
        return;
    }
#ifdef HAS_HALF
    if (format.kind == 'f') {
        store_halves(at, x);
        return;
    }
#endif
#endif
    for (int i = 0; i < LANES; i++) write_number(at + i * format.bytes, format, x[i]);
}

/* widen for rows whose numbers are not contiguous, without scales. Where rows are side by side, as
 * those of a transposed operand, LANES of them are read at once. */
NOINLINE void widen_strided(const char *at, ptrdiff_t row, ptrdiff_t dim, NumberFormat format,
                            int rows, ptrdiff_t dims, real *to) {
    for (int j = 0, count; j < rows; j += count, at += count * row, to += count * dims) {
        count = row == format.bytes && rows - j >= LANES ? LANES : 1;
        for (ptrdiff_t d = 0; d < dims; d += LANES) {
            int n = fewer(dims - d, LANES);
            vec x[LANES];
            for (int i = 0; i < LANES && count > 1; i++)
                x[i] = i < n ? load_numbers(at + (d + i) * dim, format) : splat(0);
            if (count > 1) transpose(x);
            else x[0] = load_strided(at + d * dim, dim, n, format);
            for (int i = 0; i < count; i++)
                memcpy(to + i * dims + d, &x[i], sizeof(real) * (size_t)n);
        }
    }
}

/* Rows of numbers with any strides to contiguous rows of `real`, times the scales of each row,
 * which are `scales_row` floats apart, unless there are none. */
INLINE void widen(const char *at, ptrdiff_t row, ptrdiff_t dim, NumberFormat format,
                  const float *scales, ptrdiff_t scales_row, int rows, ptrdiff_t dims, real *to) {
    if (dim != format.bytes) { /* which a cache never has */
        widen_strided(at, row, dim, format, rows, dims, to);
        return;
    }
    for (int j = 0; j < rows; j++, at += row, to += dims, scales += scales ? scales_row : 0) {
        ptrdiff_t d = 0;
        for (; d + LANES <= dims; d += LANES) {
            vec x = load_numbers(at + dim_offset(format, d), format);
            store_unaligned(to + d, scales ? x * scale_of_dim(scales, format, d) : x);
        }
        if (d < dims) {
            vec x = load_some(at + dim_offset(format, d), dims - d, format) *
                    scale_of_dim(scales, format, d);
            memcpy(to + d, &x, sizeof(real) * (size_t)(dims - d));
        }
    }
}

/* Call `function` with a constant format as its last argument; otherwise the format would be tested
 * for each vector. */
#define WITH_FORMAT(format, function, ...)                                                         \
    do {                                                                                           \
        const NumberFormat AS_REAL = {'f', sizeof(real), 0}, AS_FLOAT = {'f', 4, 0},               \
                           AS_HALF = {'f', 2, 0}, AS_BFLOAT = {'b', 2, 0}, AS_BYTE = {'i', 1, 0};  \
        if (is_real(format)) function(__VA_ARGS__, AS_REAL);                                       \
        else if (sizeof(real) > 4 && (format).bytes == 4) function(__VA_ARGS__, AS_FLOAT);         \
        else if ((format).kind == 'b') function(__VA_ARGS__, AS_BFLOAT);                           \
        else if ((format).kind == 'i') function(__VA_ARGS__, AS_BYTE);                             \
        else function(__VA_ARGS__, AS_HALF);                                                       \
    } while (0)

/* The same for keys and values, which may be those of a cache. */
#define WITH_STORED_FORMAT(format, function, ...)                                                  \
    do {                                                                                           \
        const NumberFormat AS_FLOAT8 = {'8', 1, 0}, AS_INT4 = {'4', 1, 0};                         \
        if ((format).kind == '8') function(__VA_ARGS__, AS_FLOAT8);                                \
        else if ((format).kind == '4') function(__VA_ARGS__, AS_INT4);                             \
        else WITH_FORMAT(format, function, __VA_ARGS__);                                           \
    } while (0)

/* load_columns_as from dim `d` on, whatever the strides. */
NOINLINE void load_columns_strided(const char *const *rows, ptrdiff_t dim, ptrdiff_t d,
                                 ptrdiff_t dims, vec factor, real *columns, NumberFormat format) {
    for (; d < dims; d += LANES) {
        int n = fewer(dims - d, LANES);
        vec x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = load_strided(rows[i] + d * dim, dim, n, format);
        transpose(x);
        for (int i = 0; i < n; i++) store(columns + (d + i) * MR, x[i] * factor);
    }
}

INLINE void load_columns_as(const char *const *rows, ptrdiff_t dim, ptrdiff_t dims, vec factor,
                            real *columns, NumberFormat format) {
    ptrdiff_t d = 0;
    for (; dim == format.bytes && d + LANES <= dims; d += LANES) {
        vec x[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = load_numbers(rows[i] + d * dim, format);
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(columns + (d + i) * MR, x[i] * factor);
    }
    if (d < dims) load_columns_strided(rows, dim, d, dims, factor, columns, format);
}

/* columns[d][lane] = factor * (row `first + lane` of `n_rows`)[d]. */
static void load_columns(const char *const *at, ptrdiff_t dim, NumberFormat format, ptrdiff_t dims,
                         ptrdiff_t n_rows, double factor, ptrdiff_t first, real *columns) {
    const char *rows[LANES];
    for (int i = 0; i < LANES; i++) /* lanes without a row repeat the last one */
        rows[i] = at[first + i < n_rows ? first + i : n_rows - 1];
    WITH_FORMAT(format, load_columns_as, rows, dim, dims, splat((real)factor), columns);
}
#endif
