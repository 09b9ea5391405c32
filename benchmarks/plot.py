"""Pictures of a ranking: ``python benchmarks/plot.py benchmarks/results/NAME.json``.

The file is what ``python -m fastattn bench --case '*' --json FILE`` writes; the pictures go beside
it: NAME-time.png, NAME-memory.png, and of the cases that were measured NAME-ranking.png,
NAME-half.png, NAME-decode.png, NAME-backward.png, NAME-integrations.png and NAME-models.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from fastattn.bench.report import duration

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker for each.
STYLES = {
    "fastattn-cython": ("#D55E00", "o"),
    "fastattn-numba": ("#CC79A7", "D"),
    "fastattn-numpy": ("#E69F00", "s"),
    "fastattn-jax": ("#D55E00", "o"),
    "torch": ("#0072B2", "^"),
    "onnxruntime": ("#009E73", "v"),
    "openvino": ("#56B4E9", "P"),
    "jax": ("#999999", "X"),
    "numpy-formula": ("#000000", "*"),
}
LENGTHS = [2**power for power in range(7, 15)]
BARS = {
    "ranking": ("4096", "4096-causal", "d128"),
    "half": ("bfloat16", "bfloat16-d128", "float16"),
    "decode": ("decode", "decode-grouped", "decode-bfloat16"),
    "backward": ("backward", "backward-d128", "backward-bfloat16"),
    "integrations": ("integrations-jax", "integrations-jax-training"),
}

# Whose peak is that of multiply-adds; that of tiles of half precision is ten times as far.
FMA_TYPES = ("float32", "float64")

Rankings = dict[str, dict[str, Any]]


def main(path: Path) -> None:
    """Draw all pictures of one file."""
    data = json.loads(path.read_text())
    rankings = {r["name"]: r for r in data["rankings"] if "tokens" not in r}
    models = {r["name"]: r for r in data["rankings"] if "tokens" in r}
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    pictures = {"time": times(rankings), "memory": memory(rankings)}
    for name, cases in BARS.items():
        if shown := [rankings[case] for case in cases if case in rankings]:
            pictures[name] = bars(shown)
    if models:
        pictures["models"] = model_bars(models)
    for name, figure in pictures.items():
        shown = models if name == "models" else rankings
        figure.text(0.01, 0.01, caption(data, shown), fontsize=7.5, color="0.35")
        target = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(target, dpi=160)
        print(target)


def caption(data: dict[str, Any], rankings: Rankings) -> str:
    """The machine and the conditions, and who took part, in two lines."""
    machine = data["machine"]
    versions = {
        entry["name"]: entry["version"]
        for ranking in rankings.values()
        for entry in ranking["entries"]
        if not entry["ours"]
    }
    return (
        f"{machine['cpu']}, {data['threads']} threads, {data['instruction set']}, "
        f"{machine['system']}, {data['date']}; medians of {data['repeat']} interleaved rounds\n"
        f"fastattn {data['fastattn']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def times(rankings: Rankings):
    """Time against length above, the rate that it means below; plain and causal."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 8.5), sharey="row", layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    for column, suffix, title in zip(panels.T, ("", "-causal"), ("plain", "causal"), strict=True):
        for name in candidates(rankings):
            line(column[0], name, points(rankings, suffix, name, "median", 1e3))
            line(column[1], name, points(rankings, suffix, name, "flops per second", 1e-9))
        length_axis(column[0], f"(1, 8, length, 64) float32, {title}")
        column[0].set_yscale("log")
        length_axis(column[1], "")
        column[1].set_ylim(bottom=0)
    panels[0, 0].set_ylabel("time in ms")
    panels[1, 0].set_ylabel("GFLOP/s")
    panels[0, 0].legend(frameon=False)
    return figure


