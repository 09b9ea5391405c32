"""Multi-head attention
====================

Dot-product, scaled dot-product and multi-head attention: the worked matrices, and what heads do.

First three queries, keys and values small enough for pencil and paper. Then a layer of the usual
size, d_model 512 with 8 heads, on 32 texts of 10 words: on themselves, on other texts, and on the
patches of pictures. A sinusoidal code of the position turns by fixed angles from word to word, so
a matrix that turns it back lets a head look that many words away. Each head gets another such
matrix, and the picture shows that each looks somewhere else, which one softmax cannot do.

.. code-block:: sh

    pip install fastattn[plot]
    python examples/multi_head.py           # a second
    python examples/multi_head.py --short   # a smaller layer
"""

import numpy as np
from common import arguments, save_picture

import fastattn

Q = np.array([[1, 2], [3, 4], [5, 6]])
K = np.array([[1, 0], [0, 1], [1, 1]])
V = np.array([[2, 0], [0, 2], [2, 2]])
BATCH, LENGTH, PATCHES, PATCH_WIDTH = 32, 10, 196, 768
SHIFTS = (-4, -3, -2, -1, 0, 1, 2, 3)  # where each of the heads looks, in words
SHARPNESS = 5.0


def worked_matrices():
    """Integers in, float64 out, and the same by the formula."""
    for function, scale in ((fastattn.dot, 1.0), (fastattn.scaled_dot, 1 / np.sqrt(2))):
        out, weights = function(Q, K, V, return_weights=True)
        powers = np.exp(scale * (Q @ K.T))
        wanted = powers / powers.sum(axis=1, keepdims=True)
        print(f"{function.__name__}: weights\n{weights.round(4)}\nand output\n{out.round(4)}\n")
        if not (np.allclose(weights, wanted, rtol=1e-12) and np.allclose(out, wanted @ V)):
            raise SystemExit(f"the formula says\n{wanted}\nand\n{wanted @ V}")


def angles(width, positions):
    """Of the code's pairs at each position: Vaswani et al. (2017), section 3.5."""
    return np.multiply.outer(positions, 1e4 ** (-np.arange(0, width, 2) / width))


def position_codes(width, length):
    """``sin`` and ``cos`` of the angles in turns, (length, width)."""
    turn = angles(width, np.arange(length))
    return np.stack([np.sin(turn), np.cos(turn)], axis=-1).reshape(length, width)


def looking_away(layer, shifts):
    """Let head ``h`` of a layer look for the position code `shifts[h]` words further on.

    It reads the first `head_dim` entries of the code, where it turns fastest.
    """
    width, dim = layer.embed_dim, layer.head_dim
    w_q, w_k = np.zeros((2, width, len(shifts), dim), np.float32)
    for head, shift in enumerate(shifts):
        turn = angles(width, shift)[: dim // 2]
        even = 2 * np.arange(dim // 2)
        w_q[even, head, even] = w_q[even + 1, head, even + 1] = SHARPNESS * np.cos(turn)
        w_q[even, head, even + 1] = -SHARPNESS * np.sin(turn)
        w_q[even + 1, head, even] = SHARPNESS * np.sin(turn)
        w_k[:dim, head] = np.eye(dim)
    layer.w_q, layer.w_k = w_q.reshape(width, width), w_k.reshape(width, width)


def shapes_of_attention(layer, texts):
    """On itself, on another text and on pictures; the weights of the first."""
    width, heads = layer.embed_dim, layer.num_heads
    rng = np.random.default_rng(2)
    others = rng.standard_normal((BATCH, 2 * LENGTH, width), np.float32)
    pictures = rng.standard_normal((BATCH, PATCHES, PATCH_WIDTH), np.float32)
    across = fastattn.MultiHeadAttention(width, heads, key_dim=PATCH_WIDTH, rng=3)
    calls = {"self": (layer, texts), "cross": (layer, texts, others),
             "modalities": (across, texts, pictures)}  # fmt: skip
    found = {}
    for name, (attend, *inputs) in calls.items():
        out, found[name] = attend(*inputs, return_weights=True)
        print(f"{name:10}", *(x.shape for x in inputs), "->", out.shape, found[name].shape)
        if out.shape != (BATCH, LENGTH, width):
            raise SystemExit(f"an output of shape {(BATCH, LENGTH, width)} wanted")
    return found["self"]


def draw(pyplot, weights):
    titles = [f"head {head}: {shift:+} words" for head, shift in enumerate(SHIFTS)]
    return fastattn.plot.heads(weights, titles=titles, vmax=1)


def main():
    given = arguments(__doc__, "d_model 128 instead of 512")
    width = 128 if given.short else 512

    worked_matrices()
    layer = fastattn.MultiHeadAttention(width, len(SHIFTS), rng=0)
    looking_away(layer, SHIFTS)
    words = np.random.default_rng(1).standard_normal((BATCH, LENGTH, width), np.float32)
    texts = 0.1 * words + position_codes(width, LENGTH).astype(np.float32)
    weights = shapes_of_attention(layer, texts)
    if weights.shape != (BATCH, len(SHIFTS), LENGTH, LENGTH):
        raise SystemExit(f"weights of shape {weights.shape}")
    save_picture(given.output / "multi_head.png", draw, weights[0])

    query = np.arange(LENGTH)
    for head, shift in enumerate(SHIFTS):
        there = (query + shift >= 0) & (query + shift < LENGTH)
        if not (weights[:, head].argmax(axis=-1) == query + shift)[:, there].all():
            raise SystemExit(f"head {head} does not look {shift:+} words away")
    print("each head looks where its matrix says, in all texts")


# %%
if __name__ == "__main__":
    main()
