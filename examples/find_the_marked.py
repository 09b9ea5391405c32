"""Learning where to attend
========================

In plain NumPy, a network learns to find the one marked input among many.

Every input is a symbol in noise; one of them also carries a faint mark, the same in all examples
but unknown to the network. Asked is the symbol of the marked one. Attention weighs the inputs, a
processing module reads their weighted sum, and both learn by gradient descent: `forward` and
`backward` are written out here, but for those of the attention itself, which are `fastattn.vjp`.

.. code-block:: sh

    pip install fastattn[plot]
    python examples/find_the_marked.py           # some ten seconds
    python examples/find_the_marked.py --short   # fewer distractors, two seconds
"""

from time import perf_counter

import numpy as np
from common import arguments, save_picture

import fastattn
from fastattn import plot

SYMBOLS, WIDTH, HIDDEN, BATCH = 8, 24, 48, 128


class AttentionNetwork:
    """``tanh(attention(x) @ w_1 + b_1) @ w_2 + b_2``: the scores of the symbols for each example.

    The attention's query is a parameter, its keys and values are linear in the inputs.
    """

    def __init__(self, rng, learning_rate):
        shapes = {
            "query": (1, WIDTH), "w_k": (WIDTH, WIDTH), "w_v": (WIDTH, WIDTH),
            "w_1": (WIDTH, HIDDEN), "b_1": (HIDDEN,), "w_2": (HIDDEN, SYMBOLS), "b_2": (SYMBOLS,),
        }  # fmt: skip
        self.parameters = {
            name: (rng.standard_normal(shape) * shape[0] ** -0.5 * (len(shape) > 1)).astype("f4")
            for name, shape in shapes.items()
        }
        self.learning_rate = learning_rate

    def forward(self, x):
        """Scores (batch, SYMBOLS) for inputs (batch, inputs, WIDTH)."""
        p = self.parameters
        attended, self.pullback = fastattn.vjp(
            fastattn.scaled_dot, p["query"], x @ p["w_k"], x @ p["w_v"]
        )
        self.x, self.attended = x, attended[:, 0]
        self.hidden = np.tanh(self.attended @ p["w_1"] + p["b_1"])
        return self.hidden @ p["w_2"] + p["b_2"]

    def backward(self, grad_scores):
        """The gradients of all parameters, by name, behind the last `forward`."""
        p = self.parameters
        grad_hidden = (grad_scores @ p["w_2"].T) * (1 - self.hidden**2)
        grad_query, grad_k, grad_v = self.pullback((grad_hidden @ p["w_1"].T)[:, None])
        return {
            "w_2": self.hidden.T @ grad_scores,
            "b_2": grad_scores.sum(axis=0),
            "w_1": self.attended.T @ grad_hidden,
            "b_1": grad_hidden.sum(axis=0),
            "query": grad_query,
            "w_k": np.tensordot(self.x, grad_k, ([0, 1], [0, 1])),
            "w_v": np.tensordot(self.x, grad_v, ([0, 1], [0, 1])),
        }

    def descend(self, grads):
        for name, grad in grads.items():
            self.parameters[name] -= self.learning_rate * grad

    def attention(self, x):
        """The weights of the inputs, (batch, inputs)."""
        p = self.parameters
        _, weights = fastattn.scaled_dot(p["query"], x @ p["w_k"], x, return_weights=True)
        return weights[:, 0]


class Task:
    """Examples with one marked input each."""

    def __init__(self, rng, inputs):
        self.rng, self.inputs = rng, inputs
        # Unit vectors at right angles: the symbols, and the mark.
        directions = np.linalg.qr(rng.standard_normal((WIDTH, SYMBOLS + 1)))[0].T
        self.symbols, self.mark = np.float32(3 * directions[:-1]), np.float32(2 * directions[-1])

    def draw(self):
        """``(inputs, marked ones, their symbols)``: (BATCH, inputs, WIDTH) and twice (BATCH,)."""
        symbols = self.rng.integers(0, SYMBOLS, (BATCH, self.inputs))
        marked = self.rng.integers(0, self.inputs, BATCH)
        x = self.symbols[symbols]
        x += 0.3 * self.rng.standard_normal(x.shape, np.float32)
        x[np.arange(BATCH), marked] += self.mark
        return x, marked, symbols[np.arange(BATCH), marked]


def cross_entropy(scores, wanted):
    """The mean of ``-log softmax(scores)[wanted]``, and its gradient."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    place = np.arange(len(wanted)), wanted
    grad = np.exp(log_softmax)
    grad[place] -= 1
    return -log_softmax[place].mean(), grad / len(wanted)


def check_gradients(network, x, wanted, step=1e-5):
    """Of each parameter along a random direction, against a small step each way in float64."""
    kept = network.parameters
    exact = {name: value.astype(np.float64) for name, value in kept.items()}
    rng = np.random.default_rng(0)

    def loss(parameters):
        network.parameters = parameters
        return cross_entropy(network.forward(x.astype(np.float64)), wanted)

    grads = network.backward(loss(exact)[1])
    for name, value in exact.items():
        direction = rng.standard_normal(value.shape)
        ahead, back = (
            loss({**exact, name: value + sign * step * direction})[0] for sign in (1, -1)
        )
        slope, wanted_slope = np.vdot(grads[name], direction), (ahead - back) / (2 * step)
        print(f"slope along {name:5}  {slope:12.8f}, by a finite difference {wanted_slope:12.8f}")
        if not np.isclose(slope, wanted_slope, rtol=1e-5, atol=1e-9):
            raise SystemExit(f"the gradient of {name} is wrong")
    network.parameters = kept


def draw(pyplot, losses, weights, marked):
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), width_ratios=(2, 3), layout="constrained"
    )
    left.plot(losses, color="#0072B2", linewidth=1)
    left.axhline(np.log(SYMBOLS), color="#E69F00", linestyle="--", label="guessing")
    left.set(xlabel="step", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    plot.attention(weights, ax=right, aspect="auto", vmax=1)
    right.scatter(marked, range(len(marked)), s=60, facecolors="none", edgecolors="#D55E00")
    right.set(xlabel="input (the marked one is ringed)", ylabel="example")
    return figure


def main():
    given = arguments(__doc__, "16 inputs instead of 64")
    inputs, steps = (16, 100) if given.short else (64, 300)

    task = Task(np.random.default_rng(0), inputs)
    network = AttentionNetwork(np.random.default_rng(1), learning_rate=0.5)
    x, _, wanted = task.draw()
    check_gradients(network, x, wanted)

    losses = []
    began = perf_counter()
    for step in range(steps + 1):
        x, _, wanted = task.draw()
        scores = network.forward(x)
        loss, grad_scores = cross_entropy(scores, wanted)
        network.descend(network.backward(grad_scores))
        losses.append(loss)
        if step % (steps // 10) == 0:
            right = np.mean(scores.argmax(axis=-1) == wanted)
            print(f"step {step:5}  loss {loss:.4f}  right {right:6.1%}")
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step")

    x, marked, wanted = task.draw()
    right = np.mean(network.forward(x).argmax(axis=-1) == wanted)
    weights = network.attention(x)
    found = np.mean(weights.argmax(axis=-1) == marked)
    print(f"new examples: {right:.1%} right, {found:.1%} attend to the marked input most")
    save_picture(given.output / "find_the_marked.png", draw, losses, weights[:16], marked[:16])
    if not (losses[-1] < 0.2 * losses[0] and right > 0.97 and found > 0.97):
        raise SystemExit("the network has not learned where to attend")


# %%
if __name__ == "__main__":
    main()
