"""The examples that need no download run, in short."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_generate_text(run_python):
    """It ends with an error of its own where the cache changes what is said."""
    pytest.importorskip("torch")
    source = (EXAMPLES / "generate_text.py").read_text()
    printed = run_python(source, "20", "60", timeout=300, OMP_NUM_THREADS="1")
    assert "float32 cache: " in printed and "the first 60 the same" in printed
