"""Pictures of a ranking: ``python benchmarks/plot.py benchmarks/results/NAME.json``.

The file is what ``python -m fastattn bench --case '*' --json FILE`` writes; the pictures go beside
it, of the cases that were measured: NAME-time.png, NAME-memory.png, NAME-ranking.png,
NAME-half.png, NAME-decode.png, NAME-backward.png, NAME-options.png, NAME-options-backward.png,
NAME-documents.png, NAME-graph.png, NAME-tangents.png, NAME-integrations.png and NAME-models.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt

from fastattn.bench.report import duration

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker for each.
STYLES = {
    "fastattn-cython": ("#D55E00", "o"),
    "fastattn-numba": ("#CC79A7", "D"),
    "fastattn-numpy": ("#E69F00", "s"),
    "fastattn-jax": ("#D55E00", "o"),
    "fastattn": ("#D55E00", "o"),
    "torch": ("#0072B2", "^"),
    "onnxruntime": ("#009E73", "v"),
    "onnxruntime-attention": ("#009E73", "<"),
    "onnxruntime-gqa": ("#009E73", ">"),
    "openvino": ("#56B4E9", "P"),
    "jax": ("#999999", "X"),
    "numpy-formula": ("#000000", "*"),
    "numpy-gather": ("#000000", "*"),
    "torch-formula": ("#0072B2", "^"),
    "torch-sparse": ("#0072B2", "^"),
    "torch-packed": ("#0072B2", "^"),
}
LENGTHS = [2**power for power in range(7, 15)]
BARS = {
    "ranking": ("4096", "4096-causal", "d128"),
    "half": ("bfloat16", "bfloat16-d128", "float16"),
    "decode": ("decode", "decode-grouped", "decode-bfloat16"),
    "backward": ("backward", "backward-d128", "backward-bfloat16"),
    "options": ("dropout", "relative-bias", "return-max"),
    "options-backward": ("dropout-backward", "relative-bias-backward", "flex-documents-backward"),
    "documents": ("packed", "packed-causal", "flex-documents"),
    "graph": ("graph", "graph-backward"),
    "tangents": ("jvp-of-q", "jvp"),
    "integrations": ("integrations-jax", "integrations-jax-training"),
}

# What the candidates and the axes are called.
NAMES = {"numpy-formula": "plain NumPy", "jax": "JAX"}
LENGTH = "sequence length (queries and keys)"
RATE, MEMORY = "GFLOP/s, more is better", "MiB beyond inputs and result, at the peak"

# Whose peak is that of multiply-adds; that of tiles of half precision is ten times as far.
FMA_TYPES = ("float32", "float64")

FAR = 4  # a peak of so many times the highest rate would leave no room for the bars

LETTERS_PER_INCH = 17  # of a caption

Rankings = dict[str, dict[str, Any]]


def main(path: Path) -> None:
    """Draw all pictures of one file."""
    data = json.loads(path.read_text())
    rankings = {r["name"]: r for r in data["rankings"] if "tokens" not in r}
    models = {r["name"]: r for r in data["rankings"] if "tokens" in r}
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    by_length = {name: r for name, r in rankings.items() if name.partition("-")[0].isdigit()}
    pictures = {}
    if by_length:
        pictures = {"time": (times(by_length), by_length), "memory": (memory(by_length), by_length)}
    for name, cases in BARS.items():
        if shown := {case: rankings[case] for case in cases if case in rankings}:
            pictures[name] = bars(list(shown.values())), shown
    if models:
        pictures["models"] = model_bars(models), models
    for name, (figure, shown) in pictures.items():
        text = fill(caption(data, shown), int(figure.get_figwidth() * LETTERS_PER_INCH))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.35")
        target = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(target, dpi=160)
        print(target)


def caption(data: dict[str, Any], rankings: Rankings) -> str:
    """The machine and the conditions, and who took part."""
    machine = data["machine"]
    versions = {
        entry["name"]: entry["version"]
        for ranking in rankings.values()
        for entry in ranking["entries"]
        if not entry["ours"]
    }
    return (
        f"{machine['cpu']}, {data['threads']} threads, {data['instruction set']}, "
        f"{machine['system']}, {data['date']}; medians of {data['repeat']} interleaved rounds; "
        f"fastattn {data['fastattn']}, "
        + ", ".join(f"{called(name)} {version}" for name, version in versions.items())
    )


def times(rankings: Rankings):
    """Time against length above, the rate that it means below; plain and causal."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 9), sharey="row", layout="constrained")
    masks = {"": "every key is seen", "-causal": "causal mask"}
    for column, (suffix, mask) in zip(panels.T, masks.items(), strict=True):
        for name in candidates(rankings):
            line(column[0], name, points(rankings, suffix, name, "median", 1e3))
            line(column[1], name, points(rankings, suffix, name, "flops per second", 1e-9))
        length_axis(column[0], f"8 heads of 64, float32, {mask}")
        column[0].set_yscale("log")
        length_axis(column[1], "")
        column[1].set_ylim(bottom=0)
    panels[0, 0].set_ylabel("ms, less is better")
    panels[1, 0].set_ylabel(RATE)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center")
    return figure


