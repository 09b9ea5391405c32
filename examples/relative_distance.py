"""Learned distances
=================

A bias for each distance of a key learns how far away the answer is.

Each position of a sequence has to name two tokens, the one 3 places before it and the one 7 places
after it. Which token it is tells nothing of where it stands: only the distance does. A layer of
two heads learns `relative_bias` of `fastattn.scaled_dot`, a number for each distance and head, with
its projections; without that bias it can only guess. The gradient is that of `fastattn.vjp` with
``wrt=("relative_bias",)``. As distances are the same everywhere, it names tokens of sequences
longer than those it was trained on, too.

.. code-block:: sh

    pip install fastattn[plot]
    python examples/relative_distance.py           # some seconds
    python examples/relative_distance.py --short   # shorter sequences, two seconds
"""

from time import perf_counter

import numpy as np
from common import arguments, save_picture

import fastattn

TOKENS, HEADS, HEAD_DIM, BATCH = 12, 2, 16, 16
DISTANCES = (-3, 7)  # from a position to the tokens that it has to name
REACH = 16  # all distances beyond it share a bias
RATE = 0.03


def draw_sequences(rng, length):
    """``(tokens, wanted)``: (BATCH, length), and (BATCH, length, 2) with -1 beyond the ends."""
    tokens = rng.integers(0, TOKENS, (BATCH, length))
    places = np.arange(length)[:, None] + DISTANCES
    inside = (places >= 0) & (places < length)
    return tokens, np.where(inside, tokens[:, np.where(inside, places, 0)], -1)


class Layer:
    """Attention of two heads over the tokens, and a linear layer that names two of them."""

    def __init__(self, biased):
        rng = np.random.default_rng(1)
        shapes = dict.fromkeys(("w_q", "w_k", "w_v"), (TOKENS, HEADS * HEAD_DIM))
        shapes["w_out"] = (HEADS * HEAD_DIM, len(DISTANCES) * TOKENS)
        self.parameters = {
            name: (rng.standard_normal(shape) * HEAD_DIM**-0.5).astype(np.float32)
            for name, shape in shapes.items()
        }
        if biased:
            self.parameters["relative_bias"] = np.zeros((HEADS, 2 * REACH + 1), np.float32)
        self.learned = ("relative_bias",) if biased else ()
        self.moments = {name: np.zeros((2, *x.shape)) for name, x in self.parameters.items()}
        self.steps = 0

    def forward(self, tokens):
        """``(logits, gathered, pullback)``; logits: (BATCH, length, 2, TOKENS)."""
        p = self.parameters
        # A token is a row of a projection: the product with its one-hot vector.
        q, k, v = (
            p[name][tokens].reshape(*tokens.shape, HEADS, HEAD_DIM).swapaxes(1, 2)
            for name in ("w_q", "w_k", "w_v")
        )
        options = {name: p[name] for name in self.learned}
        out, pullback = fastattn.vjp(fastattn.scaled_dot, q, k, v, wrt=self.learned, **options)
        gathered = out.swapaxes(1, 2).reshape(*tokens.shape, HEADS * HEAD_DIM)
        return (gathered @ p["w_out"]).reshape(*tokens.shape, -1, TOKENS), gathered, pullback

    def step(self, tokens, wanted):
        """One step downhill; the loss before it."""
        logits, gathered, pullback = self.forward(tokens)
        loss, grad = cross_entropy(logits, wanted)
        grad = grad.reshape(*tokens.shape, -1)
        grad_out = (grad @ self.parameters["w_out"].T).reshape(*tokens.shape, HEADS, HEAD_DIM)
        found = pullback(grad_out.swapaxes(1, 2))
        grads = {"w_out": np.tensordot(gathered, grad, ((0, 1), (0, 1)))}
        for name, x in zip(("w_q", "w_k", "w_v"), found[:3], strict=True):
            grads[name] = np.zeros_like(self.parameters[name])
            np.add.at(grads[name], tokens, x.swapaxes(1, 2).reshape(*tokens.shape, -1))
        grads.update(zip(self.learned, found[3:], strict=True))
        self.descend(grads)
        return loss

    def descend(self, grads):
        """Kingma and Ba (2015), "Adam", algorithm 1."""
        self.steps += 1
        rate = RATE * (1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for name, grad in grads.items():
            mean, square = self.moments[name]
            mean += 0.1 * (grad - mean)
            square += 0.01 * (grad * grad - square)
            self.parameters[name] -= (rate * mean / (np.sqrt(square) + 1e-8)).astype(np.float32)


def cross_entropy(logits, wanted):
    """Its mean over the tokens that are wanted, and its gradient."""
    there = wanted >= 0
    shifted = logits[there] - logits[there].max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    place = np.arange(len(shifted)), wanted[there]
    grad = np.zeros_like(logits)
    of_wanted = np.exp(log_softmax)
    of_wanted[place] -= 1
    grad[there] = of_wanted / np.float32(len(shifted))
    return -log_softmax[place].mean(), grad


def right(layer, rng, length):
    """The share of tokens that are named right in new sequences."""
    tokens, wanted = draw_sequences(rng, length)
    named = layer.forward(tokens)[0].argmax(axis=-1)
    return np.mean((named == wanted)[wanted >= 0])


def draw(pyplot, losses, bias):
    figure, (left, *others) = pyplot.subplots(1, 1 + HEADS, figsize=(11, 3.4), layout="constrained")
    for (name, values), color in zip(losses.items(), ("#0072B2", "#E69F00"), strict=True):
        left.plot(values, color=color, label=name)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    distance = np.arange(-REACH, REACH + 1)
    for head, (axes, numbers) in enumerate(zip(others, bias, strict=True)):
        peak = distance[numbers.argmax()]
        colors = np.where(distance == peak, "#0072B2", "#B0B0B0")
        axes.bar(distance, numbers - np.median(numbers), color=colors)
        axes.set(xlabel="distance of the key", ylim=(-0.5, None))
        axes.set_xticks([-REACH, *DISTANCES, REACH])
        axes.set_title(f"head {head}: learned bias, less its median", fontsize=10)
    for axes in (left, *others):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    given = arguments(__doc__, "shorter sequences")
    length, steps = (48, 150) if given.short else (96, 200)

    layers = {"relative bias": Layer(biased=True), "no positions": Layer(biased=False)}
    losses = {name: [] for name in layers}
    rng = np.random.default_rng(0)
    began = perf_counter()
    for step in range(steps + 1):
        tokens, wanted = draw_sequences(rng, length)
        for name, layer in layers.items():
            losses[name].append(layer.step(tokens, wanted))
        if step % (steps // 10) == 0:
            shown = ", ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
            print(f"step {step:5}  loss: {shown}")
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step of both")

    layer = layers["relative bias"]
    bias = layer.parameters["relative_bias"]
    learned = tuple(int(x) for x in bias.argmax(axis=-1) - REACH)
    for head, distance in enumerate(learned):
        print(f"head {head} learned the distance {distance:+}")
    shares = {n: right(layer, rng, n) for n in (length, 4 * length)}
    print("right: " + ", ".join(f"{x:.1%} at length {n}" for n, x in shares.items()))
    guessed = right(layers["no positions"], rng, length)
    print(f"right without positions: {guessed:.1%}")
    save_picture(given.output / "relative_distance.png", draw, losses, bias)
    if not (set(learned) == set(DISTANCES) and min(shares.values()) > 0.95 and guessed < 0.3):
        raise SystemExit("the bias has not learned the distances")


# %%
if __name__ == "__main__":
    main()
