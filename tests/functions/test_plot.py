"""The pictures of `fastattn.plot`: what is drawn, where, and what it is called."""

import sys

import numpy as np
import pytest

import fastattn
from fastattn import plot

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(9), 9)


@pytest.fixture(autouse=True)
def pyplot():
    """Closes the figures, too: twenty open ones make matplotlib warn."""
    matplotlib = pytest.importorskip("matplotlib", reason="fastattn.plot draws with matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def labels(axis):
    """Those within the picture, by position, as they are drawn."""
    axis.axes.figure.draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return {float(at): label.get_text() for at, label in ticks if low <= at <= high}


def test_attention_shows_the_weights(pyplot):
    _, ax = pyplot.subplots()
    assert plot.attention(WEIGHTS[:4], WORDS[:4], WORDS, ax=ax) is ax
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), WEIGHTS[:4])
    assert image.get_extent() == [-0.5, 8.5, 3.5, -0.5]  # first query on top, first key to the left
    assert image.norm.vmin == 0
    assert labels(ax.yaxis) == dict(enumerate(WORDS[:4]))
    assert labels(ax.xaxis) == dict(enumerate(WORDS))
    assert len(ax.figure.axes) == 2  # its scale


def test_attention_without_labels():
    ax = plot.attention(WEIGHTS.astype(np.float32), colorbar=False, vmax=1)
    assert ax.images[0].norm.vmax == 1
    assert all(text == f"{at:g}" and at in range(9) for at, text in labels(ax.xaxis).items())
    assert len(ax.figure.axes) == 1


def test_map_of_a_long_attention():
    """Cells that are summaries lie where their queries and keys are."""
    ax = plot.attention(WEIGHTS, 16384, 2000, norm="log")
    assert ax.images[0].get_extent() == [-0.5, 1999.5, 16383.5, -0.5]
    assert max(labels(ax.yaxis)) > 10000
    assert ax.get_aspect() == "auto"  # squares would leave a thread


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_attention_of_one_row_or_column(shape):
    ax = plot.attention(
        np.ones(shape), *([f"token {n}" for n in range(length)] for length in shape)
    )
    for axis, length in zip((ax.yaxis, ax.xaxis), shape, strict=True):
        found = labels(axis)
        assert found[0] == "token 0"
        assert len(found) < 40
        assert len(found) > 5 or length == 1


@pytest.mark.parametrize("inches", [2, 4, 8])
def test_labels_do_not_overlap(pyplot, inches):
    tokens = [f"token {n}" for n in range(100)]
    _, axes = pyplot.subplots(1, 3, figsize=(3 * inches, inches), layout="constrained")
    plot.attention(np.eye(100), tokens, tokens, ax=axes[0])
    plot.importance(np.arange(100), tokens, ax=axes[1])
    plot.importance(np.arange(100), 1234567, ax=axes[2])
    for axis in (axes[0].yaxis, axes[0].xaxis, axes[1].xaxis, axes[2].xaxis):
        shown = labels(axis)
        names = range(1234567) if axis.axes is axes[2] else tokens
        assert all(text == str(names[int(at)]) for at, text in shown.items())
        boxes = [x.get_window_extent() for x in axis.get_majorticklabels()]
        assert len(boxes) >= 3
        assert not any(a.overlaps(b) for a, b in zip(boxes[1:], boxes, strict=False))


def test_heads_of_a_layer_on_one_scale():
    weights = np.random.default_rng(0).dirichlet(np.ones(9), (6, 9))
    figure = fastattn.plot.heads(weights, WORDS, WORDS, titles=list("abcdef"))
    *panels, bar = figure.axes
    for shown, ax, title in zip(weights, panels, "abcdef", strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), shown)
        assert ax.images[0].get_clim() == (0, weights.max())
        assert ax.get_title() == title
    assert bar.get_ylabel() == "weight"
    # Names stand to the left and below each column, and nowhere else.
    assert [bool(ax.get_ylabel()) for ax in panels] == [True, False, False, False, True, False]
    assert [bool(ax.get_xlabel()) for ax in panels] == [False, False, True, True, True, True]


def test_heads_on_a_logarithmic_scale():
    weights = np.random.default_rng(0).dirichlet(np.ones(9), (3, 9))
    weights[0, 0, 0] = 0
    clims = {ax.images[0].get_clim() for ax in plot.heads(weights, norm="log").axes[:3]}
    assert clims == {(weights[weights > 0].min(), weights.max())}


def test_importance_shows_the_values():
    values = WEIGHTS.sum(axis=0)
    ax = plot.importance(values, WORDS, label="all queries")
    (bars,) = ax.patches
    heights, edges, _ = bars.get_data()
    np.testing.assert_array_equal(heights[::2], values)
    np.testing.assert_allclose((edges[::2] + edges[1::2]) / 2, range(9), atol=1e-12)
    assert ax.get_xlim() == (-0.5, 8.5)
    assert labels(ax.xaxis) == dict(enumerate(WORDS))
    assert ax.lines[0].get_ydata()[0] == pytest.approx(values.mean())


