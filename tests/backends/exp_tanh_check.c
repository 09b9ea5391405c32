/* The exponentials, the tanh and the root of math-inl.h against the C library's in a wider type.
 *
 * exp_tanh_check STEP: float32 takes every STEP-th number there is (every one that is not positive
 * for exp), float64 some 2**30 / STEP of those that are neither tiny nor saturated, a 16th of them
 * where the wider type is software. The bounds are what the heads of the functions in math-inl.h
 * promise: keep them the same.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "math-inl.h"

#ifdef REAL_IS_DOUBLE
typedef long double wider;
#define WIDE(function) function##l
#define EPSILON DBL_EPSILON
#define LEAST_NORMAL DBL_MIN
#define EXP_BOUND 0.9
#define TANH_BOUND 3.9
#else
typedef double wider;
#define WIDE(function) function
#define EPSILON FLT_EPSILON
#define LEAST_NORMAL FLT_MIN
#define EXP_BOUND 1.6
#define TANH_BOUND 3.6
#endif
#define PAIR_BOUND 2.3


typedef struct {
    double most, at;
} Worst;

static Worst worse(Worst a, Worst b) { return !(b.most <= a.most) ? b : a; } /* a NaN is worst */

#pragma omp declare reduction(worst : Worst : omp_out = worse(omp_out, omp_in))

static real from_bits(lane_uint bits) {
    real x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static lane_uint to_bits(real x) {
    lane_uint bits;
    memcpy(&bits, &x, sizeof x);
    return bits;
}

/* In units of epsilon * (1 + |x|), relative. Results below the normal numbers may be 0. */
static double exp_error(real x, real got, wider exact) {
    const wider edge = (wider)LEAST_NORMAL * (1 + (wider)EPSILON * 1024);
    if (got == 0 && exact < edge) return 0;
    return (double)(WIDE(fabs)(got / (wider)WEIGHT_UNIT - exact) / exact / EPSILON / (1 - (wider)x));
}

static double tanh_error(real x, real got, wider exact) {
    (void)x;
    int exponent;
    WIDE(frexp)(exact, &exponent);
    wider ulp = WIDE(ldexp)(EPSILON, exponent - 1), least = WIDE(ldexp)(EPSILON, 2 - EXPONENT_BIAS - 1);
    return (double)(WIDE(fabs)(got - exact) / (ulp > least ? ulp : least));
}

typedef struct {
    vec (*function)(vec);
    wider (*exact)(wider);
    double (*error)(real, real, wider);
} Subject;

static vec call_exp(vec x) { return weight_of(x * (real)LOG2_E); }
static vec call_tanh(vec x) { return tanh_vec(x); }
/* exp(2 x) - 1, of which the low part holds the digits where x is small. */
static vec call_pair(vec x) {
    VecPair both = exp_of_twice(x);
    return (both.high - (real)1) + both.low;
}
static wider exact_pair(wider x) { return WIDE(expm1)(2 * x); }
static double relative_error(real x, real got, wider exact) {
    (void)x;
    return (double)(WIDE(fabs)((got - exact) / exact) / EPSILON);
}
static const Subject PAIR = {call_pair, exact_pair, relative_error};
static const Subject ROOT = {root_of, WIDE(sqrt), relative_error};
static const Subject EXP = {call_exp, WIDE(exp), exp_error};
static const Subject TANH = {call_tanh, WIDE(tanh), tanh_error};

/* Numbers `step` apart by their bits, each moved a little within its step. */
static Worst scan(const Subject *subject, real first, real last, int64_t step) {
    lane_uint begin = to_bits(first);
    int64_t steps = (int64_t)(to_bits(last) - begin) / step + 1;
    Worst all = {0, 0};
#pragma omp parallel for schedule(static) reduction(worst : all)
    for (int64_t i = 0; i < steps; i += LANES) {
        vec x;
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t offset = (uint64_t)(i + lane) * (uint64_t)step;
            offset += (uint64_t)(i + lane) * 0x9e3779b97f4a7c15 % (uint64_t)step;
            x[lane] = i + lane < steps ? from_bits(begin + (lane_uint)offset) : last;
            if (to_bits(x[lane]) > to_bits(last)) x[lane] = last;
        }
        vec got = subject->function(x);
        for (int lane = 0; lane < LANES; lane++) {
            double error = subject->error(x[lane], got[lane], subject->exact(x[lane]));
            all = worse(all, (Worst){error, x[lane]});
        }
    }
    return all;
}

static int special_values(void) {
    vec x = splat(NAN), one = splat(1);
    int wrong = 0;
    wrong |= weight_of(x * (real)LOG2_E)[0] == weight_of(x * (real)LOG2_E)[0] || tanh_vec(x)[0] == tanh_vec(x)[0];
    wrong |= weight_of(splat(0) * (real)LOG2_E)[0] != (real)WEIGHT_UNIT || weight_of(splat(-INFINITY) * (real)LOG2_E)[0] != 0;
    wrong |= tanh_vec(splat(INFINITY))[0] != one[0] || tanh_vec(splat(-INFINITY))[0] != -one[0];
    wrong |= tanh_vec(splat(0))[0] != 0 || !signbit(tanh_vec(splat((real)-0.0))[0]);
    wrong |= root_of(splat(0))[0] != 0 || root_of(splat(INFINITY))[0] != (real)INFINITY;
    wrong |= root_of(x)[0] == root_of(x)[0];
    if (wrong) puts("wrong at a NaN, an infinity or 0");
    return wrong;
}

int main(int n_arguments, char **arguments) {
    int64_t step = n_arguments > 1 ? atoll(arguments[1]) : 1;
    real infinity = INFINITY, least = 0, large_exp = infinity, large_tanh = infinity;
    real small = (real)0x1p-60, most = EXP2X_MOST, least_root = (real)LEAST_NORMAL, large_root = (real)REAL_MAX;
#ifdef REAL_IS_DOUBLE
    least = 0x1p-60, large_exp = 1024, large_tanh = 32;
    step *= (int64_t)1 << (LDBL_MANT_DIG > 64 ? 32 : 28); /* where quad precision is software */
#endif
    Worst near = scan(&EXP, -least, -1, step), far = scan(&EXP, -1, -large_exp, step);
    Worst tanh_up = scan(&TANH, least, large_tanh, step);
    Worst tanh_worst = worse(tanh_up, scan(&TANH, -least, -large_tanh, step));
    Worst pair = worse(scan(&PAIR, small, most, step), scan(&PAIR, -small, -most, step));
    Worst root = scan(&ROOT, least_root, large_root, step);
    printf("%d-byte reals: exp %.3f epsilon (1 + |x|) at %.9g, %.3f beyond -1 at %.9g; "
           "tanh %.3f ulp at %.9g; exp(2 x) %.3f epsilon at %.9g; root %.3f epsilon at %.9g\n",
           (int)sizeof(real), near.most, near.at, far.most, far.at, tanh_worst.most, tanh_worst.at,
           pair.most, pair.at, root.most, root.at);
    int good = worse(near, far).most <= EXP_BOUND && tanh_worst.most <= TANH_BOUND &&
               pair.most <= PAIR_BOUND && root.most <= 1;
    return special_values() || !good;
}
