#!/usr/bin/env bash
# A nested tensor of jagged layout is torch's own way to attend over sequences of different lengths
# without padding, and scaled_dot_product_attention takes one. On a CPU one expects the kernel that
# dense tensors get there, _scaled_dot_product_flash_attention_for_cpu, once a sequence. In torch
# 2.13.0 it is _scaled_dot_product_attention_math instead (torch/nested/_internal/sdpa.py,
# _select_sdp_backend, whose flash and memory-efficient kernels are those of CUDA), which makes the
# array of queries x keys, and takes many times as long as one dense call a sequence; nothing says
# so. It matters to whoever packs sequences of different lengths on a CPU, and to whoever compares
# with torch: its best there is one dense call a sequence.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0'
"$work/venv/bin/python" -I - <<'EOF'
import time

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

print("torch", torch.__version__)
torch.manual_seed(0)
torch.set_grad_enabled(False)
LENGTHS = 150, 300, 512, 64, 400
sequences = [[torch.randn(n, 8, 64) for n in LENGTHS] for _ in "qkv"]
jagged = [torch.nested.nested_tensor(x, layout=torch.jagged).transpose(1, 2) for x in sequences]
dense = [[x[None].transpose(1, 2) for x in xs] for xs in zip(*sequences)]


def packed():
    return scaled_dot_product_attention(*jagged).transpose(1, 2).unbind()


def one_by_one():
    return [scaled_dot_product_attention(*xs)[0].transpose(0, 1) for xs in dense]


def kernel(call):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return {e.key for e in found.key_averages() if e.key.startswith("aten::_scaled_dot")}


for name, call in (("jagged", packed), ("dense, one by one", one_by_one)):
    call()
    began = time.perf_counter()
    call()
    print(f"{name}: {', '.join(kernel(call))}, {1e3 * (time.perf_counter() - began):.0f} ms")
assert kernel(packed) == {"aten::_scaled_dot_product_attention_math"}, "changed: the jagged kernel"
assert kernel(one_by_one) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}, \
    "changed: the dense kernel"
for a, b in zip(packed(), one_by_one()):
    assert torch.allclose(a, b, atol=1e-5), "changed: the results differ"
EOF
