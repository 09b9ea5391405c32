#!/usr/bin/env bash
# NumPy sums float16 pairwise and takes its mean in float32, so one expects the same care for the
# bfloat16 of ml_dtypes. Its sum has none: numpy 2.4.6 with ml_dtypes 0.6.0 adds one by one and
# rounds every partial sum to 8 bits, so a sum of ones stops at 256 for good, since 257 rounds
# back to 256, and np.mean of 4096 ones is 0.0625. (The README of ml_dtypes shows a sum under
# "Quirks of low-precision Arithmetic"; np.mean widens float16 alone, _mean in
# numpy/_core/_methods.py.) It matters to attention because the denominator of softmax is just
# such a sum of positive numbers: softmax written out in bfloat16 on 4096 keys gives weights that
# add up to far more than 1, with no warning. Give sum(dtype=np.float32), or widen first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'ml_dtypes==0.6.0'
"$work/venv/bin/python" -I - <<'EOF'
import ml_dtypes
import numpy as np

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__)
ones = np.ones(4096, ml_dtypes.bfloat16)
half = np.ones(4096, np.float16)
print("sum of 4096 ones: bfloat16", ones.sum(), "float16", half.sum())
print("mean: bfloat16", ones.mean(), "float16", half.mean())
print("sum with dtype=float32:", ones.sum(dtype=np.float32))

scores = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16)
weights = np.exp(scores - scores.max())
weights = weights / weights.sum()
total = weights.sum(dtype=np.float32)
print("softmax in bfloat16: the weights add up to", total)
assert float(ones.sum()) == 256 and float(ones.mean()) == 0.0625, "changed: the sum goes on"
assert float(half.sum()) == 4096 and float(half.mean()) == 1, "changed: float16 sums otherwise"
assert ones.sum(dtype=np.float32) == 4096, "changed: the sum in float32"
assert total > 1.5, "changed: the weights add up"
EOF
