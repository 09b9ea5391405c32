/* One instruction set's tile kernels against a double loop, without Python: for cross compilers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tile.h"

extern const TileKernels kernels;

#ifdef REAL_IS_DOUBLE
typedef double real;
#define TOLERANCE 4e-15
#else
typedef float real;
#define TOLERANCE 2e-6 /* 4 ulp of an lse of 6.5 */
#endif

enum { N_KEYS = 700, HEAD_DIM = 40, VALUE_DIM = 19 };

static real q[MAX_QUERIES][HEAD_DIM], k[N_KEYS][HEAD_DIM], v[N_KEYS][VALUE_DIM];
static real out[MAX_QUERIES][VALUE_DIM];

static void fill(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (real)(2.0 * rand() / RAND_MAX - 1);
}

/* The largest error of one query's result and lse. */
static double error_of(const Tile *t, int i) {
    double weight[N_KEYS], total = 0, worst = 0;
    for (ptrdiff_t j = t->start[i]; j < t->stop[i]; j++) {
        double s = 0;
        for (int d = 0; d < HEAD_DIM; d++) s += (double)q[i][d] * (double)k[j][d];
        total += weight[j] = exp(s * t->scale);
    }
    for (int d = 0; d < VALUE_DIM; d++) {
        double sum = 0;
        for (ptrdiff_t j = t->start[i]; j < t->stop[i]; j++) sum += weight[j] * (double)v[j][d];
        worst = fmax(worst, fabs((total > 0 ? sum / total : 0) - (double)out[i][d]));
    }
    if (t->lse[i] != log(total)) worst = fmax(worst, fabs(t->lse[i] - log(total)));
    return worst;
}

static double run(Tile *t, int n_queries) {
    double worst = 0;
    t->n_queries = n_queries;
    t->margin = 0;
    kernels.begin(t);
    for (ptrdiff_t key = t->first / BLOCK_KEYS * BLOCK_KEYS; key < t->last; key += BLOCK_KEYS)
        kernels.attend(t, key > t->first ? key : t->first,
                       key + BLOCK_KEYS < t->last ? key + BLOCK_KEYS : t->last);
    if (!kernels.finish(t)) return INFINITY;
    for (int i = 0; i < n_queries; i++) worst = fmax(worst, error_of(t, i));
    return worst;
}

int main(void) {
    static Tile t;
    double worst = 0;
    fill(&q[0][0], sizeof q / sizeof(real));
    fill(&k[0][0], sizeof k / sizeof(real));
    fill(&v[0][0], sizeof v / sizeof(real));
    t.k = k, t.v = v;
    t.q_dim = t.k_dim = t.v_dim = t.out_dim = 1;
    t.k_key = t.head_dim = HEAD_DIM;
    t.v_key = t.value_dim = VALUE_DIM;
    t.scale = 1 / sqrt(HEAD_DIM);
    t.want_lse = 1;
    t.scratch = aligned_alloc(64, (kernels.scratch_bytes(kernels.queries, HEAD_DIM, VALUE_DIM, N_KEYS) + 63) / 64 * 64);
    for (int i = 0; i < kernels.queries; i++) t.q[i] = q[i], t.out[i] = out[i];
    for (int n = 1; n <= kernels.queries; n++)
        for (int causal = 0; causal < 2; causal++) {
            for (int i = 0; i < n; i++) {
                t.start[i] = causal && i % 7 == 3 ? 600 : 0; /* some see nothing, or little */
                t.stop[i] = causal ? 590 + i : N_KEYS;
            }
            worst = fmax(worst, run(&t, n));
        }
    printf("%d-byte reals, %d queries a tile: largest error %.2e\n", (int)sizeof(real),
           kernels.queries, worst);
    return worst <= TOLERANCE ? 0 : 1;
}
