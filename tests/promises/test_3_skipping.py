"""Promise 3: tiles that no query sees are neither read nor computed."""

import sys

import pytest
from helpers.problems import Shape
from helpers.subprocesses import run_module

from fastattn.core.problem import make_problem
from fastattn.dispatch import named, unsupported_map

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")


def test_unseen_tiles_are_not_read(target):
    """Keys and values a block away from any that is seen lie in memory that may not be read; nor is
    that read for gradients and maps, where there are any.
    """
    arrays = Shape(1, 1, 4, 5, 8).arrays()
    calls = ["attend"]
    if target.unsupported_backward(*arrays) is None:
        calls.append("differentiate")
    if unsupported_map(named(target.backend), make_problem(*arrays)) is None:
        calls.append("make_maps")
    done = run_module("helpers.skipping", target.backend, *calls)
    assert done.returncode == 0, f"ended by {done.returncode} in {done.stdout.splitlines()[-1:]}"
    assert done.stdout.endswith("fine\n")
