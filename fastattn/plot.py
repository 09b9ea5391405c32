"""Pictures of attention, with matplotlib: what was attended to, given as an array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .core.arguments import count, flag, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention", "heads", "importance", "neighbourhood"]

# From paper to ink in one hue: the same in print and to colour-blind eyes.
COLORMAP = "Blues"
COLOR, LEVEL = "#0072B2", "#E69F00"  # blue and orange of Okabe and Ito's colours
# The heaviest line of a neighbourhood, in points.
WIDEST_LINE = 7.0
# Heights of its letters that a label takes up along an axis, and the width of one letter.
LINE, LETTER = 1.3, 0.6
# Where one side is that many times the other, cells need not be squares.
OBLONG = 4
# The side of one head's picture in inches, and how many stand in a row.
SIDE, ACROSS = 2.2, 4


def attention(weights, queries=None, keys=None, *, ax=None, colorbar=True, **options) -> Axes:
    """Draw attention weights: a row per query, a column per key, the darker the heavier.

    Parameters
    ----------
    weights : array_like, (rows, columns)
        Of one head: `weights` of any function of fastattn, or a map that
        `fastattn.attention_map` made of a long attention. `heads` draws those of a layer.
    queries : sequence of str or int, optional
        Labels, one a row, of which as many are shown as there is room for; or how many queries the
        rows stand for, if each is the summary of several. As many as there are rows by default.
    keys : sequence of str or int, optional
        The same for the columns.
    ax : matplotlib.axes.Axes, optional
        Drawn on; those of a new figure by default.
    colorbar : bool, default True
        Draw the scale of the weights beside it.
    **options
        Of `matplotlib.axes.Axes.imshow`: ``vmax=1`` to compare pictures, ``norm="log"`` for
        weights of very different sizes. The scale begins at 0 by default, and hidden keys, whose
        weight is 0, look like paper.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    ImportError
        Without matplotlib, which ``pip install 'fastattn[plot]'`` brings.
    TypeError, ValueError
        The message begins with the argument's name.

    Examples
    --------
    >>> import fastattn
    >>> from fastattn import plot
    >>> words = ["the", "cat", "sat"]
    >>> x = [[1, 0], [0, 3], [2, 2]]
    >>> out, weights = fastattn.scaled_dot(x, x, x, return_weights=True)
    >>> ax = plot.attention(weights, words, words)
    >>> ax.figure.savefig("cat.png")  # doctest: +SKIP
    """
    weights = _numbers("weights", weights, 2)
    rows, columns = (
        _Axis(name, value, length)
        for name, value, length in zip(
            ("queries", "keys"), (queries, keys), weights.shape, strict=True
        )
    )
    colorbar = flag("colorbar", colorbar)
    ax = _axes(ax)
    n, m = rows.length, columns.length
    defaults: dict[str, Any] = {
        "cmap": COLORMAP,
        "aspect": "equal" if max(n, m) <= OBLONG * min(n, m) else "auto",
    }
    if "norm" not in options:
        defaults["vmin"] = 0
    image = ax.imshow(weights, extent=(-0.5, m - 0.5, n - 0.5, -0.5), **defaults | options)
    rows.label(ax.yaxis, "query")
    columns.label(ax.xaxis, "key")
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, label="weight")
        bar.outline.set_visible(False)
    return ax


def heads(weights, queries=None, keys=None, *, titles=None, colorbar=True, **options) -> Figure:
    """Draw the attention weights of all heads of a layer in one figure, on one scale.

    Parameters
    ----------
    weights : array_like, (heads, rows, columns)
        Of one sequence: `weights` of any function of fastattn, or maps that
        `fastattn.attention_map` made of a long attention.
    queries, keys : sequence of str or int, optional
        As of `attention`.
    titles : sequence of str, optional
        One a head; ``head 0`` and so on by default.
    colorbar : bool, default True
        Draw the scale of the weights beside them.
    **options
        As of `attention`. The scale ends at the largest of all weights by default.

    Returns
    -------
    matplotlib.figure.Figure
        Its first axes are those of the heads, in order.

    Raises
    ------
    ImportError
        Without matplotlib, which ``pip install 'fastattn[plot]'`` brings.
    TypeError, ValueError
        The message begins with the argument's name.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> layer = fastattn.MultiHeadAttention(16, 8, rng=0)
    >>> out, weights = layer(np.eye(16), return_weights=True)
    >>> figure = fastattn.plot.heads(weights)
    >>> figure.axes[7].get_title()
    'head 7'
    """
    weights = _numbers("weights", weights, 3)
    names = [f"head {n}" for n in range(len(weights))] if titles is None else list(titles)
    if len(names) != len(weights):
        raise ValueError(f"titles: expected {len(weights)}, got {len(names)}")
    colorbar = flag("colorbar", colorbar)
    across = min(ACROSS, len(weights))
    down = -(-len(weights) // across)
    figure = _pyplot().figure(figsize=(SIDE * across + 0.6, SIDE * down), layout="constrained")
    options = _common_scale(weights, options)
    for n, (shown, name) in enumerate(zip(weights, names, strict=True)):
        ax = figure.add_subplot(down, across, n + 1)
        attention(shown, queries, keys, ax=ax, colorbar=False, **options)
        ax.set_title(name, fontsize="medium")
        if n % across:
            ax.tick_params(labelleft=False)
            ax.set_ylabel("")
        if n + across < len(weights):
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
    if colorbar:
        bar = figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="weight", shrink=0.7)
        bar.outline.set_visible(False)
    return figure


def importance(values, keys=None, *, ax=None, **options) -> Axes:
    """Draw how much attention each key gets as bars, and what it would get were all alike.

    Parameters
    ----------
    values : array_like, (keys,)
        Of one head: of `fastattn.key_importance`, a row of weights, or those of `fastattn.pool`.
    keys : sequence of str or int, optional
        Labels, one a bar, of which as many are shown as there is room for; or how many keys the
        bars stand for. As many as there are bars by default.
    ax : matplotlib.axes.Axes, optional
        Drawn on; those of a new figure by default.
    **options
        Of `matplotlib.axes.Axes.stairs`: ``facecolor``, ``edgecolor``, ``label``, ...

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    ImportError
        Without matplotlib, which ``pip install 'fastattn[plot]'`` brings.
    TypeError, ValueError
        The message begins with the argument's name.

    Examples
    --------
    >>> import fastattn
    >>> from fastattn import plot
    >>> x = [[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]]
    >>> pooled, weights = fastattn.pool(x, [0.0, 1.0], return_weights=True)
    >>> ax = plot.importance(weights, ["the", "cat", "sat"])
    >>> ax.get_ylabel()
    'weight'
    """
    values = _numbers("values", values, 1)
    columns = _Axis("keys", keys, len(values))
    ax = _axes(ax)
    # One outline with gaps: as sharp for four bars as it is quick for a hundred thousand. Its line
    # keeps a bar in sight that is narrower than a dot of the picture.
    bars = np.full(2 * len(values) - 1, np.nan)
    bars[::2] = values
    width = columns.length / len(values)
    middles = (np.arange(len(values)) + 0.5) * width - 0.5
    edges = (middles[:, None] + [-0.4 * width, 0.4 * width]).reshape(-1)
    defaults = {"facecolor": COLOR, "edgecolor": COLOR, "fill": True, "linewidth": 0.8}
    ax.stairs(bars, edges, **defaults | options)
    ax.axhline(values.mean(), color=LEVEL, linewidth=1.2, linestyle="--")
    ax.set_xlim(-0.5, columns.length - 0.5)
    ax.set_ylabel("weight")
    ax.spines[["top", "right"]].set_visible(False)
    columns.label(ax.xaxis, "key")
    return ax


def neighbourhood(node, neighbours, weights, *, ax=None, **options) -> Axes:
    """Draw what one node of a graph attends to: its neighbours around it, the wider the heavier.

    Parameters
    ----------
    node : str or int
        Label of the node.
    neighbours : sequence of str or int
        Labels of its neighbours: the keys that a row of `fastattn.top_keys` names, or the indices
        of a row of a CSR mask. Integers less than 0 stand for none, and are left out.
    weights : array_like, (neighbours,)
        Theirs.
    ax : matplotlib.axes.Axes, optional
        Drawn on; those of a new figure by default.
    **options
        Of `matplotlib.axes.Axes.plot`, for the lines: ``color``, ``alpha``, ...

    Returns
    -------
    matplotlib.axes.Axes
        Where it is drawn.

    Raises
    ------
    ImportError
        Without matplotlib, which ``pip install 'fastattn[plot]'`` brings.
    TypeError, ValueError
        The message begins with the argument's name.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> from fastattn import plot
    >>> x = np.random.default_rng(0).standard_normal((30, 4))
    >>> neighbours, weights = fastattn.top_keys(x, x, 8)
    >>> ax = plot.neighbourhood("node 7", neighbours[7], weights[7])
    """
    weights = _numbers("weights", weights, 1)
    names = list(neighbours)
    if len(names) != len(weights):
        raise ValueError(f"neighbours: expected {len(weights)} labels, got {len(names)}")
    there = [n for n, name in enumerate(names) if isinstance(name, str) or name >= 0]
    weights, names = weights[there], [str(names[n]) for n in there]
    ax = _axes(ax)
    widest = weights.max(initial=0) or 1.0
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(names)) / max(1, len(names))
    defaults: dict[str, Any] = {"color": COLOR, "solid_capstyle": "round"}
    for name, weight, angle in zip(names, weights, angles, strict=True):
        x, y = np.cos(angle), np.sin(angle)
        width = {"linewidth": 0.5 + WIDEST_LINE * weight / widest}
        ax.plot([0.3 * x, x], [0.2 * y, y], **defaults | width | options)
        side = "left" if x > 0.1 else "right" if x < -0.1 else "center"
        level = "center" if abs(y) < 0.9 else "bottom" if y > 0 else "top"
        label = f"{name}\n{weight:.2f}"
        ax.text(1.08 * x, 1.08 * y, label, ha=side, va=level, fontsize="small")
    ax.text(0, 0, str(node), ha="center", va="center", weight="bold")
    ax.set(xlim=(-1.7, 1.7), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_axis_off()
    return ax


class _Axis:
    """The positions along one side of a picture, 0 to ``length - 1``, and what they are called."""

    def __init__(self, name, value, cells: int):
        self.labels: list[str] | None = None
        self.length = cells
        if value is None:
            return
        if isinstance(value, (str, bytes)):
            raise TypeError(f"{name}: expected a sequence of strings or an int, got one string")
        if np.ndim(value) == 0:
            self.length = count(name, value)
            if self.length < cells:
                raise ValueError(f"{name}: expected at least {cells} positions, got {self.length}")
            return
        self.labels = [str(label) for label in value]
        if len(self.labels) != cells:
            raise ValueError(f"{name}: expected {cells} labels, got {len(self.labels)}")

    def label(self, axis, title: str) -> None:
        """Name the positions of a matplotlib axis, at any time as many as it has room for."""
        from matplotlib import ticker

        axis.set_label_text(title)
        names = self.labels or [str(self.length - 1)]
        size = LINE
        if axis.axis_name == "x":
            width = max(map(len, names)) * LETTER + 1
            if self.labels and width * self.length > _room(axis):
                axis.set_tick_params(rotation=90)
            else:
                size = width

        class Fitting(ticker.MaxNLocator):
            def __call__(self):
                self.set_params(nbins=max(1, int(_room(axis) / size)))
                return super().__call__()

        def name(position, _=None):
            n = round(position)
            return (self.labels[n] if self.labels else str(n)) if 0 <= n < self.length else ""

        axis.set_major_locator(Fitting(integer=True, min_n_ticks=1))
        axis.set_major_formatter(name)


def _room(axis) -> float:
    """The length of a matplotlib axis, in heights of its letters."""
    extent = axis.axes.get_window_extent()
    dots = extent.width if axis.axis_name == "x" else extent.height
    letter = axis.get_major_ticks(1)[0].label1.get_fontsize()
    return max(1.0, dots * 72 / axis.axes.figure.dpi / letter)


def _numbers(name: str, value, axes: int) -> np.ndarray:
    """`value` as float64 with that many axes and none of length 0, or an error that names it."""
    x = plain(name, value)
    if x.dtype.kind not in "biuf" and x.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.ndim != axes or x.size == 0:
        expected = ("(keys,) of one head", "(rows, columns) of one head", "(heads, rows, columns)")
        raise ValueError(f"{name}: expected shape {expected[axes - 1]}, not empty, got {x.shape}")
    return x.astype(np.float64)


def _common_scale(weights: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of imshow with which pictures of all `weights` can be compared."""
    norm = options.get("norm")
    if norm is not None and not isinstance(norm, str):
        norm.autoscale_None(weights)
        return options
    least = 0.0 if norm is None else np.min(weights, where=weights > 0, initial=np.inf)
    return {"vmin": least, "vmax": np.nanmax(weights), **options}


def _axes(ax) -> Axes:
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def _pyplot():
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(
            "fastattn.plot needs matplotlib: pip install 'fastattn[plot]'", name="matplotlib"
        ) from None
    return pyplot
