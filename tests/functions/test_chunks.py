"""Cosine and Gaussian attention in chunks: as exact as in one, in memory that does not grow."""

import sys
from functools import partial

import numpy as np
import pytest
from helpers.gradients import random_like
from helpers.memory import reported
from helpers.oracles import same_bits
from helpers.problems import Shape, options
from test_similarity import OPTIONS, SHAPE, check, cosines, distances, needs_many_axes

import fastattn
from fastattn import chunks, reference
from fastattn.core.problem import make_problem

FUNCTIONS = {
    "cosine": (fastattn.cosine, {"temperature": 0.1}, partial(cosines, temperature=0.1)),
    "product": (fastattn.gaussian, {"alpha": 0.05}, partial(distances, alpha=0.05)),
    "differences": (fastattn.gaussian, {"alpha": 2.0}, partial(distances, alpha=2.0)),
}
PARTS = {"CHUNK_BYTES": 2048, "QUERIES": 8, "KEYS": 16}


@pytest.fixture
def small_chunks(monkeypatch):
    for name, n in PARTS.items():
        monkeypatch.setattr(chunks, name, n)


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_options(small_chunks, name, names):
    function, how, score = FUNCTIONS[name]
    q, k, v = SHAPE.arrays()
    opts = options(names, SHAPE)
    p = make_problem(q, k, v, **opts)
    part = next(chunks.entries(p))
    assert len(list(chunks.runs(p, part))) > 1 and len(list(chunks.blocks(p, part))) > 1
    results = function(q, k, v, return_lse=True, return_weights=True, **how, **opts)
    check(results, p, score)


@pytest.mark.parametrize("how", [{}, {"normalize": False}], ids=str)
@pytest.mark.parametrize("alpha", [0.05, 2.0])
def test_excluded_self(small_chunks, alpha, how):
    q, k, v = SHAPE.arrays()
    results = fastattn.gaussian(q, k, v, alpha=alpha, exclude_self=True, return_lse=True,
                                return_weights=True, **how)  # fmt: skip
    i, j = reference.positions(p := make_problem(q, k, v))
    check(results, p, partial(distances, alpha=alpha), hidden=i == j,
          normalize=how.get("normalize", True))  # fmt: skip


@pytest.mark.parametrize("names", [(), ("alibi", "causal"), ("bias", "sinks"), ("mask", "spans")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(monkeypatch, name, names):
    """Those of the whole; the bias broadcasts, as k does."""
    function, how, _ = FUNCTIONS[name]
    q, k, v = SHAPE.arrays("float64")
    k, opts = k[:, :1], options(names, SHAPE)
    if "bias" in opts:
        opts["bias"] = opts["bias"][:, :1].astype(float)
    wrt = tuple(n for n in ("bias", "alibi", "sinks") if n in opts)
    found = []
    for sizes in ({}, PARTS):
        for key, n in sizes.items():
            monkeypatch.setattr(chunks, key, n)
        (out, lse), pullback = fastattn.vjp(function, q, k, v, wrt=wrt, return_lse=True, **how,
                                            **opts, backend="numpy")  # fmt: skip
        grads = random_like(out), np.where(np.isfinite(lse), random_like(lse, 8), 0)
        found.append((out, lse, *pullback(*grads)))
    for whole, split in zip(*found, strict=True):
        assert whole.shape == split.shape
        # Sums of a few hundred terms of about 1, in another order.
        np.testing.assert_allclose(split, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slices_agree(target, small_chunks, name):
    """One head is spread wide, so that not all are computed in one way; promise 4."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} does not promise the same bits")
    function, how, _ = FUNCTIONS[name]
    q, k, v = Shape(2, 4, 30, 70, 20, kv_heads=2).arrays()
    q[1, 2:] *= 30
    k[1, 1] *= 30
    opts = {**how, "backend": target.backend, "causal": True}
    whole = function(q, k, v, **opts)
    for b in range(2):
        assert same_bits(function(q[b], k[b], v[b], **opts), whole[b])
        for g in range(2):
            heads = slice(2 * g, 2 * g + 2)
            one = function(q[b, heads], k[b, g : g + 1], v[b, g : g + 1], **opts)
            assert same_bits(one, whole[b, heads])


# How much memory calls take whose keys, or whose queries, are 131072 vectors.
PROGRAM = """
import sys
import numpy as np
import fastattn
from helpers.memory import extra, report

backend, *cases = sys.argv[1:]

def measured(name, alpha, many):
    options = {"backend": backend, "threads": 2}
    if name == "gaussian":
        options["alpha"] = float(alpha)
    dtype = np.dtype("float16" if many == "halves" else "float32")
    n_queries, n_keys = (131072, 64) if many == "queries" else (4, 131072)
    q = np.ones((n_queries, 64), np.float32)
    q[:, 0] = np.arange(n_queries) % 7
    k, v = (np.full((n_keys, 64), 0.5, dtype) for _ in range(2))
    k[:, 1] = np.arange(n_keys) % 5
    out = np.zeros_like(q)
    function = getattr(fastattn, name)
    function(q[:9], k[:9], v[:9], **options)  # whatever is made once

    def call():
        function(q, k, v, out=out, **options)
        return ()  # as it was there before

    return extra(call)

report(**{case: measured(*case.split()) for case in cases})
"""
CASES = [
    f"{function} {many}"
    for function in ("cosine 1", "gaussian 0.01", "gaussian 100")
    for many in ("keys", "halves", "queries")
]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.one_instruction_set
def test_no_copy_of_an_operand(target, run_python):
    """131072 vectors are 32 MiB in float32; chunks of 4 MiB and what is made of them, 24."""
    assert not reported(run_python(PROGRAM, target.backend, *CASES), 24)


@needs_many_axes
@pytest.mark.parametrize("function", [fastattn.cosine, fastattn.gaussian])
def test_many_axes(function):
    """NumPy broadcasts no more than 32 axes, and has arrays of 64."""
    q, k, v = (x.reshape(*(1,) * 60, *x.shape) for x in SHAPE.arrays())
    wanted = function(*SHAPE.arrays(), causal=True)
    assert same_bits(function(q, k, v, causal=True).reshape(wanted.shape), wanted)
    out, pullback = fastattn.vjp(function, q, k, v)
    assert [x.shape for x in pullback(out)] == [q.shape, k.shape, v.shape]
