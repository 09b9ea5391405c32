"""Text from a KV cache
====================

A small transformer learns the Zen of Python by heart and says it, character by character.

The model is trained here, in about ten seconds, with torch; what it has learned then runs in plain
NumPy. A `KVCache` keeps the keys and values of all that was said, so that a step costs one query
per head; without it each step would attend from every character again. ALiBi tells the positions,
so text may be longer than any that was seen in training, and two query heads read one key head.

.. code-block:: sh

    pip install fastattn torch
    python examples/generate_text.py

The characters with and without the cache must be the same, and those of a cache in half the memory
and in a quarter of it are shown too. OMP_NUM_THREADS limits NumPy, fastattn and torch alike.
"""

import codecs
import contextlib
import io
import sys
from time import perf_counter

import numpy as np
import torch
from torch.nn import functional

import fastattn

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32
WIDTH = HEADS * HEAD_DIM
SLOPES = np.float32([2.0**-n for n in (1, 3, 5, 7)])
EPSILON = 1e-5
STORED = ("float32", "float16", "int8")
PROMPT = "Beautiful is"


def zen():
    with contextlib.redirect_stdout(io.StringIO()):
        import this  # prints it, the first time only
    return codecs.decode(this.s, "rot13").split("\n\n", 1)[1] + "\n"


# ------------------------------------------------------------------------ training, with torch


def train(ids, letters, steps, length=128, batch=4):
    """The weights by name, after `steps` batches of `batch` pieces of the text."""
    torch.manual_seed(0)
    shapes = {"embedding": (letters, WIDTH)}
    for n in range(LAYERS):
        shapes |= {
            f"{n}.qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            f"{n}.mix": (WIDTH, WIDTH),
            f"{n}.up": (WIDTH, 4 * WIDTH),
            f"{n}.down": (4 * WIDTH, WIDTH),
        }
    weights = {
        name: torch.nn.Parameter(torch.randn(shape) * (1 if name == "embedding" else WIDTH) ** -0.5)
        for name, shape in shapes.items()
    }
    place = torch.arange(length)
    distance = (place[:, None] - place).float()
    bias = -torch.from_numpy(SLOPES)[:, None, None] * distance
    bias = bias.masked_fill(distance < 0, -torch.inf)

    def attend(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    text = torch.from_numpy(np.concatenate([ids, ids]))  # it begins anew where it ends
    for _ in range(steps):
        first = torch.randint(len(ids), (batch, 1))
        piece = text[first + torch.arange(length + 1)]
        scores = forward(weights, piece[:, :-1], [attend] * LAYERS, torch)
        loss = functional.cross_entropy(scores.flatten(0, 1), piece[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: x.detach().numpy() for name, x in weights.items()}, loss.item()


# ------------------------------------------------------------------------------------ the model


def forward(weights, ids, attend, array=np):
    """Scores of the next letter at every place, (batch, length, letters), in NumPy or torch.

    ``attend[n](q, k, v)`` is the attention of layer `n`.
    """
    x = weights["embedding"][ids]
    for n in range(LAYERS):
        q, k, v = split(normed(x, array) @ weights[f"{n}.qkv"])
        mixed = attend[n](q, k, v).swapaxes(1, 2).reshape(x.shape)
        x = x + mixed @ weights[f"{n}.mix"]
        inner = normed(x, array) @ weights[f"{n}.up"]
        x = x + (inner * (inner > 0)) @ weights[f"{n}.down"]
    return normed(x, array) @ weights["embedding"].T * WIDTH**-0.5


def split(x):
    """Queries, keys and values as (batch, heads, length, HEAD_DIM); nothing is copied."""
    x = x.reshape(*x.shape[:2], -1, HEAD_DIM).swapaxes(1, 2)
    return x[:, :HEADS], x[:, HEADS : HEADS + KV_HEADS], x[:, HEADS + KV_HEADS :]


def normed(x, array):
    return x / array.sqrt((x * x).mean(-1)[..., None] + EPSILON)


# ------------------------------------------------------------------------- generation, in NumPy


def generate(weights, prompt, length, dtype="float32"):
    """`length` letters behind the prompt, from one letter a step; and the bytes that are cached."""
    caches = [fastattn.KVCache(1, KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(LAYERS)]

    def attend(cache, q, k, v):
        cache.append(k, v)
        return cache.attend(q, alibi=SLOPES)

    layers = [lambda *qkv, cache=cache: attend(cache, *qkv) for cache in caches]
    new, out = prompt, []
    for _ in range(length):
        scores = forward(weights, new[None], layers)
        new = scores[0, -1:].argmax(-1)
        out.append(new[0])
    print(f"    {caches[0]}")
    return np.array(out)


def generate_anew(weights, prompt, length):
    """The same without a cache: each step from the beginning."""

    def attend(q, k, v):
        return fastattn.scaled_dot(q, k, v, causal=True, alibi=SLOPES)

    ids = prompt
    for _ in range(length):
        scores = forward(weights, ids[None], [attend] * LAYERS)
        ids = np.append(ids, scores[0, -1].argmax())
    return ids[len(prompt) :]


def timed(function, *arguments):
    start = perf_counter()
    result = function(*arguments)
    return result, perf_counter() - start


def main(steps=200, length=400):
    text = zen()
    letters = sorted(set(text))
    ids = np.array([letters.index(c) for c in text])
    prompt = ids[: len(PROMPT)]
    (weights, loss), seconds = timed(train, ids, len(letters), steps)
    print(f"trained {steps} steps in {seconds:.0f} s, loss {loss:.3f}\n")

    anew, seconds = timed(generate_anew, weights, prompt, length)
    print(PROMPT + "".join(letters[n] for n in anew))
    print(f"\nwithout a cache: {length / seconds:.0f} tokens per second")
    for dtype in STORED:
        found, seconds = timed(generate, weights, prompt, length, dtype)
        same = np.argmin(np.append(found == anew, False))
        print(f"{dtype} cache: {length / seconds:.0f} tokens per second, the first {same} the same")
        if dtype == "float32" and same < length:
            raise SystemExit("the cache changed what was said")


# %%
if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