def memory(rankings: Rankings):
    """Memory beyond inputs and result against length."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in candidates(rankings):
        line(axes, name, points(rankings, "", name, "memory", 2.0**-20))
    lengths = [n for n in LENGTHS if str(n) in rankings]
    axes.plot(lengths, [4 * 8 * n * 64 * 4 / 2**20 for n in lengths], ":", color="0.5", lw=1.5,
              label="inputs and result")  # fmt: skip
    length_axis(axes, "8 heads of 64, float32, every key is seen")
    axes.set_yscale("log")
    axes.set_ylabel(MEMORY)
    figure.legend(frameon=False, loc="outside right center")
    return figure


def bars(shown: list[dict[str, Any]]):
    """The rate in some cases, fastest on top, below the machine's own limit."""
    height = 1.7 + 0.3 * max(len(ranking["entries"]) for ranking in shown)
    figure, panels = plt.subplots(
        1, len(shown), figsize=(10, height), squeeze=False, layout="constrained"
    )
    for axes, ranking in zip(panels[0], shown, strict=True):
        rate, unit, limit = (
            ("bytes per second", "GB/s", "memory")
            if ranking["decodes"]
            else ("flops per second", "GFLOP/s", "FMA peak")
        )
        entries = ranking["entries"][::-1]
        rates = [entry[rate] / 1e9 for entry in entries]
        peak = ranking["peak"] / 1e9
        limited = ranking["decodes"] or ranking["dtype"] in FMA_TYPES
        limited = limited and peak < FAR * max(rates)
        end = 1.25 * max(peak, *rates) if limited else 1.25 * max(rates)
        axes.set_xlim(0, end)
        axes.set_xlabel(f"{unit}\n(dashed: {limit}, {peak:.0f})" if limited else unit)
        if limited:
            axes.axvline(peak, color="0.3", ls="--", lw=1, zorder=1)
        names = [entry["name"] for entry in entries]
        drawn = axes.barh(
            [called(name) for name in names], rates, color=[color(name) for name in names]
        )
        label_bars(
            axes, drawn, [f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in rates]
        )
        for label, name in zip(axes.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if ours(name) else "normal")
        axes.set_title(in_words(ranking), loc="left", fontsize=9)
    return figure


def model_bars(rankings: Rankings):
    """The time of whole models with each kind of attention, the fastest on top."""
    figure, panels = plt.subplots(
        len(rankings), 1, figsize=(7, 1.3 * len(rankings) + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, ranking in zip(panels[:, 0], rankings.values(), strict=True):
        entries = ranking["entries"][::-1]
        names = [entry["name"] for entry in entries]
        drawn = axes.barh(
            names, [entry["median"] for entry in entries], color=[color(name) for name in names]
        )
        label_bars(axes, drawn, [duration(entry["median"]) for entry in entries])
        axes.set_title(f"{ranking['case']}: time, less is better", loc="left", fontsize=10)
        axes.set_xticks([])
    return figure


def label_bars(axes, drawn, labels: list[str]) -> None:
    """A label in each long bar and behind each short one, where no line is."""
    longest = max(bar.get_width() for bar in drawn)
    for bar, label in zip(drawn, labels, strict=True):
        inside = bar.get_width() > longest / 2
        axes.annotate(
            label, (bar.get_width(), bar.get_y() + bar.get_height() / 2),
            (-4 if inside else 4, 0), textcoords="offset points", va="center_baseline",
            ha="right" if inside else "left", color="white" if inside else "black",
            fontweight="bold" if inside else "normal",
        )  # fmt: skip


def in_words(ranking: dict[str, Any]) -> str:
    """A case, for a title of three lines, and what an option costs in a fourth."""
    heads, kv_heads = ranking["heads"], ranking["kv_heads"]
    queries, keys = ranking["n_queries"], ranking["n_keys"]
    many = "queries" if queries > 1 else "query"
    what = "nodes" if ranking.get("option") == "graph" else "tokens"
    length = f"{keys} {what}" if queries == keys else f"{queries} {many}, {keys} keys"
    shared = f", {kv_heads} of keys" if kv_heads not in (None, heads) else ""
    options = [
        ranking["dtype"],
        "causal" if ranking["causal"] else "",
        "" if ranking["work"] == "forward" else ranking["work"],
        f"inside {called(ranking['inside'])}" if ranking["inside"] else "",
        ranking.get("function", ""),
        ranking.get("option", "").replace("_", " "),
    ]
    named = ", ".join(filter(None, options))
    lines = [length, f"{heads} heads of {ranking['head_dim']}{shared}", named]
    plain = ranking.get("plain")
    if plain:
        taken = next(e["median"] for e in ranking["entries"] if e["name"] == plain["name"])
        lines.append(f"{taken / plain['median']:.2f}x the call without")
    return "\n".join(lines)


def candidates(rankings: Rankings) -> list[str]:
    """The names, in the order of the legend: ours, then the others."""
    found = {e["name"] for ranking in rankings.values() for e in ranking["entries"]}
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
              label=called(name))  # fmt: skip


def length_axis(axes, title: str) -> None:
    """Lengths along x, each power of two its tick."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel(LENGTH)
    axes.grid(color="0.9")


def called(name: str) -> str:
    return NAMES.get(name, name)


def color(name: str) -> str:
    """Of a bar: ours stand out."""
    return style(name)[0] if ours(name) else "0.55"


def ours(name: str) -> bool:
    return name.startswith("fastattn")


def style(name: str) -> tuple[str, str]:
    return STYLES.get(name, ("#F0E442", "h"))


if __name__ == "__main__":
    for argument in sys.argv[1:] or sys.exit(__doc__):
        main(Path(argument))
