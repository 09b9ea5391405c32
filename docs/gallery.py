"""Which of the examples run when the pages are built, and with which arguments."""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

# With arguments that take seconds, for those that take longer than that.
ARGUMENTS = {
    "find_the_marked": ["--short"],
    "generate_text": ["20", "60"],
    "jax_training": ["--short"],
    "predict_next": ["--short"],
    "relative_distance": ["--short"],
    "reverse_sequences": ["--short"],
    "sentence_embeddings": ["--short"],
    "serve_prompts": ["--short"],
    "train_torch": ["--short"],
    "transformers_search": ["--short"],
}
PICTURES = tempfile.mkdtemp(prefix="fastattn-docs-")  # what the examples save is not what is shown


def runnable(folder: Path) -> str:
    """A pattern of the examples of which every import is installed; the others are only shown."""
    able = [path.stem for path in folder.glob("*.py") if not missing(imports(path))]
    return r"[/\\](" + "|".join(map(re.escape, sorted(able))) + r")\.py$"


def imports(path: Path) -> set[str]:
    """The packages that a program imports, itself, in a function or by a module beside it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names}
    beside = {name for name in packages if path.with_name(f"{name}.py").exists()}
    return (packages - beside).union(*(imports(path.with_name(f"{name}.py")) for name in beside))


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed here."""
    return [name for name in packages if find_spec(name) is None]


def arguments(gallery_conf, script_vars) -> list[str]:
    """The command line of an example, behind its name."""
    path = Path(script_vars["src_file"])
    given = ARGUMENTS.get(path.stem, [])
    return [*given, "--output", PICTURES] if "common" in path.read_text() else given
