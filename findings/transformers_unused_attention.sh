#!/usr/bin/env bash
# A registered attention function is chosen by attn_implementation="name", and an unknown name is
# an error. So one expects a known name to mean that the function is called, or an error where the
# model has no place for it. In transformers 5.24.0 models that never adopted the attention
# interface, Bloom among them, accept the name, report it as their implementation, and go on
# computing their own attention: get_correct_attn_implementation in modeling_utils.py checks the
# name and, for flash, flex and sdpa only, what the model supports. Construction says nothing; a
# later set_attn_implementation logs a warning and still stores the name. It matters because the
# outputs are right, so a test of a new kernel on such a model passes without having run it: count
# the calls, do not read config._attn_implementation.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0' 'transformers==5.24.0'
"$work/venv/bin/python" -I - <<'EOF'
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, BloomConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

print("torch", torch.__version__, "transformers", transformers.__version__)
calls = 0


def counting(*args, **kwargs):
    global calls
    calls += 1
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register("counting", counting)
sizes = {"vocab_size": 16, "hidden_size": 16}
llama = LlamaConfig(
    **sizes, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)
bloom = BloomConfig(**sizes, n_layer=2, n_head=2)
for config, expected in ((llama, 2), (bloom, 0)):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="counting").eval()
    calls = 0
    model(torch.arange(5)[None])
    name = model.config._attn_implementation
    print(f"{type(model).__name__}: implementation {name!r}, {calls} calls in 2 layers")
    assert name == "counting", "changed: the name is not kept"
    assert calls == expected, "changed: the number of calls"
EOF
