"""What the commands print: tables, lists and a progress bar, with ``rich`` or in plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..selftest import Outcome

__all__ = [
    "facts",
    "headline",
    "print_info",
    "print_ranking",
    "print_selftest",
    "progress",
    "table",
]

SEPARATOR = " | "


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[int] = ()
) -> None:
    """Print a table: the first column to the left, the others to the right."""
    if sys.stdout.isatty() and find_spec("rich"):
        _rich_table(title, headers, rows, bold)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    print(title)
    for row in (headers, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print("  ".join(cells).rstrip())


def _rich_table(title, headers, rows, bold) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    for index, header in enumerate(headers):
        drawn.add_column(header, justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(rows):
        drawn.add_row(*map(Text, row), style="bold green" if index in bold else "")
    Console().print(drawn)


def facts(pairs: Sequence[tuple[str, Any]]) -> None:
    """Print names and what they stand for, aligned; lists one item to a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        lines = value if isinstance(value, list) else [value]
        for index, line in enumerate(lines or ["none"]):
            print(f"{'' if index else name:<{width}}  {line}")


def print_info(info: dict[str, Any]) -> None:
    """Print what `fastattn.bench.machine.info` found."""
    machine, threads = info["machine"], info["threads"]
    in_use = info["instruction set in use"]
    sets = [f"{isa} (in use)" if isa == in_use else isa for isa in info["instruction sets"]]
    memory = machine["memory"]
    compiled = threads["OpenMP"] is not None
    facts(
        [
            ("fastattn", info["fastattn"]),
            ("Python", info["python"]),
            ("NumPy", f"{info['numpy']}, {info['blas']}"),
            ("system", machine["system"]),
            ("CPU", f"{machine['cpu']} ({machine['architecture']})"),
            ("cores", f"{machine['cores']}, this process may use {machine['cores allowed']}"),
            ("caches", ", ".join(machine["caches"]) or "unknown"),
            ("memory", size(memory) if memory else "unknown"),
            ("instruction sets", ", ".join(sets) or "none"),
            (
                "threads",
                f"{threads['default']}" + (f", OpenMP offers {threads['OpenMP']}" * compiled),
            ),
            ("backends", [f"{name}: {state}" for name, state in info["backends"].items()]),
            (
                "only when named",
                [f"{name}: {state}" for name, state in info["only when named"].items()],
            ),
            ("environment", [f"{name}={value}" for name, value in info["environment"].items()]),
        ]
    )


def print_selftest(outcomes: Sequence[Outcome]) -> None:
    """Print what `fastattn.selftest.selftest` found, a problem to a line."""
    cells: dict[str, list[str]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for o in outcomes:
        cell = "not served" if o.error is None else f"{o.error:.2f}" + ("" if o.ok else " WRONG")
        cells.setdefault(o.problem, []).append(cell)
        if o.reason is not None:
            reasons.setdefault(o.reason, {})[o.target] = None
    table(
        "rms error against float64; 1 is what is allowed: twice plain NumPy's, plus 2 ulp",
        ("", *dict.fromkeys(o.target for o in outcomes)),
        [(problem, *row) for problem, row in cells.items()],
    )
    for reason, targets in reasons.items():
        print(f"not served by {', '.join(targets)}: {reason}")
    served = [o for o in outcomes if o.error is not None]
    print(f"{sum(o.ok for o in served)} of {len(served)} right")


def headline(conditions: dict[str, Any]) -> str:
    """The machine and the software of a ranking, in one or two lines."""
    machine = conditions["machine"]
    what = [
        f"fastattn {conditions['fastattn']}",
        f"{conditions['threads']} threads" if conditions["threads"] > 1 else "1 thread",
        conditions["instruction set"] or "no extension",
        f"NumPy {conditions['numpy']} ({conditions['blas']})",
        conditions["date"],
    ]
    where = [
        machine["cpu"],
        f"{machine['cores allowed']} cores",
        ", ".join(machine["caches"]),
        machine["system"],
    ]
    return SEPARATOR.join(filter(None, what)) + "\n" + SEPARATOR.join(filter(None, where))


def print_ranking(ranking: dict[str, Any], repeat: int) -> None:
    """Print one result of `fastattn.bench.ranking.rank`, or of `models.rank`."""
    work, unit, scale, roof = ("flops", "GFLOP", 1e9, "FMA peak")
    if "tokens" in ranking:
        work, unit, scale = ("tokens", "tokens", 1)
    elif ranking["decodes"]:
        work, unit, roof = ("bytes", "GB", "read bandwidth")
    title = [ranking["case"], f"{ranking[work] / scale:.3g} {unit}", f"median of {repeat}"]
    if ranking["peak"]:
        title.append(f"{roof} {ranking['peak'] / scale:.0f} {unit}/s")
    entries = ranking["entries"]
    headers = ("", "time", f"{unit}/s", "of peak", "memory", "error", "ratio")
    rows = [
        (
            entry["name"] if entry["ours"] else f"{entry['name']} {entry['version']}",
            duration(entry["median"]),
            f"{entry[f'{work} per second'] / scale:.1f}",
            _maybe(entry["share of peak"], "{:.0%}".format),
            _maybe(entry["memory"], size),
            f"{entry['error']:.1e}",
            _maybe(entry["ratio"], "{:.2f}x".format),
        )
        for entry in entries
    ]
    ours = [index for index, entry in enumerate(entries) if entry["ours"]]
    print()
    table(SEPARATOR.join(title), headers, rows, bold=ours[:1])
    for name, reason in ranking["absent"].items():
        print(f"absent: {name}: {reason}")


def duration(seconds: float) -> str:
    """A time in the unit that leaves one to three digits before the point."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def size(n_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes / 1024:.0f} KiB"


def _maybe(value, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, where that is a terminal and ``rich`` is there to draw it.

    Yields a function that says what comes next.
    """
    if not (sys.stderr.isatty() and find_spec("rich")):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=False
    ) as bar:
        task = bar.add_task("preparing", total=total)

        def tick(name: str) -> None:
            # Drawn here, between the samples: a thread that redraws would disturb what is timed.
            bar.update(task, advance=1, description=name, refresh=True)

        yield tick
