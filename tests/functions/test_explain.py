"""What would run, and why not another (contract, section 3)."""

import tracemalloc

import numpy as np
import pytest
from helpers.problems import Shape

import fastattn
from fastattn.core.problem import make_problem
from fastattn.dispatch import BACKENDS, ON_HOST, unsupported

ARRAYS = Shape(1, 4, 200, 300, 16).arrays()


def test_names_the_target(target):
    found = fastattn.explain(*ARRAYS, backend=target.backend)
    assert found.backend == target.backend
    assert set(found.passed_over) == {b.name for b in BACKENDS} - {target.backend}
    if target.isa is not None:
        assert found.plan["instruction set"] == target.isa
    table = str(found)
    assert table.splitlines()[0].split() == ["backend", target.backend]
    assert len(table.splitlines()) == 3 + len(found.plan) + len(found.passed_over)


def test_default_is_what_runs():
    on_host = [b.name for b in ON_HOST if b.name in fastattn.available_backends()]
    assert fastattn.explain(*ARRAYS).backend == on_host[0]


def test_copies():
    q, k, v = ARRAYS
    assert fastattn.explain(q, k, v).copies == ()
    halves = (x.astype(np.float16) for x in ARRAYS)
    assert fastattn.explain(*halves).copies == ()
    assert fastattn.explain(q.astype(">f4"), k, v.astype(np.float64)).copies == (
        "q",
    )  # k is widened tile by tile
    assert fastattn.explain(q, k, v, out=np.empty(q.shape, ">f4")).copies == ("out",)


def test_allocates_no_result():
    q = np.broadcast_to(np.float32(0), (1024, 4, 1 << 20, 64))
    tracemalloc.start()
    try:
        fastattn.explain(q, q[:, :, :8], q[:, :, :8])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_reasons_of_who_cannot_serve():
    options = {"mask_mod": lambda batch, head, i, j: j <= i}
    found = fastattn.explain(*ARRAYS, **options, backend="reference")
    reasons = {b.name: unsupported(b, make_problem(*ARRAYS, **options)) for b in BACKENDS}
    assert any(reasons.values())  # cython compiles no function of the user's, if it is here
    for name, reason in reasons.items():
        assert found.passed_over[name] == reason or reason is None
    with pytest.raises(ValueError, match=r"^backend: expected one of .*, got 'nobody'$"):
        fastattn.explain(*ARRAYS, backend="nobody")


def test_gradients(target):
    """A backend without a backward pass says so; by default it is passed over."""
    named = fastattn.explain(*ARRAYS, backend=target.backend).gradients
    if target.unsupported_backward(*ARRAYS) is None:
        assert named.split(",")[0] == target.backend
    else:
        assert named.startswith(f"none: backend: {target.backend!r} given, which cannot serve")
    default = fastattn.explain(*ARRAYS).gradients
    first = default.split(",")[0]
    before = [b.name for b in BACKENDS[: [b.name for b in BACKENDS].index(first)]]
    assert all(f"not {name}: " in default for name in before)


def test_what_cython_leaves_to_numpy_under_a_sparse_mask(monkeypatch):
    """Told where NumPy runs, and nowhere else."""
    sparse = pytest.importorskip("scipy.sparse", reason="its arrays are the masks")
    if "cython" not in fastattn.available_backends():
        pytest.skip("the extension is not built")
    from fastattn.backends.cython import backward, weight_maps

    ran = []

    def noted(name, run):
        return lambda *x: ran.append(name) or run(*x)

    for module, name in ((backward.numpy_backward, "run_backward"), (weight_maps, "run_top")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    q, k, v = Shape(2, 4, 20, 30, 16).arrays()
    mask = sparse.csr_array(np.random.default_rng(0).random((20, 30)) < 0.3)
    for operands in ((q, k, v), (q, k[:1], v[:1])):
        found = fastattn.explain(*operands, mask=mask, backend="cython")
        fastattn.top_keys(q, k, 3, mask=mask, backend="cython")
        assert (ran.pop() == "run_top") == found.plan["top_keys"].startswith("by NumPy: ")
        out, pullback = fastattn.vjp(fastattn.scaled_dot, *operands, mask=mask, backend="cython")
        pullback(out)
        assert bool(ran) == ("by NumPy: no kernel for those of arrays" in found.gradients)
    assert ran == ["run_backward"]
    dense = fastattn.explain(q, k, v, backend="cython")
    assert "NumPy" not in f"{dense.plan}{dense.gradients.partition(', not')[0]}"


def test_share_skipped(target):
    if target.backend != "cython":
        pytest.skip(f"{target.backend} does not tell what it skips")
    q = np.zeros((1, 3840, 8), np.float32)  # whole tiles of every instruction set
    assert fastattn.explain(q, q, q, backend="cython").plan["skipped"].startswith("0%")
    causal = fastattn.explain(q, q, q, causal=True, backend="cython").plan["skipped"]
    assert 40 <= int(causal.split("%")[0]) <= 50


def test_show_config(capsys):
    fastattn.show_config()
    told = capsys.readouterr().out
    assert fastattn.__version__ in told
    assert all(b.name in told for b in BACKENDS)


def test_functions():
    """A call of `flex` is explained with its functions, and what is skipped."""
    pytest.importorskip("numba", reason="only Numba compiles a function of the user's")

    def halves(batch, head, i, j):
        return (i < 64) == (j < 64)

    q = np.zeros((2, 128, 16), np.float32)
    made = fastattn.block_mask(halves, 128, 128)
    found = fastattn.explain(q, q, q, score_mod=lambda s, b, h, i, j: s, block_mask=made)
    assert found.backend == "numba"
    assert found.plan["score_mod"] == "<lambda>"
    assert found.plan["mask_mod"] == "halves"
    assert "50% skipped" in found.plan["block_mask"]
    assert found.passed_over["cython"] == "a score_mod or mask_mod cannot be compiled into it"
