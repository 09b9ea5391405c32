"""Tables of measured numbers, made of ``benchmarks/results`` when the pages are built."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from fastattn.bench.report import duration

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
RANKING = RESULTS / "xeon-amx-2-threads.json"
OPTIONS = RESULTS / "xeon-avx512-bf16.json"
ACCURACY = RESULTS / "xeon-avx512-bf16-accuracy.json"
OURS = "fastattn-cython"
CASES = {"float32": "4096", "float64": "float64", "float16": "float16", "bfloat16": "bfloat16"}
LENGTHS = ("128", "256", "512", "1024", "2048", "8192", "16384")  # their picture is enough
PEERS = {
    "torch": ("torch", "torch-flex", "torch-formula", "torch-sparse", "torch-packed"),
    "onnxruntime": ("onnxruntime", "onnxruntime-attention", "onnxruntime-gqa"),
    "openvino": ("openvino",),
    "jax": ("jax",),
    "plain NumPy": ("numpy-formula", "numpy-gather"),
}


def write(folder: Path) -> None:
    """Write every table into `folder`, as CSV files for ``.. csv-table::``."""
    folder.mkdir(parents=True, exist_ok=True)
    ranking = json.loads(RANKING.read_text())
    rankings = {r["name"]: r for r in ranking["rankings"]}
    tables = {
        "accuracy": accuracy(rankings, json.loads(ACCURACY.read_text())["errors"]),
        "speed": speed(rankings),
    }
    if OPTIONS.exists():
        tables["options"] = options(json.loads(OPTIONS.read_text())["rankings"])
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


def accuracy(rankings: dict[str, Any], errors: dict[str, Any]) -> list[list[str]]:
    """Error beside speed: by dtype, then by instruction set, fastest first."""
    rows = [["dtype", "instruction set", "error", "plain NumPy's error", "time", "GFLOP/s"]]
    for dtype, case in CASES.items():
        plain = f"{next(iter(errors.values()))[dtype]['plain NumPy']:.1e}"
        amx = entry(rankings[case], OURS)
        if dtype != "float64":
            rows.append([dtype, "amx", f"{amx['error']:.1e}", plain, *timed(rankings[case], amx)])
        for name, found in errors.items():
            if name == "avx512_bf16" and dtype != "bfloat16":
                continue  # only bfloat16 has kernels of its own there
            times = ["not measured", ""]
            if name == "avx512" and dtype == "float64":
                times = timed(rankings[case], amx)  # AMX has no float64
            rows.append([dtype, name, f"{found[dtype]['error']:.1e}", plain, *times])
    return rows


def timed(ranking: dict[str, Any], found: dict[str, Any]) -> list[str]:
    seconds = found["median"]
    return [f"{1e3 * seconds:.1f} ms", f"{ranking['flops'] / seconds / 1e9:.0f}"]


def speed(rankings: dict[str, Any]) -> list[list[str]]:
    """Each case's time, and how many times as long the peers take, with the best they have."""
    rows = [["case", "fastattn", *PEERS]]
    for ranking in rankings.values():
        ours = entry(ranking, OURS)
        if ours is None or "tokens" in ranking or ranking["name"].partition("-")[0] in LENGTHS:
            continue
        ratios = beside(ranking, ours)
        if any(ratios):
            rows.append([ranking["case"], duration(ours["median"]), *ratios])
    return rows


def options(rankings: list[dict[str, Any]]) -> list[list[str]]:
    """The same of the cases with an option, whose cost is the time over that of the call without;
    of the backend that took part in that, or of the fastest.
    """
    rows = [["case", "fastattn", "beside the call without", *PEERS]]
    for ranking in rankings:
        if not any(ranking.get(name) for name in ("option", "function", "plain")):
            continue
        plain = ranking["plain"]
        ours = next(e for e in ranking["entries"] if e["ours"])
        if plain:
            ours = entry(ranking, plain["name"]) or ours
        cost = f"{ours['median'] / plain['median']:.2f}x" if plain else ""
        rows.append([ranking["case"], duration(ours["median"]), cost, *beside(ranking, ours)])
    return rows


def beside(ranking: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """How many times as long as `ours` the best of each peer takes."""
    others = [entry(ranking, *names) for names in PEERS.values()]
    return [f"{other['median'] / ours['median']:.2f}x" if other else "" for other in others]


def entry(ranking: dict[str, Any], *names: str) -> dict[str, Any] | None:
    """That of the fastest of these; entries are in that order."""
    return next((e for e in ranking["entries"] if e["name"] in names), None)
