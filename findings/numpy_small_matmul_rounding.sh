#!/usr/bin/env bash
# q @ k.T is one operation, so one expects the rounding error of its elements to depend on the numbers
# and on head_dim, not on how many queries and keys there are. NumPy 2.4.6's wheel (OpenBLAS 0.3.31)
# on x86-64 with AVX-512: 16 queries on 60 keys have a third of the error of 100 queries on 300, per
# element, at head_dim 256, where rms errors are 12 and 39 eps of float32 for normal numbers.
# OpenBLAS has kernels for small matrices on these processors (its pull request 3335; of this form up
# to 1200 results and from 32 dims on) that sum dims in the lanes of a vector, so in 16 partial sums,
# where the ordinary kernel has one. It matters to whoever holds attention to "as exact as plain
# NumPy": small problems have a stricter rival than large ones, and with large scores, whose errors
# softmax multiplies, a kernel with one running sum over head_dim fails there and nowhere else.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check 'numpy==2.4.6'
"$work/venv/bin/python" -I - <<'EOF'
import sys

import numpy as np
from numpy._core._multiarray_umath import __cpu_features__ as features

print("numpy", np.__version__)
if not features.get("AVX512F"):
    sys.exit("this is about processors with AVX-512")
rng = np.random.default_rng(0)


def rms_error(queries, keys, dims):
    """Of the dot products of normal numbers, in units of float32's eps."""
    q, k = (rng.standard_normal((40, n, dims)).astype("f4") for n in (queries, keys))
    exact = q.astype("f8") @ k.astype("f8").swapaxes(1, 2)
    return float(np.sqrt(np.mean((q @ k.swapaxes(1, 2) - exact) ** 2)) / np.finfo("f4").eps)


for dims in (64, 256):
    small, large = rms_error(16, 60, dims), rms_error(100, 300, dims)
    print(f"head_dim {dims}: 16 x 60 {small:.1f} eps, 100 x 300 {large:.1f} eps")
    assert 1.7 * small < large, "changed: the errors of small products"
EOF
