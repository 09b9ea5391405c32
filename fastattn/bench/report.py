"""What the commands print: tables, lists and a progress bar, with ``rich`` or in plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..selftest import Outcome

__all__ = [
    "facts",
    "folded",
    "headline",
    "print_absent_peers",
    "print_info",
    "print_ranking",
    "print_selftest",
    "progress",
    "table",
]

SEPARATOR = " | "
NOT_INSTALLED = "not installed"
GAP = 2  # columns of a terminal between those of a table


def folded(text: str, width: int | None = None, indent: str = "") -> list[str]:
    """The lines of `text`, folded between words at `width`, by default that of the terminal."""
    width = width or get_terminal_size().columns
    found = []
    for line in text.splitlines():
        fold = wrap(line, width, subsequent_indent=indent, break_on_hyphens=False,
                    break_long_words=False)  # fmt: skip
        found += fold or [""]
    return found


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], bold: Sequence[int] = ()
) -> None:
    """Print a table: the first column to the left, the others to the right. One that is wider than
    the terminal is printed in blocks of columns, each behind the first.
    """
    for line in folded(title):
        print(line)
    columns = list(zip(headers, *rows, strict=True))
    draw = _rich_table if sys.stdout.isatty() and find_spec("rich") else _plain_table
    for block in _blocks([max(map(len, column)) for column in columns]):
        draw(*zip(*(columns[n] for n in block), strict=True), bold=bold)


def _blocks(widths: Sequence[int]) -> list[list[int]]:
    """The columns of each block: the first, and as many others as the terminal has room for."""
    blocks, room = [[0]], 0
    for n, width in enumerate(widths[1:], 1):
        room -= GAP + width
        if n == 1 or room < 0:
            if n > 1:
                blocks.append([0])
            room = get_terminal_size().columns - widths[0] - GAP - width
        blocks[-1].append(n)
    return blocks


def _plain_table(headers, *rows, bold) -> None:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, ["-" * width for width in widths], *rows):
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print((" " * GAP).join(cells).rstrip())


def _rich_table(headers, *rows, bold) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for index, header in enumerate(headers):
        drawn.add_column(header, justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(rows):
        drawn.add_row(*map(Text, row), style="bold green" if index in bold else "")
    Console().print(drawn)


def facts(pairs: Sequence[tuple[str, Any]]) -> None:
    """Print names and what they stand for, aligned; lists one item to a line."""
    width = max(len(name) for name, _ in pairs)
    room = max(get_terminal_size().columns - width - GAP, 20)
    for name, value in pairs:
        items = value if isinstance(value, list) else [value]
        lines = [line for item in items or ["none"] for line in folded(item, room, indent="  ")]
        for index, line in enumerate(lines):
            print(f"{'' if index else name:<{width}}{' ' * GAP}{line}")


def print_info(info: dict[str, Any]) -> None:
    """Print what `fastattn.bench.machine.info` found."""
    machine, threads = info["machine"], info["threads"]
    in_use = info["instruction set in use"]
    notes = dict.fromkeys(info["slow instruction sets"], " (slow on this CPU)")
    notes[in_use] = " (in use)"
    sets = [f"{isa}{notes.get(isa, '')}" for isa in info["instruction sets"]]
    memory = machine["memory"]
    openmp = {None: "", 0: ", built without OpenMP"}.get(
        threads["OpenMP"], f", OpenMP offers {threads['OpenMP']}"
    )
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
            ("threads", f"{threads['default']}{openmp}"),
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
        cell = "-" if o.error is None else f"{o.error:.2f}" + ("" if o.ok else " WRONG")
        cells.setdefault(o.problem, []).append(cell)
        if o.reason is not None:
            reasons.setdefault(o.reason, {})[o.target] = None
    table(
        "rms error against float64; 1 is what is allowed: twice plain NumPy's, plus 2 ulp",
        ("", *dict.fromkeys(o.target for o in outcomes)),
        [(problem, *row) for problem, row in cells.items()],
    )
    for reason, targets in reasons.items():
        print(*folded(f"-: not served by {', '.join(targets)}: {reason}", indent="   "), sep="\n")
    served = [o for o in outcomes if o.error is not None]
    print(f"{sum(o.ok for o in served)} of {len(served)} right")


def headline(conditions: dict[str, Any]) -> str:
    """The machine and the software of a ranking, in some lines."""
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
    lines = (SEPARATOR.join(filter(None, words)) for words in (what, where))
    return "\n".join(folded("\n".join(lines), indent="  "))


def print_ranking(ranking: dict[str, Any], repeat: int) -> None:
    """Print one result of `fastattn.bench.ranking.rank`, or of `models.rank`."""
    work, unit, scale = ("flops", "GFLOP", 1e9)
    if "tokens" in ranking:
        work, unit, scale = ("tokens", "tokens", 1)
    elif ranking["decodes"]:
        work, unit = ("bytes", "GB")
    title = [ranking["case"], f"{ranking[work] / scale:.3g} {unit}", f"median of {repeat}"]
    if ranking["peak"]:
        title.append(f"peak {ranking['peak'] / scale:.0f} {unit}/s")
    entries = ranking["entries"]
    headers = ("", "time", f"{unit}/s", "of peak", "memory", "error", "ratio")
    rows = [
        (
            entry["name"] if entry["ours"] else f"{entry['name']} {entry['version']}",
            duration(entry["median"]),
            f"{entry[f'{work} per second'] / scale:.1f}",
            _maybe(entry["share of peak"], "{:.0%}".format),
            _maybe(entry["memory"], size),
            _maybe(entry["error"], "{:.1e}".format),
            _maybe(entry["ratio"], "{:.2f}x".format),
        )
        for entry in entries
    ]
    ours = [index for index, entry in enumerate(entries) if entry["ours"]]
    print()
    table(SEPARATOR.join(title), headers, rows, bold=ours[:1])
    if ranking.get("plain"):
        print(*folded(_cost(ranking), indent="  "), sep="\n")
    absent: dict[str, list[str]] = {}
    for name, reason in ranking["absent"].items():
        absent.setdefault(reason, []).append(name)
    for reason, names in absent.items():
        print(*folded(f"absent: {', '.join(names)}: {reason}", indent="  "), sep="\n")


def _cost(ranking: dict[str, Any]) -> str:
    plain = ranking["plain"]
    name = plain["name"]
    taken = next(e["median"] for e in ranking["entries"] if e["name"] == name)
    without = duration(plain["median"])
    return f"{name} without {plain['without']}: {without}, with: {taken / plain['median']:.2f}x"


def print_absent_peers(rankings: Sequence[dict[str, Any]]) -> None:
    """Print how to install the peers that were absent for want of a package."""
    reasons = (reason for ranking in rankings for reason in ranking["absent"].values())
    if any(reason.endswith(NOT_INSTALLED) for reason in reasons):
        print("To install the peers that are absent: pip install 'fastattn[peers]'")


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
    """A line on stderr that says what comes next, if that is a terminal; with ``rich`` a bar too.

    Yields a function to be told what comes next, `total` times.
    """
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    if not find_spec("rich"):
        yield lambda name: print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=total)

        def tick(name: str) -> None:
            # Drawn here, between the samples: a thread that redraws would disturb what is timed.
            bar.update(task, advance=1, description=name, refresh=True)

        yield tick
