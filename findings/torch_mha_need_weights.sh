#!/usr/bin/env bash
# need_weights of torch.nn.MultiheadAttention says whether the attention weights come back beside
# the output, eval() switches dropout off, and no_grad() stops recording. So one expects none of
# them to change the output of a module without dropout. For a row whose mask hides every key they
# do, in torch 2.13.0 on CPU: with need_weights=True (the default) the row is NaN, from a plain
# softmax; with False it goes through scaled_dot_product_attention, which gives 0 (so the output
# is the bias of the projection); and with False, in eval() and under no_grad(), the fused
# inference path takes over and it is NaN again (torch/nn/functional.py,
# multi_head_attention_forward, "if need_weights"; torch/nn/modules/activation.py,
# why_not_fast_path). It matters because this module is a usual oracle for attention on arrays: a
# test with padding can pass in training and see NaN in inference, or agree or not by which of its
# own answers it asked for.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0'
"$work/venv/bin/python" -I - <<'EOF'
import contextlib

import torch

print("torch", torch.__version__)
torch.manual_seed(0)
attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
x = torch.randn(1, 4, 8)
hidden = torch.zeros(4, 4, dtype=torch.bool)
hidden[1] = True

seen = {}
for training in (True, False):
    attention.train(training)
    for recording in (True, False):
        for need_weights in (True, False):
            with contextlib.nullcontext() if recording else torch.no_grad():
                row = attention(x, x, x, attn_mask=hidden, need_weights=need_weights)[0][0, 1]
            answer = "NaN" if row.isnan().all() else "0" if (row == 0).all() else str(row)
            seen[training, recording, need_weights] = answer
            print(
                "train," if training else "eval,",
                "grad," if recording else "no_grad,",
                f"need_weights={need_weights}: {answer}",
            )
for (training, recording, need_weights), answer in seen.items():
    zero = not need_weights and (training or recording)
    assert answer == ("0" if zero else "NaN"), "changed: the row that sees nothing"
EOF
