#!/usr/bin/env bash
# A row of a mask that hides every key leaves softmax nothing to share out: 0 / 0. One expects the
# libraries to agree on some answer, or at least each with its own softmax. They give three. torch
# 2.13.0: softmax of a row of -inf is NaN, but scaled_dot_product_attention gives a row of 0, for
# a bool mask and for -inf in a float mask, in the flash kernel and the math backend alike (the
# kernel resets a sum of 0 to 1 in FlashAttentionKernel.cpp; the math path uses _safe_softmax).
# jax 0.10.2: softmax is NaN too, but dot_product_attention writes -0.7 times the largest float
# instead of -inf (_get_large_negative in jax/_src/nn/functions.py), so all keys tie and the row
# is the mean of all values, hidden ones included. It matters because such rows are ordinary (a
# padded query, a causal triangle with more queries than keys): a comparison between libraries
# needs a rule for them, and the mean leaks values that the mask hides.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0' 'jax==0.10.2'
"$work/venv/bin/python" -I - <<'EOF'
import jax
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print("numpy", np.__version__, "torch", torch.__version__, "jax", jax.__version__)
q, k, v = np.random.default_rng(0).standard_normal((3, 4, 8), np.float32)
visible = np.tri(4, dtype=bool)
visible[1] = False

empty = np.full(4, -np.inf, np.float32)
softmaxes = torch.tensor(empty).softmax(0).numpy(), np.asarray(jax.nn.softmax(empty))
print("softmax of -inf, torch:", softmaxes[0], "jax:", softmaxes[1])
assert np.isnan(softmaxes).all(), "changed: softmax of an empty row is a number"

tq, tk, tv, bools = (torch.tensor(x)[None, None] for x in (q, k, v, visible))
floats = torch.zeros(4, 4).masked_fill(~bools, -torch.inf)
for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    for mask in (bools, floats):
        with sdpa_kernel(backend):
            row = scaled_dot_product_attention(tq, tk, tv, attn_mask=mask)[0, 0, 1]
        print(f"torch, {backend.name}, {mask.dtype}:", row[:3].tolist())
        assert (row == 0).all(), "changed: torch gives no 0"

jq, jk, jv = (x[None, :, None] for x in (q, k, v))
row = np.asarray(jax.nn.dot_product_attention(jq, jk, jv, mask=visible[None, None]))[0, 1, 0]
print("jax:", row[:3], "mean of all values:", v.mean(0)[:3])
assert np.allclose(row, v.mean(0), atol=1e-6), "changed: jax gives no mean"
EOF
