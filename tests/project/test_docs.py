"""What the documentation shows runs as it stands."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import fastattn

README = Path(__file__).parents[2] / "README.md"
PLAIN = (
    "attention", "backward", "documents", "explain", "gaussian", "jvp", "kv_cache", "additive",
    "euclidean", "merge", "multihead", "similarity", "varlen", "vjp", "weight_maps",
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


@pytest.mark.parametrize("name", fastattn.__all__)
def test_public_names_say_what_they_do(name):
    assert getattr(fastattn, name).__doc__
