"""The files around the code: they agree with each other and with the tree."""

import re
import tomllib
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/fastattn/fastattn"
PROJECT = ROOT / "pyproject.toml"
pytestmark = pytest.mark.skipif(not PROJECT.exists(), reason="installed without its source")


def text(name):
    return (ROOT / name).read_text()


def test_one_version():
    assert tomllib.loads(text("pyproject.toml"))["project"]["version"] == fastattn.__version__
    assert f"\nversion: {fastattn.__version__}\n" in text("CITATION.cff")
    headings = re.findall(r"^## \[(.+)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert fastattn.__version__ in headings
    for version in headings:
        assert f"\n[{version}]: {REPOSITORY}/" in text("CHANGELOG.md")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_are_absolute_and_lead_somewhere(name):
    """A package index shows the README, where a relative link leads nowhere."""
    links = re.findall(r"\]\(([^)]+)\)", text(name))
    assert all(link.startswith("https://") for link in links), links
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
    for link in links:
        for start in (f"{REPOSITORY}/blob/main/", raw):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start)).exists(), link


@pytest.mark.parametrize("path", sorted((ROOT / ".github").glob("workflows/*.yml")), ids=str)
def test_actions_are_pinned_by_commit(path):
    """A tag can be moved to a commit of someone else's."""
    used = re.findall(r"uses: (\S+)(.*)", path.read_text())
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), action


def test_readme_has_the_two_commands_of_the_gate():
    (block,) = re.findall(r"^```sh\n(.*?)^```$", text("README.md"), re.MULTILINE | re.DOTALL)
    install, test = block.splitlines()
    assert "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && " in install
    assert test == ".venv/bin/python -m pytest -n auto"


def test_source_distribution_has_what_the_tests_need():
    manifest = text("MANIFEST.in").split()
    assert {"conftest.py", "tests", "csrc", "CHANGELOG.md"} <= set(manifest)
