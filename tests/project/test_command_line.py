"""``python -m fastattn``: what a shell is told, and that it reads well at 80 columns."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers.subprocesses import child_environment

import fastattn
from fastattn.__main__ import main
from fastattn.bench import cases, ranking, report, timing
from fastattn.selftest import Outcome

SMALL = ("bench", "--shape", "1,1,8,8", "--repeat", "1", "--no-memory", "--backend", "numpy")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys, *arguments):
    try:
        status = main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    assert status == 0
    return capsys.readouterr().out


def words(text):
    return re.findall(r"[^\s,]+", text)


def start(*arguments, **options):
    command = [sys.executable, "-m", "fastattn", *arguments]
    return subprocess.Popen(command, env=child_environment(), **options)


def test_version(capsys):
    assert printed(capsys, "--version") == f"fastattn {fastattn.__version__}\n"


def test_info_as_json(capsys):
    found = json.loads(printed(capsys, "info", "--json"))
    assert found["fastattn"] == fastattn.__version__
    assert found["backends"]["numpy"] == "ready"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["info"], ["bench", "--help"], SMALL])
def test_eighty_columns(capsys, arguments):
    """Nothing is left to the terminal to fold, and every fold is between words."""
    narrow = printed(capsys, *arguments)
    assert max(map(len, narrow.splitlines())) <= 80
    if arguments is not SMALL:  # whose figures change
        os.environ["COLUMNS"] = "1000"
        assert words(narrow) == words(printed(capsys, *arguments))


def test_wide_tables_are_printed_in_blocks(capsys):
    outcomes = [Outcome("causal", f"target {n:02}", 0.5, None) for n in range(20)]
    report.print_selftest(outcomes)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("causal ")]) > 1
    assert re.findall(r"target \d\d", "\n".join(lines)) == [o.target for o in outcomes]


def test_cases_are_described(capsys):
    told = printed(capsys, "bench", "--help")
    assert re.search(r"^  decode-grouped +\(1, 32/8, 1x8192, 128\) float32$", told, re.MULTILINE)
    assert re.search(r"^  model-prefill +Llama prefill, 2048 tokens$", told, re.MULTILINE)


def test_closed_pipe():
    """As of ``python -m fastattn info | true``: no traceback, in the end or at the exit."""
    reader, writer = os.pipe()
    os.close(reader)
    with start("info", stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals of its own here")
@pytest.mark.parametrize("bar", [True, False])
def test_progress_says_what_it_prepares(monkeypatch, capsys, bar):
    if bar:
        pytest.importorskip("rich", reason="it draws the bar")
    else:
        monkeypatch.setattr(report, "find_spec", lambda name: None)
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main([*SMALL, "--peer", "numpy-formula"]) == 0
        terminal.flush()
        told = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert told.index("preparing the exact result") < told.index("preparing fastattn-numpy")
    assert "preparing numpy-formula" in told


def test_how_to_install_absent_peers(capsys):
    hint = "pip install 'fastattn[peers]'"
    report.print_absent_peers([{"absent": {"openvino": "openvino not installed"}}])
    assert hint in capsys.readouterr().out
    report.print_absent_peers([{"absent": {"torch": "computes no gradients"}}])
    assert hint not in capsys.readouterr().out


@pytest.mark.parametrize("measured", [1.0, 1e30])
@pytest.mark.parametrize("shape", ["1,1,8,8", "1,1,1x8,8"])
def test_no_share_of_the_peak_is_above_one(monkeypatch, measured, shape):
    """Whatever a clock that drifts, or a cache, made of the measured peak."""
    monkeypatch.setattr(ranking, "_peak", lambda case, threads: [measured])
    from fastattn.bench.candidates import named

    found = ranking.rank("", cases.parse_shape(shape), [named("numpy-formula")], 1, 1, False)
    share = found["entries"][0]["share of peak"]
    assert share <= 1
    assert (share == 1) == (measured == 1.0)


def test_no_peak_without_the_extension():
    times = {"numpy": timing.Times([1.0], 1)}
    assert ranking._highest([], cases.CASES["tiny"], times) is None


def test_built_without_openmp(capsys, monkeypatch):
    found = json.loads(printed(capsys, "info", "--json"))
    found["threads"]["OpenMP"] = 0
    report.print_info(found)
    assert "built without OpenMP" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="its shell redirects in other words")
def test_what_cannot_be_written():
    """An error in words; nothing where standard output is closed."""

    def info(redirection):
        command = f'"{sys.executable}" -m fastattn info {redirection}'
        return subprocess.run(
            command, shell=True, env=child_environment(), stderr=subprocess.PIPE, text=True,
            check=False, timeout=300,
        )  # fmt: skip

    closed = info(">&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    if os.path.exists("/dev/full"):
        full = info(">/dev/full")
        assert full.returncode == 1 and full.stderr.startswith("python -m fastattn: error: [Errno")
        assert len(full.stderr.splitlines()) == 1
