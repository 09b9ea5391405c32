#!/usr/bin/env bash
# torch and JAX promote float16 with bfloat16 to float32, the smallest type that holds both, and
# JAX's bfloat16 is the very dtype that ml_dtypes gives NumPy. So one expects NumPy to promote
# them alike. numpy 2.4.6 with ml_dtypes 0.6.0 raises DTypePromotionError: a user dtype registers
# the casts that lose nothing (PyArray_RegisterCanCast in ml_dtypes/_src, bfloat16 to float32
# among them), and NumPy looks for no third type that both reach. The same holds beside int32 or
# int64, where torch gives bfloat16; int8 works. It matters to attention because a cache of keys
# in float16 beside queries in bfloat16 is ordinary input: np.result_type(q, k, v), the usual way
# to choose the type of the computation, raises an error which speaks of object arrays, and only
# for this pair. Widen 16-bit types to float32 before promoting.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'ml_dtypes==0.6.0' 'torch==2.13.0' 'jax==0.10.2'
"$work/venv/bin/python" -I - <<'EOF'
import jax
import ml_dtypes
import numpy as np
import torch

print("numpy", np.__version__, "ml_dtypes", ml_dtypes.__version__, end=" ")
print("torch", torch.__version__, "jax", jax.__version__)


def promoted(other):
    try:
        return str(np.result_type(ml_dtypes.bfloat16, other))
    except np.exceptions.DTypePromotionError:
        return "DTypePromotionError"


error = "DTypePromotionError"
expected = {"float32": "float32", "float16": error, "int8": "bfloat16", "int32": error}
for other, result in expected.items():
    in_numpy = promoted(other)
    in_torch = torch.promote_types(torch.bfloat16, getattr(torch, other))
    in_jax = jax.numpy.promote_types(ml_dtypes.bfloat16, other)
    print(f"bfloat16 with {other}: numpy {in_numpy}, torch {in_torch}, jax {in_jax}")
    assert in_numpy == result, f"changed: bfloat16 with {other} gives {in_numpy}"
    if other == "float16":
        assert in_torch == torch.float32 and in_jax == np.float32, "changed: torch or jax"
EOF
