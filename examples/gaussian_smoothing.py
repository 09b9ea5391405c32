"""Attention by distance
=====================

Gaussian sums over a data set, and the kernel smoother that they become.

Every point attends to all others with weight ``exp(-alpha * distance**2)``. The sums as they are
come first, on three points; divided by their weights they are the Nadaraya-Watson estimate of a
curve from noisy measurements. How wide to look, which is what alpha says, the data tell by
themselves: each point is predicted from the others (`exclude_self`), and the alpha that does it
best is taken.

.. code-block:: sh

    pip install fastattn[plot]
    python examples/gaussian_smoothing.py           # a second
    python examples/gaussian_smoothing.py --short   # fewer points
"""

import numpy as np
from common import arguments, save_picture

import fastattn

DATA = np.array([[1, 2], [3, 4], [5, 6]])
SUMS = [[1.055, 2.073], [3.110, 4.147], [5.055, 6.073]]
NOISE = 0.4
ALPHAS = 2.0 ** np.arange(-3, 13)


def sums_over_the_data():
    """The three points, with themselves and without, as by the formula."""
    distance = np.square(DATA[:, None] - DATA).sum(axis=-1)
    grid = np.exp(-0.5 * distance)
    for exclude_self in (False, True):
        out = fastattn.gaussian(
            DATA, DATA, DATA, alpha=0.5, normalize=False, exclude_self=exclude_self
        )
        wanted = np.where(exclude_self & np.eye(3, dtype=bool), 0, grid) @ DATA
        print(f"sums {'without' if exclude_self else 'with'} the point itself:\n{out.round(3)}")
        if not np.allclose(out, wanted, rtol=1e-12):
            raise SystemExit(f"the formula says\n{wanted}")
        if not exclude_self and not np.array_equal(out.round(3), SUMS):
            raise SystemExit(f"the article's sums are\n{SUMS}")


def curve(x):
    return np.sin(x * x / 5)


def measure(points):
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 6, points))[:, None]
    return x, curve(x) + NOISE * rng.standard_normal(x.shape)


def error(found, wanted):
    return np.sqrt(np.mean((found - wanted) ** 2))


def choose_alpha(x, y):
    """The errors for each alpha: of points predicted from the others, and of the curve itself."""
    others = [
        error(fastattn.gaussian(x, x, y, alpha=alpha, exclude_self=True), y) for alpha in ALPHAS
    ]
    truth = [error(fastattn.gaussian(x, x, y, alpha=alpha), curve(x)) for alpha in ALPHAS]
    print("\n  alpha  each from the others  the curve itself")
    for row in zip(ALPHAS, others, truth, strict=True):
        print("{:7g} {:21.3f} {:17.3f}".format(*row))
    return np.array(others), np.array(truth)


def draw(pyplot, x, y, others, truth):
    best = others.argmin()
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.6), width_ratios=(2, 1), layout="constrained"
    )
    grid = np.linspace(0, 6, 500)[:, None]
    left.plot(x, y, ".", color="0.75", label="measured")
    left.plot(grid, curve(grid), "--", color="black", linewidth=1.2, zorder=3, label="the curve")
    shown = [
        (best - 5, "#56B4E9", "too wide"),
        (len(ALPHAS) - 1, "#E69F00", "too narrow"),
        (best, "#0072B2", "chosen"),
    ]
    for n, color, what in shown:
        smooth = fastattn.gaussian(grid, x, y, alpha=ALPHAS[n])
        left.plot(grid, smooth, color=color, linewidth=2.5 if n == best else 1.2,
                  label=f"alpha {ALPHAS[n]:g}, {what}")  # fmt: skip
        right.axvline(ALPHAS[n], color=color, linewidth=1)
    left.set(xlabel="x", ylabel="y")
    left.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    right.plot(ALPHAS, others, "o-", color="0.6", label="each from the others", markersize=4)
    right.plot(ALPHAS, truth, "o-", color="black", label="the curve itself", markersize=4)
    right.set(xlabel="alpha", ylabel="error (root mean square)", xscale="log", ylim=(0, None))
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def main():
    given = arguments(__doc__, "100 points instead of 300")
    sums_over_the_data()
    x, y = measure(100 if given.short else 300)
    others, truth = choose_alpha(x, y)
    best = others.argmin()
    print(f"\nchosen: alpha {ALPHAS[best]:g}; it leaves {truth[best] / NOISE:.0%} of the noise")
    save_picture(given.output / "gaussian_smoothing.png", draw, x, y, others, truth)
    if not truth[best] < NOISE / 2:
        raise SystemExit(f"an error of {truth[best]:.3f}, less than {NOISE / 2} wanted")


# %%
if __name__ == "__main__":
    main()
