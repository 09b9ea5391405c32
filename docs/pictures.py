"""The pictures of the guide, drawn by ``.. plot::`` when the pages are built."""

from __future__ import annotations

import re

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Rectangle

import fastattn

SEEN, HIDDEN, INK = "#0072B2", "#E8ECEF", "#333333"
HIGHLIGHT = "#E69F00"
CELL = 0.21  # inches


def masks(*options: str, n_queries: int = 8, n_keys: int = 8, batch: int = 1) -> None:
    """A picture for each call of `scaled_dot`: its options in words, and which keys they show.

    The squares are the weights of equal scores as fastattn returns them.
    """
    q, k = np.zeros((batch, 1, n_queries, 1)), np.zeros((batch, 1, n_keys, 1))
    names = {"np": np, "document_spans": fastattn.document_spans}
    names |= {"i": np.arange(n_queries)[:, None], "j": np.arange(n_keys)}
    for text in options:
        words = eval(f"dict({text})", names)
        _, weights = fastattn.scaled_dot(q, k, k, return_weights=True, **words)
        for b in range(batch):
            squares(weights[b, 0], text if batch == 1 else f"sequence {b}")


def alibi() -> None:
    """The weights of equal scores under three slopes."""
    slopes = [0.0, 0.25, 1.0]
    x = np.zeros((3, 8, 1))
    _, weights = fastattn.scaled_dot(x, x, x, causal=True, alibi=slopes, return_weights=True)
    for slope, shown in zip(slopes, weights, strict=True):
        squares(shown, f"alibi[h] = {slope}", shades="Blues")


def squares(weights: np.ndarray, title: str, shades: str | None = None) -> None:
    """One square for each query (row) and key (column), dark if it is seen or by its weight."""
    title = re.sub(r", (?=\w+=)", ",\n", title)
    n, m = weights.shape
    left, below, above = 0.45, 0.45, 0.2 + 0.16 * title.count("\n")  # inches, beside the squares
    width, height = left + m * CELL + 0.15, below + n * CELL + above
    figure = pyplot.figure(figsize=(width, height))
    ax = figure.add_axes((left / width, below / height, m * CELL / width, n * CELL / height))
    seen = weights > 0
    ax.imshow(seen, cmap=ListedColormap([HIDDEN, SEEN]), vmin=0, vmax=1)
    if shades is not None:
        ax.imshow(np.where(seen, weights, np.nan), cmap=shades, vmin=0, vmax=1)
    ax.set_xticks(np.arange(m + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0, labelsize=8, colors=INK)
    ax.set_xticks([0, m - 1])
    ax.set_yticks([0, n - 1])
    ax.set_xlabel("key $j$", fontsize=9, color=INK)
    ax.set_ylabel("query $i$", fontsize=9, color=INK)
    ax.spines[:].set_visible(False)
    figure.text(0.5, 1 - 0.04 / height, title, ha="center", va="top", fontsize=7.5, color=INK,
                family="monospace")  # fmt: skip


def thumbnail(path) -> None:
    """For the examples that draw nothing: a causal mask."""
    figure = pyplot.figure(figsize=(4, 2.8))
    ax = figure.add_axes((0, 0.1, 1, 0.8))
    ax.imshow(np.tri(6), cmap=ListedColormap([HIDDEN, SEEN]))
    ax.set_xticks(np.arange(7) - 0.5, minor=True)
    ax.set_yticks(np.arange(7) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.set_axis_off()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def loop_nest() -> None:
    """Blocks of queries and of keys, and what is kept for each row of the block at work."""
    _, ax = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    blocks_q, blocks_k, row, column = 4, 6, 1, 3
    for i in range(blocks_q):
        for j in range(blocks_k):
            hidden = j > i + 2
            done = i < row or (i == row and j < column)
            color = "white" if hidden else "#BFD9EA" if done else HIDDEN
            if (i, j) == (row, column):
                color = HIGHLIGHT
            ax.add_patch(Rectangle((j, -i), 1, -1, facecolor=color, edgecolor="#9AA5AD", lw=1,
                                   linestyle=":" if hidden else "-"))  # fmt: skip
    ax.text(column + 0.5, -row - 0.5, "score\nblock", ha="center", va="center", fontsize=9)
    box(ax, column - 0.4, 0.3, 1.8, 0.65, "k and v block\n(block_k keys)", HIGHLIGHT)
    box(ax, -1.65, -row - 1, 1.3, 1, "q block\n(block_q\nqueries)", HIGHLIGHT)
    for place, name in enumerate(("row_max", "row_sum", "out")):
        box(ax, blocks_k + 0.35 + 1.3 * place, -row - 1, 1.2, 1, name, HIGHLIGHT)
    ax.text(blocks_k + 2.25, -row - 1.15, "kept for each query of the block", ha="center", va="top",
            fontsize=9, color=INK)  # fmt: skip
    ax.text(blocks_k + 0.35, -0.4, "dotted: hidden by the mask,\nneither read nor computed",
            fontsize=9, va="center", color=INK)  # fmt: skip
    arrow(ax, (0, -blocks_q - 0.3), (blocks_k, -blocks_q - 0.3))
    ax.text(blocks_k / 2, -blocks_q - 0.42, "inner loop: blocks of keys, in order", ha="center",
            va="top", fontsize=10, color=INK)  # fmt: skip
    arrow(ax, (-1.95, 0), (-1.95, -blocks_q))
    ax.text(-2.1, -blocks_q / 2, "outer loop: blocks of queries,\nshared out among threads",
            ha="right", va="center", rotation=90, fontsize=10, color=INK)  # fmt: skip
    ax.set_xlim(-2.9, blocks_k + 4.3)
    ax.set_ylim(-blocks_q - 0.95, 1.05)
    ax.set_axis_off()


def box(ax, x, y, width, height, text, color) -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=color, lw=2))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(ax, start, stop) -> None:
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=14, color=INK))
