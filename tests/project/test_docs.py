"""What the documentation shows runs as it stands."""

import doctest
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.subprocesses import child_environment

import fastattn
from fastattn.__main__ import command_line

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
WRITTEN = [DOCS / "index.rst", DOCS / "api.rst", *sorted(DOCS.glob("guide/**/*.rst"))]
SPHINX = ("sphinx", "numpydoc", "pydata_sphinx_theme", "sphinx_gallery", "sphinx_copybutton",
          "matplotlib")  # fmt: skip
MADE_BY_A_BUILD = shutil.ignore_patterns("__pycache__", "examples", "generated", "output")
PLAIN = (
    "attention", "backward", "documents", "explain", "gaussian", "jvp", "kv_cache", "additive",
    "euclidean", "merge", "multihead", "pooling", "similarity", "varlen", "vjp", "weight_maps",
)  # fmt: skip
NEED_NUMBA = ("block_mask", "flex", "vectormath")


@pytest.mark.parametrize("module", [*PLAIN, *NEED_NUMBA, "plot"])
def test_docstrings(module, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if module in NEED_NUMBA:
        pytest.importorskip("numba", reason="the examples compile functions")
    if module == "plot":
        pytest.importorskip("matplotlib", reason="the examples draw")
    failed, attempted = doctest.testmod(import_module(f"fastattn.{module}"))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_readme_example(block):
    if "import torch" in block:
        pytest.importorskip("torch", reason="the example is for PyTorch's users")
    if "integrations.transformers" in block:
        pytest.importorskip("transformers", reason="the example is for its users")
    exec(compile(block, str(README), "exec"), {})


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_page(page):
    """Its examples, one after the other, as a reader would type them."""
    text = page.read_text()
    for package in re.findall(r"^>>> (?:import|from) (\w+)", text, re.MULTILINE):
        pytest.importorskip(package, reason=f"the page is for users of {package}")
    failed, _ = doctest.testfile(str(page), module_relative=False, globs={})
    assert failed == 0
    # Shown code is what doctest runs, commands, parts of a tested example, or drawn by the build.
    shown = re.findall(r"^\.\. (?:code-block|code|sourcecode|parsed-literal):: *(\w*)", text, re.M)
    assert set(shown) <= {"sh"}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_commands_of_a_page(page):
    for line in re.findall(r"python -m fastattn (.*)", page.read_text()):
        words = re.split(r"``|#", line)[0]
        command_line().parse_args([word for word in shlex.split(words) if word != "--help"])


def test_site(tmp_path):
    """It is built without a warning, with the examples of which everything is installed."""
    if missing := [name for name in SPHINX if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    source = tmp_path / "fastattn"
    for folder in ("docs", "examples", "benchmarks/results"):
        shutil.copytree(ROOT / folder, source / folder, ignore=MADE_BY_A_BUILD)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "docs", str(tmp_path / "site")],
        cwd=source, env=child_environment(), timeout=1200, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout
    for page in WRITTEN:
        assert (tmp_path / "site" / page.relative_to(DOCS).with_suffix(".html")).exists()
    assert (tmp_path / "site" / "searchindex.js").stat().st_size > 1000


@pytest.mark.parametrize("name", fastattn.__all__)
def test_public_names_say_what_they_do(name):
    assert getattr(fastattn, name).__doc__
