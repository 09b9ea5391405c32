/* One instruction set's tile kernels against a double loop, without Python: for sanitizers, which is
 * why each row has memory of its own, and for cross compilers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AMX_TILE__) && !defined(EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "tile.h"

extern const TileKernels kernels;

#ifdef REAL_IS_DOUBLE
typedef double real;
#define TOLERANCE 8e-15 /* 4 ulp of an lse of 10 */
#else
typedef float real;
#define TOLERANCE 4e-6 /* 4 ulp of an lse of 10 */
#endif

#ifdef BF16_TERMS
#define BITS (BF16_TERMS == 1 ? 8 : BF16_TERMS == 2 ? 11 : 24) /* of the operands: bfloat16, float16, float32 */
/* Of results and gradients, which sum over weights that have 8 bits for each term. */
#define WEIGHT_TOLERANCE (BF16_TERMS == 3 ? TOLERANCE : pow(2, 1 - 8 * BF16_TERMS))
#else
#define BITS 53
#define WEIGHT_TOLERANCE TOLERANCE
#endif

enum { N_KEYS = 700, HEAD_DIM = 40, VALUE_DIM = 19, HIDDEN_KEY = 100 };
enum { MASK = 1, BIAS = 2, ALIBI = 4, SOFTCAP = 8, SINKS = 16, ALL_OPTIONS = 32 };

static const NumberFormat FORMATS[] = {
    {'f', sizeof(real), 0}, {'f', 2, 0}, {'f', 8, 1}, {'i', 1, 0}, {'u', 2, 1}, {'b', 2, 0}, {'f', 4, 0},
};
enum { N_FORMATS = sizeof FORMATS / sizeof FORMATS[0] };

static real *rows_of(int n) { /* n numbers between -1 and 1 */
    real *x = malloc(sizeof(real) * (size_t)n);
    for (int i = 0; i < n; i++) {
        int exponent;
        double y = frexp(2.0 * rand() / RAND_MAX - 1, &exponent);
        x[i] = (real)ldexp(rint(ldexp(y, BITS)), exponent - BITS);
    }
    return x;
}

/* As the kernels read them: a copy in bfloat16 where that loses nothing. */
static char *stored(const real *x, int n, NumberFormat *format) {
    char *copy = malloc(sizeof(real) * (size_t)n);
    memcpy(copy, x, sizeof(real) * (size_t)n);
    if (BITS == 8) {
        *format = (NumberFormat){'b', 2, 0};
        for (int i = 0; i < n; i++) memcpy(copy + 2 * i, (const char *)&x[i] + 2, 2);
    }
    return copy;
}

static real *keys, *values;
static double bias[MAX_BLOCK_Q][N_KEYS]; /* as it will be read: -2 to 2, or -INFINITY */

static void write_number(double x, NumberFormat format, char *at) {
    static const unsigned short half[] = {0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0xfc00};
    float single = (float)x;
    signed char byte = (signed char)(isinf(x) ? 0 : x);
    unsigned short two = (unsigned short)byte;
    char bytes[8];
    if (format.kind == 'i') memcpy(bytes, &byte, 1);
    else if (format.kind == 'u') memcpy(bytes, &two, 2);
    else if (format.kind == 'b') memcpy(bytes, (char *)&single + 2, 2); /* little-endian */
    else if (format.bytes == 2) memcpy(bytes, &half[isinf(x) ? 5 : (int)x + 2], 2);
    else if (format.bytes == 4) memcpy(bytes, &single, 4);
    else memcpy(bytes, &x, 8);
    for (int i = 0; i < format.bytes; i++) at[i] = bytes[format.swapped ? format.bytes - 1 - i : i];
}

static char *bias_row(int query, NumberFormat format) {
    char *row = malloc((size_t)(N_KEYS * format.bytes));
    for (int j = 0; j < N_KEYS; j++) {
        double x = rand() % 6 - 2;
        if (x == 3) x = strchr("iu", format.kind) ? 0 : -INFINITY;
        bias[query][j] = format.kind == 'u' ? fabs(x) : x;
        write_number(bias[query][j], format, row + j * format.bytes);
    }
    return row;
}

static char *mask_row(int stride) {
    char *row = malloc((size_t)((N_KEYS - 1) * stride + 1));
    for (int j = 0; j < (N_KEYS - 1) * stride + 1; j++) row[j] = rand() % 4 != 0;
    row[HIDDEN_KEY * stride] = 0; /* of a mask of stride 0: every key */
    return row;
}

