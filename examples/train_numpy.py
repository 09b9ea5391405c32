"""Training attention in plain NumPy: a small model that learns to read a sequence backwards.

One layer of multi-head attention between two embeddings and a projection; the layers around the
attention are differentiated by hand, the attention itself by `fastattn.vjp`. Nothing tells the
model which position to look at: the attention has to learn it.

    pip install fastattn
    python examples/train_numpy.py              # some ten seconds
    python examples/train_numpy.py --short      # shorter sequences, two seconds
"""

import argparse
from time import perf_counter

import numpy as np

import fastattn

LETTERS, WIDTH, HEADS, BATCH = 26, 64, 4, 64
RATE, DECAYS, EPSILON = 3e-3, (0.9, 0.99), 1e-8


def make_parameters(rng, length):
    shapes = {
        "letters": (LETTERS, WIDTH),
        "places": (length, WIDTH),
        **dict.fromkeys(("query", "key", "value", "mixed"), (WIDTH, WIDTH)),
        "logits": (WIDTH, LETTERS),
    }
    return {
        name: (rng.standard_normal(shape) * WIDTH**-0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def loss_and_gradients(parameters, sequences, targets):
    """The mean cross-entropy, its gradients by name, and the letters that the model would say."""
    p = parameters
    x = p["letters"][sequences] + p["places"]
    heads = [to_heads(x @ p[name]) for name in ("query", "key", "value")]
    attended, pullback = fastattn.vjp(fastattn.scaled_dot, *heads)
    joined = from_heads(attended)
    hidden = joined @ p["mixed"]
    logits = hidden @ p["logits"]
    loss, grad_logits = cross_entropy(logits, targets)

    grads = {"logits": outer(hidden, grad_logits)}
    grad_hidden = grad_logits @ p["logits"].T
    grads["mixed"] = outer(joined, grad_hidden)
    grad_heads = pullback(to_heads(grad_hidden @ p["mixed"].T))
    grad_x = np.zeros_like(x)
    for name, grad in zip(("query", "key", "value"), grad_heads, strict=True):
        grads[name] = outer(x, from_heads(grad))
        grad_x += from_heads(grad) @ p[name].T
    grads["places"] = grad_x.sum(axis=0)
    grads["letters"] = np.zeros_like(p["letters"])
    np.add.at(grads["letters"], sequences, grad_x)
    return loss, grads, logits.argmax(axis=-1)


def to_heads(x):
    """(batch, length, width) as (batch, heads, length, width / heads), without a copy."""
    return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)


def from_heads(x):
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def outer(x, grad):
    """The gradient of the matrix in ``x @ matrix``."""
    return np.tensordot(x, grad, axes=([0, 1], [0, 1]))


def cross_entropy(logits, targets):
    """The mean of ``-log softmax(logits)[target]``, and its gradient."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    place = (*np.indices(targets.shape), targets)
    grad = np.exp(log_softmax)
    grad[place] -= 1
    return -log_softmax[place].mean(), grad / np.float32(targets.size)


class Adam:
    """Kingma and Ba (2015), "Adam", algorithm 1."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.means = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.squares = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.steps = 0

    def step(self, grads):
        self.steps += 1
        first, second = DECAYS
        rate = RATE * (1 - second**self.steps) ** 0.5 / (1 - first**self.steps)
        for name, grad in grads.items():
            mean, square = self.means[name], self.squares[name]
            mean += (1 - first) * (grad - mean)
            square += (1 - second) * (grad * grad - square)
            self.parameters[name] -= np.float32(rate) * mean / (np.sqrt(square) + EPSILON)


def check_gradients(rng, parameters, batch):
    """Along a random direction, against a small step each way in float64."""
    exact = {name: x.astype(np.float64) for name, x in parameters.items()}
    direction = {name: rng.standard_normal(x.shape) for name, x in exact.items()}
    _, grads, _ = loss_and_gradients(exact, *batch)
    slope = sum((grads[name] * direction[name]).sum() for name in grads)
    ahead, back = (
        loss_and_gradients({n: x + step * direction[n] for n, x in exact.items()}, *batch)[0]
        for step in (1e-5, -1e-5)
    )
    return slope, (ahead - back) / 2e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="8 letters instead of 32")
    length, steps = (8, 100) if parser.parse_args().short else (32, 300)

    rng = np.random.default_rng(0)
    parameters = make_parameters(rng, length)

    def draw():
        sequences = rng.integers(0, LETTERS, (BATCH, length))
        return sequences, sequences[:, ::-1]

    print("slope of the loss: {:.8f}, by a finite difference {:.8f}".format(
        *check_gradients(rng, parameters, draw())))  # fmt: skip
    adam = Adam(parameters)
    began = perf_counter()
    for step in range(steps + 1):
        sequences, targets = draw()
        loss, grads, said = loss_and_gradients(parameters, sequences, targets)
        if step % (steps // 10) == 0:
            print(f"step {step:4}  loss {loss:.4f}  right {np.mean(said == targets):6.1%}")
        adam.step(grads)
    print(f"{(perf_counter() - began) / steps * 1e3:.1f} ms a step")

    sequences, targets = draw()
    *_, said = loss_and_gradients(parameters, sequences, targets)
    for name, numbers in (("given", sequences[0]), ("said", said[0])):
        print(f"{name:6}", "".join(chr(ord("a") + n) for n in numbers))
    right = np.mean(said == targets)
    if not right > 0.99:
        raise SystemExit(f"only {right:.1%} of new letters are right")


if __name__ == "__main__":
    main()
