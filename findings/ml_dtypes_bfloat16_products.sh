#!/usr/bin/env bash
# For each of NumPy's own dtypes, a @ b, np.dot(a, b) and np.einsum("ij,jk", a, b) are the same
# product in the same dtype. So one expects the same of the bfloat16 of ml_dtypes. With numpy
# 2.4.6 and ml_dtypes 0.6.0, @ and np.vecdot return float32, np.dot, np.inner and np.tensordot
# return bfloat16, and np.einsum raises TypeError ("invalid data type for einsum"), unless
# optimize=True sends it to a product that works, in float32. matmul is a ufunc without a loop for
# bfloat16, so NumPy takes the first to which the operands cast safely, float32; np.dot is a slot
# of the dtype (dotfunc, which ml_dtypes fills), and einsum has a table of built-in types
# (einsum_sumprod in numpy/_core/src/multiarray). It matters because q @ k.T and np.einsum are the
# two ways to write attention: the dtype of the scores, hence the precision of softmax and the
# dtype of the result, follows the spelling. Ask for the dtype by name.
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
products = {
    "a @ a": (lambda a: a @ a, "float32"),
    "np.vecdot": (lambda a: np.vecdot(a, a), "float32"),
    "np.dot": (lambda a: np.dot(a, a), "bfloat16"),
    "np.inner": (lambda a: np.inner(a, a), "bfloat16"),
    "np.tensordot": (lambda a: np.tensordot(a, a, 1), "bfloat16"),
    "np.einsum": (lambda a: np.einsum("ij,jk", a, a), "TypeError"),
    "np.einsum, optimize": (lambda a: np.einsum("ij,jk", a, a, optimize=True), "float32"),
}


def outcome(product, dtype):
    try:
        return str(product(np.ones((4, 4), dtype)).dtype)
    except TypeError:
        return "TypeError"


for name, (product, expected) in products.items():
    half, bfloat = outcome(product, np.float16), outcome(product, ml_dtypes.bfloat16)
    print(f"{name}: float16 -> {half}, bfloat16 -> {bfloat}")
    assert half == "float16", f"changed: {name} of float16 gives {half}"
    assert bfloat == expected, f"changed: {name} of bfloat16 gives {bfloat}"
EOF
