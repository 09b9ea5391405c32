"""Node classification on a graph
==============================

Attention over neighbours learns which of them to trust.

A node's class shows in its neighbours only. Two in five of these are drawn at random, and three in
five nodes are spam: their features tell of any class, though they differ in one direction. The mean
of the neighbours takes them all alike; attention over the same neighbours learns which to read. The
graph is the sparse mask of `fastattn.scaled_dot`, a CSR array of SciPy, so time and memory follow
its edges; the gradients are `fastattn.vjp`.

.. code-block:: sh

    pip install fastattn[plot] scipy
    python examples/graph_classification.py           # some ten seconds
    python examples/graph_classification.py --short   # fewer nodes and steps, two seconds
"""

from time import perf_counter

import numpy as np
from common import arguments, save_picture
from scipy import sparse

import fastattn
from fastattn import plot

CLASSES, WIDTH, HEADS, HEAD_DIM, NEIGHBOURS = 6, 16, 2, 8, 16


def make_graph(rng, nodes):
    """``(features, classes, edges, spam)``: edges[i, j] says that node i reads node j."""
    classes = rng.integers(0, CLASSES, nodes)
    spam = rng.random(nodes) < 0.6
    directions = np.linalg.qr(rng.standard_normal((WIDTH, CLASSES + 1)))[0].T
    told = np.where(spam, rng.integers(0, CLASSES, nodes), classes)
    features = 1.5 * directions[told] + 2.0 * np.where(spam, -1, 1)[:, None] * directions[-1]
    features += 0.4 * rng.standard_normal(features.shape)
    features[:, -1] = 1  # an intercept of what is linear in them

    readers = np.repeat(np.arange(nodes), NEIGHBOURS)
    read = rng.integers(0, nodes, len(readers))
    of_class = [np.flatnonzero(classes == c) for c in range(CLASSES)]
    alike = rng.random(len(readers)) < 0.6
    for c, members in enumerate(of_class):
        chosen = alike & (classes[readers] == c)
        read[chosen] = rng.choice(members, chosen.sum())
    others = readers != read  # nobody reads itself
    ones = np.ones(others.sum(), bool)
    edges = sparse.csr_array((ones, (readers[others], read[others])), shape=(nodes, nodes))
    return features.astype(np.float32), classes, edges, spam


class GraphAttention:
    """One layer of attention over neighbours, and a linear classifier of what it gathers.

    Without ``scores`` all neighbours weigh alike: their mean, with the same parameters otherwise.
    """

    def __init__(self, rng, edges, scores=True):
        self.edges, self.scores = edges, scores
        shapes = dict.fromkeys(("w_q", "w_k", "w_v"), (WIDTH, HEADS * HEAD_DIM))
        shapes["w_out"] = (HEADS * HEAD_DIM, CLASSES)
        self.parameters = {
            name: (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)
            for name, shape in shapes.items()
        }
        self.moments = {name: np.zeros((2, *x.shape)) for name, x in self.parameters.items()}
        self.steps = 0

    def heads(self, x, name):
        """(HEADS, nodes, HEAD_DIM)"""
        return (x @ self.parameters[name]).reshape(len(x), HEADS, HEAD_DIM).swapaxes(0, 1)

    def forward(self, x):
        """The logits of each node, (nodes, CLASSES)."""
        q = self.heads(x, "w_q") * self.scores
        gathered, self.pullback = fastattn.vjp(
            fastattn.scaled_dot, q, self.heads(x, "w_k"), self.heads(x, "w_v"), mask=self.edges
        )
        self.x, self.gathered = x, gathered.swapaxes(0, 1).reshape(len(x), -1)
        return self.gathered @ self.parameters["w_out"]

    def descend(self, grad, rate):
        """A step of Adam (Kingma and Ba 2015, algorithm 1) from the gradient of the logits."""
        grad_gathered = grad @ self.parameters["w_out"].T
        by_head = grad_gathered.reshape(len(grad), HEADS, HEAD_DIM).swapaxes(0, 1)
        grads = {"w_out": self.gathered.T @ grad}
        for name, x in zip(("w_q", "w_k", "w_v"), self.pullback(by_head), strict=True):
            grads[name] = self.x.T @ x.swapaxes(0, 1).reshape(len(grad), -1)
        grads["w_q"] *= self.scores
        self.steps += 1
        for name, x in grads.items():
            first, second = self.moments[name]
            first += 0.1 * (x - first)
            second += 0.01 * (x * x - second)
            size = np.sqrt(second / (1 - 0.99**self.steps)) + 1e-8
            step = rate * first / (1 - 0.9**self.steps) / size
            self.parameters[name] -= step.astype(np.float32)


