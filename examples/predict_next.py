"""Attention pooling
=================

Which item of a sequence comes next? Attention pooling against a plain mean.

What comes next is what came seven items ago, as in the days of a week, but for now and then. A
fully connected layer scores every position, the softmax of the scores weighs the items, and their
weighted sum predicts the next one. The same network with all scores held at 0 takes the mean of the
items: it knows which there were, but not which of them matters.

.. code-block:: sh

    pip install fastattn[plot]
    python examples/predict_next.py           # some seconds
    python examples/predict_next.py --short   # shorter sequences, two seconds
"""

from time import perf_counter

import numpy as np
from common import arguments, save_picture

import fastattn
from fastattn import plot

ITEMS, WIDTH, BATCH = 10, 32, 128
WEEK, SURPRISES = 7, 0.05
RATE = 0.01


def draw_sequences(rng, length):
    """``(sequences, next items)``: (BATCH, length) and (BATCH,)."""
    weeks = rng.integers(0, ITEMS, (BATCH, length + 1))
    for day in range(WEEK, length + 1):
        weeks[:, day] = weeks[:, day - WEEK]
        surprised = rng.random(BATCH) < SURPRISES
        weeks[surprised, day] = rng.integers(0, ITEMS, surprised.sum())
    return weeks[:, :-1], weeks[:, -1]


class Predictor:
    """``softmax(x @ w)`` pools the vectors `x` of items at their places; a layer reads it."""

    def __init__(self, length, attends):
        rng = np.random.default_rng(1)
        shapes = {"items": (ITEMS, WIDTH), "places": (length, WIDTH), "answer": (WIDTH, ITEMS)}
        self.parameters = {
            name: (rng.standard_normal(shape) * WIDTH**-0.5).astype(np.float32)
            for name, shape in shapes.items()
        }
        self.parameters["w"] = np.zeros(WIDTH, np.float32)
        self.attends = attends
        self.adam = {name: [np.zeros_like(x), np.zeros_like(x)]
                     for name, x in self.parameters.items()}  # fmt: skip
        self.steps = 0

    def step(self, sequences, following):
        """One step downhill; the loss before it."""
        p = self.parameters
        x = p["items"][sequences] + p["places"]
        pooled, pullback = fastattn.vjp(fastattn.pool, x, p["w"])
        loss, grad_scores = cross_entropy(pooled @ p["answer"], following)

        grad_x, grad_w = pullback(grad_scores @ p["answer"].T)
        grads = {"answer": pooled.T @ grad_scores, "places": grad_x.sum(axis=0)}
        grads["items"] = np.zeros_like(p["items"])
        np.add.at(grads["items"], sequences, grad_x)
        if self.attends:
            grads["w"] = grad_w
        self.descend(grads)
        return loss

    def descend(self, grads):
        """Kingma and Ba (2015), "Adam", algorithm 1."""
        self.steps += 1
        rate = RATE * (1 - 0.99**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for name, grad in grads.items():
            mean, square = self.adam[name]
            mean += 0.1 * (grad - mean)
            square += 0.01 * (grad * grad - square)
            self.parameters[name] -= np.float32(rate) * mean / (np.sqrt(square) + 1e-8)

    def predict(self, sequences):
        """``(next items, weights of the positions)``."""
        p = self.parameters
        x = p["items"][sequences] + p["places"]
        pooled, weights = fastattn.pool(x, p["w"], return_weights=True)
        return (pooled @ p["answer"]).argmax(axis=-1), weights


def cross_entropy(scores, wanted):
    """The mean of ``-log softmax(scores)[wanted]``, and its gradient."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    place = np.arange(len(wanted)), wanted
    grad = np.exp(log_softmax)
    grad[place] -= 1
    return -log_softmax[place].mean(), grad / np.float32(len(wanted))


def draw(pyplot, losses, weights):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, values), color in zip(losses.items(), ("#0072B2", "#E69F00"), strict=True):
        left.plot(values, color=color, label=name)
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    plot.importance(weights, ax=right)
    right.set_xticks(range(0, len(weights), WEEK), range(-len(weights), 0, WEEK))
    right.set_xlabel("position, counted from the next item")
    return figure


def main():
    given = arguments(__doc__, "two weeks instead of six")
    length, steps = (2 * WEEK, 150) if given.short else (6 * WEEK, 500)

    models = {name: Predictor(length, name == "attention") for name in ("attention", "mean")}
    losses = {name: [] for name in models}
    rng = np.random.default_rng(0)
    began = perf_counter()
    for step in range(steps + 1):
        sequences, following = draw_sequences(rng, length)
        for name, model in models.items():
            losses[name].append(model.step(sequences, following))
        if step % (steps // 10) == 0:
            shown = ", ".join(f"{name} {values[-1]:.3f}" for name, values in losses.items())
            print(f"step {step:5}  loss: {shown}")
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step of both")

    sequences, following = zip(*(draw_sequences(rng, length) for _ in range(20)), strict=True)
    sequences, following = np.concatenate(sequences), np.concatenate(following)
    found = {name: model.predict(sequences) for name, model in models.items()}
    right = {name: np.mean(said == following) for name, (said, _) in found.items()}
    weights = found["attention"][1].mean(axis=0)
    print("right of new ones: " + ", ".join(f"{name} {x:.1%}" for name, x in right.items()))
    print(f"weight of the item seven ago: {weights[-WEEK]:.3f}")
    save_picture(given.output / "predict_next.png", draw, losses, weights)
    fell = losses["attention"][-1] < 0.5 * losses["attention"][0]
    if not (fell and right["attention"] > 0.9 and right["attention"] > 1.5 * right["mean"]):
        raise SystemExit("attention has not learned where to look")


# %%
if __name__ == "__main__":
    main()