static double worse(double a, double b) { return !(b <= a) ? b : a; } /* a NaN is worst */

/* Before the options; `slope` is that of the softcap. */
static double score_of(const Tile *t, int i, ptrdiff_t j, double *slope) {
    const real *q = (const real *)t->q[i];
    double s = 0;
    for (int d = 0; d < HEAD_DIM; d++) {
        double x = q[d], y = keys[j * HEAD_DIM + d];
        if (t->score_function == DOT) s += x * y;
        if (t->score_function == DISTANCE) s += (x - y) * (x - y);
        if (t->score_function == ADDITIVE) s += t->dim_weights[d] * tanh(x + y);
    }
    s = t->scale * (t->score_function == DISTANCE ? sqrt(s) : s);
    *slope = t->softcap > 0 ? 1 - pow(tanh(s / t->softcap), 2) : 1;
    if (t->softcap > 0) s = t->softcap * tanh(s / t->softcap);
    if (t->has_bias) s += bias[i][j];
    if (t->has_alibi) s -= t->slope[i] * fabs((double)(t->position[i] - j));
    if (j < t->start[i] || j >= t->stop[i] || (t->has_mask && !t->mask[i][j * t->mask_key]))
        s = -INFINITY;
    return s;
}

/* The largest error of one query's result, lse and weights. */
static double error_of(const Tile *t, int i) {
    static double weight[N_KEYS];
    double total = t->has_sinks ? exp(t->sink[i]) : 0, worst = 0, slope;
    const real *out = (const real *)t->out[i], *weights = (const real *)t->weights[i];
    for (ptrdiff_t j = 0; j < N_KEYS; j++) total += weight[j] = exp(score_of(t, i, j, &slope));
    for (int d = 0; d < VALUE_DIM; d++) {
        double sum = 0;
        for (ptrdiff_t j = 0; j < N_KEYS; j++)
            if (weight[j] > 0) sum += weight[j] * (double)values[j * VALUE_DIM + d];
        double error = fabs((total > 0 ? sum / total : 0) - (double)out[d]);
        worst = worse(worst, error * (TOLERANCE / WEIGHT_TOLERANCE));
    }
    for (ptrdiff_t j = 0; j < N_KEYS; j++)
        worst = worse(worst, fabs((total > 0 ? weight[j] / total : 0) - (double)weights[j]));
    return t->lse[i] == log(total) ? worst : worse(worst, fabs(t->lse[i] - log(total)));
}

static void each_block(Tile *t, void (*step)(Tile *, ptrdiff_t, ptrdiff_t)) {
    const ptrdiff_t keys = kernels.block_k, first = t->first / SUB_BLOCK_K * SUB_BLOCK_K;
    for (ptrdiff_t key = t->first / keys * keys; key < t->last; key += keys)
        step(t, key > first ? key : first, key + keys < t->last ? key + keys : t->last);
}

static double run(Tile *t) {
    size_t bytes = kernels.scratch_bytes(t, t->n_queries);
    double worst = 0;
    t->scratch = aligned_alloc(64, (bytes + 63) / 64 * 64);
    kernels.begin(t);
    each_block(t, kernels.attend);
    if (!kernels.finish(t)) worst = INFINITY;
    each_block(t, kernels.weights);
    for (int i = 0; i < t->n_queries; i++) worst = worse(worst, error_of(t, i));
    free(t->scratch);
    return worst;
}

static double farthest(const double *wanted, const real *found, int n) {
    double worst = 0;
    for (int i = 0; i < n; i++) worst = worse(worst, fabs(wanted[i] - (double)found[i]));
    return worst * (TOLERANCE / WEIGHT_TOLERANCE);
}

/* The largest error of the means and, of rows normalized anew, of lse and lse_rest together. */
static double prepare(Tile *t) {
    double worst = 0, lse[MAX_BLOCK_Q];
    memcpy(lse, t->lse, sizeof(double) * (size_t)t->n_queries);
    kernels.backward->prepare(t);
    t->value_dim = 0;
    kernels.begin(t);
    each_block(t, kernels.attend);
    kernels.backward->normalize(t);
    t->value_dim = VALUE_DIM;
    for (int i = 0; i < t->n_queries; i++) {
        const real *g = (const real *)t->grad_out[i], *out = (const real *)t->result[i];
        double mean = 0;
        for (int d = 0; d < VALUE_DIM; d++) mean += (double)g[d] * out[d];
        worst = worse(worst, fabs(mean - t->mean[i]));
        if (t->lse[i] != lse[i]) worst = worse(worst, fabs(t->lse[i] - lse[i] + t->lse_rest[i]));
    }
    return worst;
}