def cross_entropy(logits, wanted, nodes):
    """Its mean over some nodes, and its gradient."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    grad = np.zeros_like(logits)
    grad[nodes] = np.exp(log_softmax[nodes])
    grad[nodes, wanted[nodes]] -= 1
    return -log_softmax[nodes, wanted[nodes]].mean(), grad / len(nodes)


def train(network, x, classes, split, steps):
    """How often it is right about the other nodes, after each step."""
    training, held_out = split
    right = []
    for _ in range(steps):
        logits = network.forward(x)
        right.append(np.mean(logits[held_out].argmax(axis=-1) == classes[held_out]))
        network.descend(cross_entropy(logits, classes, training)[1], rate=0.02)
    return right


def draw(pyplot, curves, node, found, spam, classes):
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.5, 4.2), width_ratios=(1, 1.1), layout="constrained"
    )
    for (name, curve), color in zip(curves.items(), ("#0072B2", "#E69F00"), strict=True):
        left.plot(np.multiply(curve, 100), color=color, label=name)
    left.set(xlabel="step", ylabel="% of held-out nodes right", ylim=(0, 100))
    left.legend(frameon=False, loc="lower right")
    left.spines[["top", "right"]].set_visible(False)
    neighbours, weights = found
    names = [f"class {classes[j]}" + " (spam)" * int(spam[j]) for j in neighbours]
    plot.neighbourhood(f"class {classes[node]}", names, weights, ax=right)
    right.set_title("what one node reads: the wider, the more", fontsize=10)
    return figure


def main():
    given = arguments(__doc__, "fewer nodes and steps")
    nodes, steps = (1500, 40) if given.short else (4000, 60)

    rng = np.random.default_rng(0)
    x, classes, edges, spam = make_graph(rng, nodes)
    order = rng.permutation(nodes)
    split = order[: nodes // 2], order[nodes // 2 :]
    print(f"{nodes} nodes, {edges.nnz} edges of {nodes**2} pairs")

    networks = {
        "attention over neighbours": GraphAttention(np.random.default_rng(1), edges),
        "mean of neighbours": GraphAttention(np.random.default_rng(1), edges, scores=False),
    }
    curves = {}
    for name, network in networks.items():
        began = perf_counter()
        curves[name] = train(network, x, classes, split, steps)
        milliseconds = (perf_counter() - began) / steps * 1e3
        print(f"{name:26} {curves[name][-1]:.1%} right, {milliseconds:.1f} ms a step")

    network = networks["attention over neighbours"]
    q, k = network.heads(x, "w_q"), network.heads(x, "w_k")
    neighbours, weights = fastattn.top_keys(q, k, NEIGHBOURS, mask=edges)
    trusted = np.where(spam[neighbours], 0, weights).sum(axis=-1)[:, np.diff(edges.indptr) > 0]
    print(f"weight on neighbours that are no spam: {trusted.mean():.0%} of all")
    # The head, and the node, that tell spam apart best.
    head = trusted.mean(axis=-1).argmax()
    node = split[1][0]
    found = neighbours[head, node], weights[head, node]
    save_picture(
        given.output / "graph_classification.png", draw, curves, node, found, spam, classes
    )
    attention, mean = (curve[-1] for curve in curves.values())
    if not (attention > mean + 0.05 and trusted.mean() > 0.7):
        raise SystemExit("the attention has not learned whom to read")


if __name__ == "__main__":
    main()
