"""``mypy --strict`` of a user's file knows what the functions return."""

import inspect
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers.subprocesses import child_environment

import fastattn

USER = """
from typing import Any, assert_type
import numpy as np
from numpy.typing import NDArray
import fastattn

Array = NDArray[Any]
q = np.zeros((2, 3, 4), np.float32)
w = np.zeros((4, 5), np.float32)
assert_type(fastattn.scaled_dot(q, q, q, causal=True), Array)
assert_type(fastattn.scaled_dot(q, q, q, return_lse=True), tuple[Array, Array])
assert_type(fastattn.scaled_dot(q, q, q, return_weights=True), tuple[Array, Array])
assert_type(
    fastattn.scaled_dot(q, q, q, return_lse=True, return_weights=True), tuple[Array, Array, Array]
)
assert_type(fastattn.dot(q, q, q), Array)
assert_type(fastattn.cosine(q, q, q, temperature=2.0, return_lse=True), tuple[Array, Array])
assert_type(fastattn.euclidean(q, q, q, return_weights=True), tuple[Array, Array])
assert_type(fastattn.gaussian(q, q, q, alpha=0.5), Array)
assert_type(fastattn.additive(q, q, q, w_q=w, w_k=w, w=w[0]), Array)
assert_type(fastattn.pool(q, w, return_lse=True), tuple[Array, Array])
assert_type(fastattn.varlen(q, q, q, lengths=[2]), Array)
cache = fastattn.KVCache(1, 2, 4)
cache.append(q[None], q[None])
assert_type(cache.attend(q[None]), Array)
assert_type(cache.attend(q[None], return_lse=True), tuple[Array, Array])
layer = fastattn.MultiHeadAttention(4, 2)
assert_type(layer(q), Array)
both = fastattn.scaled_dot(q, q, q, return_lse=True)
out, lse = fastattn.merge(both, both)
start, stop = fastattn.document_spans([1, 2])
_, pullback = fastattn.vjp(fastattn.scaled_dot, q, q, q)
dq, dk, dv = pullback(q)
dq, dk, dv = fastattn.scaled_dot_backward(q, q, q, q, out, lse)
fastattn.key_importance(q, q).sum() + fastattn.attention_map(q, q, (2, 2)).sum()
indices, weights = fastattn.top_keys(q, q, 2)
print(fastattn.explain(q, q, q).backend, fastattn.available_backends())


def known_later(flag: bool) -> None:
    assert_type(fastattn.scaled_dot(q, q, q, return_lse=flag), Any)
"""


@pytest.mark.skipif(not find_spec("mypy"), reason="mypy is not installed")
def test_a_users_file(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(USER)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", tmp_path, file],
        env=child_environment(MYPYPATH=child_environment()["PYTHONPATH"].split(":")[0]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert checked.returncode == 0, checked.stdout


def test_every_function_says_what_it_returns():
    """One without any annotation is an error in a user's strict file, wherever it is called."""
    for name in fastattn.__all__:
        public = getattr(fastattn, name)
        if inspect.ismodule(public):  # plot
            continue
        flags = {"return_lse", "return_weights"} & set(inspect.signature(public).parameters)
        by_flags = "@attention\n" in inspect.getsource(public) or flags
        said = inspect.isclass(public) or "return" in public.__annotations__ or by_flags
        assert said, name
