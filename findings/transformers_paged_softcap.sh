#!/usr/bin/env bash
# A model computes the same logits whether its prompts go through generate or, several at a time,
# through generate_batch: only the batching differs. In transformers 5.24.0 Gemma 2 does not. It
# has no "sdpa", so on a CPU continuous batching takes its "paged|eager" attention, and
# eager_paged_attention_forward in integrations/eager_paged.py has no parameter for softcap: the
# model's attn_logit_softcapping vanishes in **kwargs, without a warning. What generate_batch
# returns is, to the last digits, the model without its soft cap. It matters because an attention
# function that swallows **kwargs loses options of the score silently: refuse those that you do not
# implement, as the library's sdpa does with softcap.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check \
    'numpy==2.4.6' 'torch==2.13.0' 'transformers==5.24.0' 'psutil==7.2.2'
"$work/venv/bin/python" -I - <<'EOF'
import torch
import transformers
from transformers import ContinuousBatchingConfig, Gemma2Config, Gemma2ForCausalLM, GenerationConfig

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    query_pre_attn_scalar=16, attn_logit_softcapping=2.0, attn_implementation="eager",
)
model = Gemma2ForCausalLM(config).eval()
with torch.no_grad():
    for x in model.parameters():
        if x.dim() > 1:
            x.mul_(4)  # scores that a soft cap of 2 changes
prompt = torch.randint(3, 99, (9,), generator=torch.Generator().manual_seed(1)).tolist()


def one_by_one():
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )
    return found.logits[0].log_softmax(-1).max().item()


results = model.generate_batch(
    [prompt], progress_bar=False,
    generation_config=GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1),
    continuous_batching_config=ContinuousBatchingConfig(
        num_blocks=16, page_size=16, max_batch_tokens=64, return_logprobs=True
    ),
)
(batched,) = (x.logprobs[0] for x in results.values())
capped = one_by_one()
for layer in model.model.layers:
    layer.self_attn.attn_logit_softcapping = None
uncapped = one_by_one()
print(f"log-probability of the first new token: generate {capped:.6f}, generate_batch "
      f"{batched:.6f}, generate without the soft cap {uncapped:.6f}")
assert abs(batched - uncapped) < 1e-5, "changed: generate_batch is not the model without its cap"
assert abs(batched - capped) > 1e-3, "changed: generate_batch caps the scores"
EOF
