"""Promise 3: tiles that no query sees are neither read nor computed."""

import sys

import numpy as np
import pytest
from helpers.problems import Shape
from helpers.subprocesses import run_module
from helpers.weight_maps import call

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")


def assert_reads_what_is_seen(target, what):
    """Keys and values a block away from any that is seen lie in memory that may not be read."""
    done = run_module("helpers.skipping", target.backend, what)
    assert done.returncode == 0, f"ended by {done.returncode} in {done.stdout.splitlines()[-1:]}"
    assert done.stdout.endswith("fine\n")


def test_unseen_tiles_are_not_read(target):
    assert_reads_what_is_seen(target, "attend")


def test_nor_for_gradients(target):
    reason = target.unsupported_backward(*Shape(1, 1, 4, 5, 8).arrays())
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    assert_reads_what_is_seen(target, "differentiate")


def test_nor_for_maps(target):
    call(target, "key_importance", *np.ones((2, 3, 4), np.float32))  # skips where there are none
    assert_reads_what_is_seen(target, "make_maps")