/* The largest error of the gradients of queries, keys and values, after `run`, with a gradient of the result
 * that arrives and a delta of nothing in particular. */
static double run_gradients(Tile *t) {
    static double grad_q[MAX_BLOCK_Q][HEAD_DIM], grad_k[N_KEYS][HEAD_DIM], grad_v[N_KEYS][VALUE_DIM];
    real *found_k = rows_of(N_KEYS * HEAD_DIM), *found_v = rows_of(N_KEYS * VALUE_DIM);
    char *out[MAX_BLOCK_Q];
    double worst = 0;
    memset(grad_q, 0, sizeof grad_q), memset(grad_k, 0, sizeof grad_k), memset(grad_v, 0, sizeof grad_v);
    for (int i = 0; i < t->n_queries; i++) {
        const real *q = (const real *)t->q[i], *g = rows_of(VALUE_DIM);
        t->grad_out[i] = (const char *)g, t->result[i] = t->out[i];
        t->delta[i] = i % 3 - 1;
        out[i] = t->out[i];
        t->out[i] = calloc(HEAD_DIM, sizeof(real));
        for (ptrdiff_t j = 0; j < N_KEYS; j++) {
            double slope, weight = exp(score_of(t, i, j, &slope) - t->lse[i]), grad = -t->delta[i];
            if (!(weight > 0)) continue;
            for (int d = 0; d < VALUE_DIM; d++) {
                grad += (double)g[d] * values[j * VALUE_DIM + d];
                grad_v[j][d] += weight * g[d];
            }
            for (int d = 0; d < HEAD_DIM; d++) {
                grad_q[i][d] += t->scale * weight * grad * slope * keys[j * HEAD_DIM + d];
                grad_k[j][d] += t->scale * weight * grad * slope * q[d];
            }
        }
    }
    t->differentiating = 1;
    t->grad_out_format = t->out_format;
    t->grad_out_dim = t->result_dim = sizeof(real);
    t->grad_k = (char *)found_k, t->grad_v = (char *)found_v;
    t->scratch = aligned_alloc(64, (kernels.backward->scratch_bytes(t) + 63) / 64 * 64);
    worst = worse(worst, prepare(t));
    for (ptrdiff_t begin = 0; begin < N_KEYS; begin += kernels.block_k) {
        ptrdiff_t end = begin + kernels.block_k < N_KEYS ? begin + kernels.block_k : N_KEYS;
        kernels.backward->begin_keys(t, begin, end);
        kernels.begin(t);
        if (kernels.backward->differentiate(t, begin, end)) kernels.backward->add(t);
        kernels.backward->store_keys(t, begin, end);
    }
    free(t->scratch);
    for (int i = 0; i < t->n_queries; i++) {
        worst = worse(worst, farthest(grad_q[i], (real *)t->out[i], HEAD_DIM));
        free((void *)t->grad_out[i]), free(t->out[i]);
        t->out[i] = out[i];
    }
    worst = worse(worst, farthest(grad_k[0], found_k, N_KEYS * HEAD_DIM));
    worst = worse(worst, farthest(grad_v[0], found_v, N_KEYS * VALUE_DIM));
    free(found_k), free(found_v);
    return worst;
}

