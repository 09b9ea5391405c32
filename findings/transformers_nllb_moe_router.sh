#!/usr/bin/env bash
# transformers lets one register an attention function together with the form of mask it wants,
# bool (True: visible) or additive (0: visible), and selects both by name. So one expects a
# function with the same mathematics to give the same model. In transformers 5.24.0 it does not
# for NLLB-MoE: the router of its experts is handed the attention mask as a padding mask and reads
# the last row as ~mask.bool() (models/nllb_moe/modeling_nllb_moe.py,
# NllbMoeTop2Router.route_tokens), which is right for an additive mask only. Given a bool mask it
# routes the padding and drops every real token, with no warning, and the outputs move by a little
# only. It matters to anyone who plugs attention for arrays or another kernel into a model: the
# mask has other readers than the attention, and a model that runs with nearly the right numbers
# may still be wrong. Register an additive mask, or compare hidden states, not generated text.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0' 'transformers==5.24.0'
"$work/venv/bin/python" -I - <<'EOF'
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, NllbMoeConfig, NllbMoeModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

print("torch", torch.__version__, "transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
AttentionInterface.register("mine", sdpa_attention_forward)
AttentionMaskInterface.register("mine", sdpa_mask)

torch.manual_seed(0)
widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
sizes = {"encoder_layers": 1, "decoder_layers": 1, "num_experts": 2, "expert_capacity": 16}
heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
sparse = {"encoder_sparse_step": 1, "decoder_sparse_step": 1}
config = NllbMoeConfig(vocab_size=32, **widths, **sizes, **heads, **sparse)
model = NllbMoeModel(config).eval()
ids = torch.randint(3, 32, (1, 6))
padding = torch.tensor([[1, 1, 1, 1, 0, 0]])

routed = []
route_tokens = NllbMoeTop2Router.route_tokens


def recording(self, *args):
    result = route_tokens(self, *args)
    routed.append(result[0].sum(-1).tolist())
    return result


NllbMoeTop2Router.route_tokens = recording
states = []
for name in ("eager", "mine"):
    model.set_attn_implementation(name)
    with torch.no_grad():
        states.append(model.get_encoder()(ids, attention_mask=padding).last_hidden_state[0, :4])
    print(f"{name}: tokens routed to an expert: {routed[-1]}")
difference = (states[0] - states[1]).abs().max().item()
print(f"largest difference of the states of real tokens: {difference:.1e}")
assert routed[0] == [1, 1, 1, 1, 0, 0], "changed: the additive mask is misread"
assert routed[1] == [0, 0, 0, 0, 1, 1], "changed: the bool mask is read rightly"
assert difference > 1e-4, "changed: the states agree"
EOF
