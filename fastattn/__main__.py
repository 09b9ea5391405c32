"""``fastattn info | selftest | bench``, or ``python -m fastattn``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import __version__
from .bench import machine, models, ranking, report
from .bench.candidates import CANDIDATES, Candidate
from .bench.cases import CASES, Case, parse_shape
from .bench.models import MODELS, ModelCase

DEFAULT_SHAPE = "1,8,4096,64"
DTYPES = ("float32", "float64", "float16", "bfloat16")
CASE_COLUMNS = "cases (batch, heads, length, head_dim):"
FOOTNOTE = """
Rounds are interleaved; whatever takes over 3 times as long as the fastest has one.
peak: multiply-adds in registers (decoding: reads from memory), or the fastest below if faster.
memory: at the peak, beyond inputs and result.
error: rms, against float64 (float64: long double; models: of the logits, against eager's).
ratio: time over that of fastattn's fastest."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    parser = command_line()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command is None:
            parser.print_help()
            return 0
        status = chosen.command(parser, chosen)
        if sys.stdout is not None:  # as it is where it was closed before the start
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader has seen enough, as `head` has
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        if error.filename is None:  # of the output itself, which would be flushed again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def info(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> int:
    """Say what is here: machine, instruction sets, threads, backends, settings."""
    found = machine.info()
    if chosen.json:
        write_json(found, "-")
    else:
        report.print_info(found)
    return 0


def selftest(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> int:
    """Check every backend on every instruction set of this machine; status 1 if one is wrong."""
    from . import selftest as tests

    outcomes = []
    with report.progress(tests.count()) as tick:
        for outcome in tests.selftest():
            outcomes.append(outcome)
            tick(f"{outcome.problem}: {outcome.target}")
    if chosen.json:
        write_json([{**o._asdict(), "ok": o.ok} for o in outcomes], "-")
    else:
        report.print_selftest(outcomes)
    return 0 if all(o.ok for o in outcomes) else 1


def bench(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> int:
    """Rank the backends and the installed peers on long sequences."""
    cases = wanted_cases(parser, chosen)
    candidates = wanted_candidates(chosen)
    threads = chosen.threads or machine.default_threads()
    with_memory = not chosen.no_memory
    conditions = ranking.conditions(threads)
    show = chosen.json != "-"
    if chosen.json and show:  # a wrong path is better known before the measurements than after
        Path(chosen.json).parent.mkdir(parents=True, exist_ok=True)
    if show:
        print(report.headline(conditions))
    rankings = []
    steps = ranking.steps(len(candidates), chosen.repeat, with_memory)
    for name, case in cases.items():
        with report.progress(steps) as tick:
            if isinstance(case, ModelCase):
                result = models.rank(name, case, threads, chosen.repeat, tick)
            else:
                result = ranking.rank(
                    name, case, candidates, threads, chosen.repeat, with_memory, tick
                )
        rankings.append(result)
        if show:
            report.print_ranking(result, chosen.repeat)
    if show:
        print(*report.folded(FOOTNOTE, indent="  "), sep="\n")
        report.print_absent_peers(rankings)
    if chosen.json:
        write_json({**conditions, "repeat": chosen.repeat, "rankings": rankings}, chosen.json)
    return 0


def every_case() -> dict[str, Case | ModelCase]:
    """All cases that have a name."""
    return {**CASES, **MODELS}


def wanted_cases(
    parser: argparse.ArgumentParser, chosen: argparse.Namespace
) -> dict[str, Case | ModelCase]:
    """The cases that were asked for, by name."""
    cases = {n: c for n, c in every_case().items() if any(fnmatch(n, p) for p in chosen.case)}
    if chosen.case and not cases:
        parser.error(f"--case: none matches {' '.join(chosen.case)}; --help describes them")
    shapes = chosen.shape or ([] if chosen.case else [DEFAULT_SHAPE])
    # Asked for nothing in particular, both are shown.
    both = not chosen.shape and not chosen.causal
    for shape in shapes:
        for causal in (False, True) if both else (chosen.causal,):
            options: dict[str, Any] = {"dtype": chosen.dtype, "causal": causal}
            if chosen.kv_heads:
                options["kv_heads"] = chosen.kv_heads
            try:
                case = parse_shape(shape, **options)
            except ValueError as error:
                parser.error(f"--shape {shape}: {error}")
            cases[str(case)] = case
    return cases


def wanted_candidates(chosen: argparse.Namespace) -> list[Candidate]:
    """Backends and peers: all of a kind but those on a GPU, unless some of that kind are named."""

    def wanted(names: list[str], ours: bool) -> list[Candidate]:
        kind = [c for c in CANDIDATES if c.ours == ours]
        return [c for c in kind if (short_name(c) in names if names else not c.only_named)]

    return wanted(chosen.backend, True) + wanted(chosen.peer, False)


def short_name(candidate: Candidate) -> str:
    return candidate.name.removeprefix("fastattn-") if candidate.ours else candidate.name


def write_json(data: Any, path: str) -> None:
    if path == "-":
        json.dump(data, sys.stdout, indent=1)
        print()
        return
    with open(path, "w") as file:
        json.dump(data, file, indent=1)
        file.write("\n")


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    script = Path(sys.argv[0]).stem
    parser = argparse.ArgumentParser(
        prog=script if script == "fastattn" else "python -m fastattn",
        description="Exact softmax attention for NumPy: what is here, is it right, how fast is it?",
        formatter_class=WholeWords,
    )
    parser.add_argument("--version", action="version", version=f"fastattn {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="command")
    for function in (info, selftest):
        summary = function.__doc__
        added = commands.add_parser(
            function.__name__, help=summary, description=summary, formatter_class=WholeWords
        )
        added.set_defaults(command=function)
        added.add_argument("--json", action="store_true", help="print JSON")
    add_bench(commands)
    return parser


def add_bench(commands) -> None:
    """Add the command `bench` and its options."""
    added = commands.add_parser(
        "bench",
        help=bench.__doc__,
        description=f"{bench.__doc__} Without options: {DEFAULT_SHAPE}, plain and causal.",
        epilog="\n".join((CASE_COLUMNS, *(f"  {n:<26}{c}" for n, c in every_case().items()))),
        formatter_class=WholeWords,
    )
    added.set_defaults(command=bench)
    ours = [short_name(c) for c in CANDIDATES if c.ours]
    peers = [c.name for c in CANDIDATES if not c.ours]
    add = added.add_argument
    add("--shape", action="append", default=[], metavar="B,H,S,D",
        help="batch, heads, length, head_dim; S may be QUERIESxKEYS, H may be HEADS/KV_HEADS; "
        "may be repeated")  # fmt: skip
    add("--kv-heads", type=positive, metavar="N", help="heads of k and v (grouped heads)")
    add("--dtype", default="float32", choices=DTYPES, metavar="NAME",
        help=f"of q, k and v: {', '.join(DTYPES)}; default: float32")  # fmt: skip
    add("--causal", action="store_true", help="under a causal mask")
    add("--case", action="append", default=[], metavar="NAME",
        help="a named case, or a pattern such as '*-causal' or '*'; may be repeated")  # fmt: skip
    add("--threads", type=positive, metavar="N", help="of each; default: as fastattn takes")
    add("--backend", action="append", default=[], choices=[*ours, "none"], metavar="NAME",
        help=f"only this backend: {', '.join(ours)}, none; may be repeated")  # fmt: skip
    add("--peer", action="append", default=[], choices=[*peers, "none"], metavar="NAME",
        help=f"only this peer: {', '.join(peers)}, none; may be repeated")  # fmt: skip
    add("--repeat", type=positive, default=5, metavar="N", help="rounds; default: 5")
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="write JSON to FILE, or print it instead of the tables")  # fmt: skip


class WholeWords(argparse.RawDescriptionHelpFormatter):
    """Folds lines between words only: names of cases and peers have hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return report.folded(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(report.folded(text, width))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {n}")
    return n


if __name__ == "__main__":
    sys.exit(main())