static double check(ScoreFunction score_function, int n_queries, int causal, int options, NumberFormat format) {
    static Tile t;
    static double weights[HEAD_DIM];
    for (int d = 0; d < HEAD_DIM; d++) weights[d] = d % 3 - 1;
    keys = rows_of(N_KEYS * HEAD_DIM), values = rows_of(N_KEYS * VALUE_DIM);
    memset(&t, 0, sizeof t);
    ptrdiff_t n_rows = (n_queries + kernels.mr - 1) / kernels.mr * kernels.mr;
    size_t row_bytes = lay_out_rows(&t, n_rows, NULL);
    char *rows = aligned_alloc(64, row_bytes);
    memset(rows, 0, row_bytes);
    lay_out_rows(&t, n_rows, rows);
    t.q_format = t.k_format = t.v_format = t.out_format = t.grad_out_format = t.grad_k_format =
        t.grad_v_format = (NumberFormat){'f', sizeof(real), 0};
    t.block_k = kernels.block_k < N_KEYS ? kernels.block_k : N_KEYS;
    t.n_queries = n_queries;
    t.q_dim = t.out_dim = t.weights_key = sizeof(real);
    t.head_dim = HEAD_DIM;
    t.value_dim = VALUE_DIM;
    t.grad_k_key = HEAD_DIM * sizeof(real), t.grad_v_key = VALUE_DIM * sizeof(real);
    t.scale = 1 / sqrt(HEAD_DIM);
    t.score_function = score_function, t.dim_weights = weights;
    if (score_function == ADDITIVE && n_queries % 3 == 0) keys[HIDDEN_KEY * HEAD_DIM + 5] = 1000;
    t.want_lse = 1;
    t.keep_factor = 1;
    t.has_mask = options & MASK, t.has_bias = options & BIAS, t.has_alibi = options & ALIBI;
    t.softcap = options & SOFTCAP ? 0.5 : 0;
    t.has_sinks = options & SINKS;
    t.mask_key = n_queries % 4 ? n_queries % 3 : 1;
    t.bias_format = format;
    t.bias_key = format.bytes;
    if (options & MASK) values[HIDDEN_KEY * VALUE_DIM + 3] = NAN;
    t.k = stored(keys, N_KEYS * HEAD_DIM, &t.k_format);
    t.v = stored(values, N_KEYS * VALUE_DIM, &t.v_format);
    t.k_dim = t.k_format.bytes, t.k_key = HEAD_DIM * t.k_dim;
    t.v_dim = t.v_format.bytes, t.v_key = VALUE_DIM * t.v_dim;
    for (int i = 0; i < n_queries; i++) {
        /* Some see nothing, or little, and in odd numbers all of them less. */
        t.start[i] = !causal ? 0 : i % 7 == 3 ? 600 : n_queries % 2 * 573;
        t.stop[i] = causal ? 590 + i % 100 : N_KEYS;
        t.position[i] = 590 + i % 100;
        t.slope[i] = 0.01 * i / n_queries;
        t.sink[i] = i % 5 ? i % 11 : -INFINITY;
        t.q[i] = (char *)rows_of(HEAD_DIM);
        t.out[i] = (char *)rows_of(VALUE_DIM);
        t.weights[i] = calloc(N_KEYS, sizeof(real));
        if (options & MASK) t.mask[i] = mask_row((int)t.mask_key);
        if (options & BIAS) t.bias[i] = bias_row(i, format);
    }
    double worst = run(&t);
    if (kernels.backward && score_function == DOT && n_queries % 3 == 1) worst = worse(worst, run_gradients(&t));
    for (int i = 0; i < n_queries; i++) {
        free((void *)t.q[i]), free(t.out[i]), free(t.weights[i]);
        free((void *)t.mask[i]), free((void *)t.bias[i]);
    }
    free(keys), free(values), free(rows), free((void *)t.k), free((void *)t.v);
    return worst;
}

/* With a number as argument, every so many-th number of queries: for emulators, which take long. */
int main(int count, char **arguments) {
    int step = count > 1 ? atoi(arguments[1]) : 1;
    double worst = 0;
#if defined(__AMX_TILE__) && !defined(EMULATED)
    if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return puts("tiles are not to be had here"), 0;
#endif
    for (int n = 1; n <= kernels.block_q; n += (1 + n / 64) * step)
        for (int causal = 0; causal < 2; causal++) {
            int options = (5 * n + 16 * causal) % ALL_OPTIONS;
            worst = worse(worst, check(DOT, n, causal, options, FORMATS[n % N_FORMATS]));
#ifndef BF16_TERMS
            ScoreFunction other = n % 2 ? ADDITIVE : DISTANCE;
            worst = worse(worst, check(other, n, causal, options, FORMATS[n % N_FORMATS]));
#endif
        }
    printf("%d-byte reals, %d queries a tile: largest error %.2e\n", (int)sizeof(real),
           kernels.block_q, worst);
    return worst <= TOLERANCE ? 0 : 1;
}
