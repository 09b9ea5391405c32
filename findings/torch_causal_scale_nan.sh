#!/usr/bin/env bash
# The scale of attention may be any number: softmax(scale * q @ k.T) is finite for a negative
# scale and for zero (the mean of the visible values), and torch's documentation of
# scaled_dot_product_attention bounds it nowhere. So one expects is_causal=True to agree with the
# same triangle as a mask. In torch 2.13.0 on CPU, the flash kernel gives NaN in every row that
# hides a key, for scale <= 0: it writes -inf above the diagonal first and multiplies by the scale
# after that (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, "Apply causal mask", then
# _mul_reduce_max_fusion_kernel), so a hidden score becomes +inf or 0 * -inf. An explicit mask is
# added after the scale and is right, and so is the math backend. It matters because a learned or
# signed temperature is an ordinary argument, because the default backend on CPU is the flash
# kernel, and because it shows the order that is safe: scale first, then mask.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0'
"$work/venv/bin/python" -I - <<'EOF'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

print("torch", torch.__version__)
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 8, 16).unbind()
triangle = torch.ones(8, 8, dtype=torch.bool).tril()

for scale in (1.0, 0.0, -1.0):
    formula = (scale * q @ k.mT).masked_fill(~triangle, -torch.inf).softmax(-1) @ v
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            causal = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            masked = scaled_dot_product_attention(q, k, v, attn_mask=triangle, scale=scale)
        rows = int(causal.isnan().any(-1).sum())
        print(f"scale {scale:4}, {backend.name}: {rows} of 8 rows are NaN with is_causal")
        broken = backend == SDPBackend.FLASH_ATTENTION and scale <= 0
        assert rows == (7 if broken else 0), "changed: the rows of NaN"
        assert torch.allclose(masked, formula, atol=1e-5), "changed: the explicit mask is wrong"
        assert broken or torch.allclose(causal, formula, atol=1e-5), "changed: is_causal is wrong"
EOF