def memory(rankings: Rankings):
    """Memory beyond inputs and result against length."""
    figure, axes = plt.subplots(figsize=(6.5, 5), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    for name in candidates(rankings):
        line(axes, name, points(rankings, "", name, "memory", 2.0**-20))
    lengths = [n for n in LENGTHS if str(n) in rankings]
    axes.plot(lengths, [4 * 8 * n * 64 * 4 / 2**20 for n in lengths], ":", color="0.5", lw=1.5,
              label="inputs and result")  # fmt: skip
    length_axis(axes, "(1, 8, length, 64) float32, plain")
    axes.set_yscale("log")
    axes.set_ylabel("peak memory beyond inputs and result, MiB")
    axes.legend(frameon=False)
    return figure


def bars(shown: list[dict[str, Any]]):
    """The rate in some cases, fastest on top, below the machine's own limit."""
    height = 1 + 0.3 * max(len(ranking["entries"]) for ranking in shown)
    figure, panels = plt.subplots(
        1, len(shown), figsize=(10, height), squeeze=False, layout="constrained"
    )
    caption_share = 0.4 / height
    figure.get_layout_engine().set(rect=(0, caption_share, 1, 1 - caption_share))
    for axes, ranking in zip(panels[0], shown, strict=True):
        rate, unit, limit = (
            ("bytes per second", "GB/s", "read bandwidth")
            if ranking["decodes"]
            else ("flops per second", "GFLOP/s", "FMA peak")
        )
        entries = ranking["entries"][::-1]
        rates = [entry[rate] / 1e9 for entry in entries]
        names = [entry["name"] for entry in entries]
        drawn = axes.barh(names, rates, color=[style(n)[0] if ours(n) else "0.7" for n in names])
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(drawn, fmt="%.0f", padding=4, bbox=white)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if ours(label.get_text()) else "normal")
        axes.set_title(ranking["case"], loc="right", fontsize=10, fontweight="bold")
        axes.set_xlabel(unit)
        axes.set_xlim(0, 1.25 * max(rates))
        if ranking["decodes"] or ranking["dtype"] in FMA_TYPES:
            peak = ranking["peak"] / 1e9
            axes.axvline(peak, color="0.3", ls="--", lw=1, zorder=1)
            axes.set_xlim(0, 1.15 * max(peak, *rates))
            axes.set_xlabel(f"{unit} ({limit}: {peak:.0f})")
    return figure


def model_bars(rankings: Rankings):
    """The time of whole models with each kind of attention, the fastest on top."""
    figure, panels = plt.subplots(
        len(rankings), 1, figsize=(7, 1.3 * len(rankings) + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    for axes, ranking in zip(panels[:, 0], rankings.values(), strict=True):
        entries = ranking["entries"][::-1]
        names = [entry["name"] for entry in entries]
        colors = [style("fastattn-cython")[0] if ours(n) else "0.7" for n in names]
        drawn = axes.barh(names, [1e3 * entry["median"] for entry in entries], color=colors)
        axes.bar_label(drawn, [duration(entry["median"]) for entry in entries], padding=4)
        axes.set_title(ranking["case"], loc="left", fontsize=10)
        axes.set_xlim(0, 1.2e3 * entries[0]["median"])
        axes.set_xticks([])
    return figure


def candidates(rankings: Rankings) -> list[str]:
    """The names, in the order of the legend: ours, then the others."""
    called = [r for r in rankings.values() if not (r.get("inside") or r.get("function"))]
    found = {e["name"] for ranking in called for e in ranking["entries"]}
    return [*(n for n in STYLES if n in found), *sorted(found - STYLES.keys())]


def points(rankings: Rankings, suffix: str, name: str, what: str, unit: float):
    """``[(length, value)]`` of one candidate, where it was measured."""
    return [
        (length, entry[what] * unit)
        for length in LENGTHS
        for entry in rankings.get(f"{length}{suffix}", {}).get("entries", ())
        if entry["name"] == name and entry[what]
    ]


def line(axes, name: str, values) -> None:
    """One candidate's line; ours is thick and on top."""
    color, marker = style(name)
    axes.plot(*zip(*values, strict=True) if values else ([], []), color=color, marker=marker,
              markersize=5, lw=2.8 if ours(name) else 1.2, zorder=3 if ours(name) else 2,
              label=name)  # fmt: skip


def length_axis(axes, title: str) -> None:
    """Lengths along x, each power of two its tick."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("queries = keys")
    axes.grid(color="0.9")


def ours(name: str) -> bool:
    return name.startswith("fastattn")


def style(name: str) -> tuple[str, str]:
    return STYLES.get(name, ("#F0E442", "h"))


if __name__ == "__main__":
    for argument in sys.argv[1:] or sys.exit(__doc__):
        main(Path(argument))