def test_importance_of_many_keys():
    """One key among many stays in sight, and each bar lies where its keys are."""
    values = np.full(20000, 0.01)
    values[5000] = 1
    ax = plot.importance(values)
    ax.set_axis_off()
    ax.figure.set_layout_engine("none")
    ax.set_position([0, 0, 1, 1])
    ax.figure.canvas.draw()
    picture = np.asarray(ax.figure.canvas.buffer_rgba())
    rows, columns = picture.shape[:2]
    dark = (picture[: rows // 2, :, :3].sum(axis=-1) < 500).any(axis=0)
    assert dark.any()
    assert np.flatnonzero(dark) == pytest.approx(columns / 4, abs=2)
    ax = plot.importance(values[:100], 1000)
    _, edges, _ = ax.patches[0].get_data()
    np.testing.assert_allclose([edges[0], edges[-1]], [0.5, 998.5])


def test_arrays_are_those_of_fastattn():
    x = np.random.default_rng(1).standard_normal((9, 4), np.float32)
    _, weights = fastattn.scaled_dot(x, x, x, causal=True, return_weights=True)
    plot.attention(weights, WORDS, WORDS)
    _, weights = fastattn.pool(x, np.ones(4, np.float32), return_weights=True)
    plot.importance(weights, WORDS)
    plot.attention([[1, 0], [0, 1]])


@pytest.mark.parametrize("values", [[0, 0], [np.nan, 1], [np.nan, np.nan], [np.inf, 1]], ids=str)
def test_odd_values_can_be_drawn(values):
    for ax in (plot.attention([values]), plot.importance(values)):
        ax.figure.canvas.draw()


def test_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes", reason="bfloat16 is a dtype of theirs").bfloat16
    ax = plot.attention(np.eye(2, dtype=bfloat16))
    np.testing.assert_array_equal(ax.images[0].get_array(), np.eye(2))


@pytest.mark.parametrize("call, error, message", [
    (lambda: plot.attention(np.ones((2, 3, 3))), ValueError,
     r"weights: expected shape \(rows, columns\) of one head, .*, got \(2, 3, 3\)"),
    (lambda: plot.attention(np.ones((0, 3))), ValueError, r"weights: expected .*, got \(0, 3\)"),
    (lambda: plot.attention(np.ones((3, 3), complex)), TypeError, "weights: .* got complex128"),
    (lambda: plot.attention(WEIGHTS, WORDS[1:]), ValueError, "queries: expected 9 labels, got 8"),
    (lambda: plot.attention(WEIGHTS, None, WORDS * 2), ValueError, "keys: .* got 18"),
    (lambda: plot.attention(WEIGHTS, 8), ValueError, "queries: expected at least 9 .*, got 8"),
    (lambda: plot.attention(WEIGHTS, 9.0), TypeError, "queries: expected an integer, got float"),
    (lambda: plot.attention(WEIGHTS, "thequickb"), TypeError, "queries: .* got one string"),
    (lambda: plot.attention(WEIGHTS, colorbar=1), TypeError, "colorbar: expected bool, got int"),
    (lambda: plot.importance(WEIGHTS), ValueError, r"values: expected .*\(keys,\).*, got \(9, 9\)"),
    (lambda: plot.importance([]), ValueError, r"values: expected .*, got \(0,\)"),
    (lambda: plot.importance(WEIGHTS[0], WORDS[1:]), ValueError, "keys: expected 9 labels, got 8"),
])  # fmt: skip
def test_errors(call, error, message, pyplot):
    with pytest.raises(error, match="^" + message):
        call()
    assert not pyplot.get_fignums()


def test_matplotlib_is_imported_when_used(run_python):
    program = "import sys, fastattn.plot; print('matplotlib' in sys.modules)"
    assert run_python(program).strip() == "False"


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[plot\]'"):
        plot.attention(WEIGHTS)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[plot\]'"):
        plot.importance(WEIGHTS[0])


class TestNeighbourhood:
    def test_lines_are_as_wide_as_weights_are_heavy(self):
        ax = plot.neighbourhood("node", ["a", "b", "c"], [0.1, 0.6, 0.3])
        widths = [line.get_linewidth() for line in ax.lines]
        assert widths[1] > widths[2] > widths[0] > 0
        assert [text.get_text() for text in ax.texts] == ["a\n0.10", "b\n0.60", "c\n0.30", "node"]

    def test_what_top_keys_has_not_found_is_left_out(self):
        ax = plot.neighbourhood(3, np.array([4, 7, -1]), [0.6, 0.4, 0.0])
        assert [text.get_text() for text in ax.texts] == ["4\n0.60", "7\n0.40", "3"]

    def test_a_node_without_neighbours(self):
        assert not plot.neighbourhood(3, [-1], [0.0]).lines

    def test_errors(self):
        with pytest.raises(ValueError, match=r"^neighbours: expected 2 labels, got 1"):
            plot.neighbourhood(0, ["a"], [0.5, 0.5])
