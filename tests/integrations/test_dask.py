"""`fastattn.integrations.dask`: any chunks, every option, the result of the whole."""

import doctest

import numpy as np
import pytest
from helpers.problems import Shape, float_type, options

import fastattn

dask = pytest.importorskip("dask", reason="it is what this integrates with")

import dask.array as da  # noqa: E402

from fastattn.integrations import dask as integration  # noqa: E402

scaled_dot = integration.scaled_dot
SHAPE = Shape(2, 6, 50, 70, 8, kv_heads=2, value_dim=5)
CHUNKS = (1, 2, 20, 3), (2, 1, 30, 8), (1, 2, 33, 4)


@pytest.fixture(autouse=True)
def _one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def check(operands, chunks, **chosen):
    """Against the whole in one call, in float64, where the merging of parts is all that differs."""
    chunked = [da.from_array(x, chunks=c) for x, c in zip(operands, chunks, strict=True)]
    chosen = {"return_lse": True, "return_max": True} | chosen
    found = scaled_dot(*chunked, **chosen)
    whole = {name: x.compute() if isinstance(x, da.Array) else x for name, x in chosen.items()}
    wanted = fastattn.scaled_dot(*operands, **whole)
    for lazy, computed, want in zip(found, dask.compute(*found), wanted, strict=True):
        assert lazy.shape == computed.shape == want.shape and lazy.dtype == computed.dtype
        np.testing.assert_allclose(computed, want, rtol=0, atol=1e-12)
    assert found[1].chunks == found[2].chunks == found[0].chunks[:-1]
    return found[0].chunks


NAMES = [
    (), ("causal",), ("window", "softcap"), ("alibi", "scale"), ("sinks", "causal", "q_offset"),
    ("bias", "mask"), ("kv_lengths",), ("kv_lengths", "window", "sinks"), ("spans", "-inf"),
    ("relative_bias", "scales"), ("relative_bias", "causal", "q_offset", "kv_lengths"),
    ("spans", "q_offset", "alibi", "sinks", "causal", "mask", "kv_lengths"),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_options(names, seed):
    chunks = check(SHAPE.arrays("float64", seed), CHUNKS, **options(names, SHAPE, seed))
    assert chunks == ((1, 1), (2, 2, 2), (20, 20, 10), (5,))


def test_options_as_dask_arrays():
    """In chunks of their own, and with axes that broadcast."""
    names = "bias", "mask", "alibi", "sinks", "kv_lengths", "q_offset", "relative_bias", "scales"
    chosen = options(names, SHAPE)
    chosen["bias"], chosen["mask"] = chosen["bias"][:1, :, :1], chosen["mask"][0, 0]
    chosen = {name: da.from_array(x, chunks=4) for name, x in chosen.items()}
    check(SHAPE.arrays("float64"), CHUNKS, **chosen)
    start, stop = options(("spans",), SHAPE)["spans"]
    lazy = da.from_array(start, chunks=(1, 4, 9)), da.from_array(stop, chunks=(2, 1, 11))
    operands = SHAPE.arrays("float64")
    found = scaled_dot(*map(da.from_array, operands), spans=lazy)
    want = fastattn.scaled_dot(*operands, spans=(start, stop))
    np.testing.assert_allclose(found.compute(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shapes, chunks", [
    (((50, 8), (70, 8), (70, 5)), ((20, 3), (30, 8), (33, 4))),
    (((6, 50, 8), (70, 8), (70, 5)), ((2, 20, 3), (30, 8), (33, 4))),
    (((50, 8), (3, 70, 8), (3, 70, 5)), ((20, 3), (2, 30, 8), (1, 33, 4))),
    (((5, 1, 6, 50, 8), (1, 4, 1, 70, 8), (4, 6, 70, 5)),
     ((2, 1, 4, 20, 3), (1, 2, 1, 30, 8), (1, 3, 33, 4))),
    (((6, 50, 8), (2, 70, 8), (2, 70, 8)), (((1, 4, 1), 20, 3), (1, 20, 8), (2, 10, 4))),
    (((6, 50, 8), (6, 0, 8), (6, 0, 8)), ((2, 20, 3), (3, 0, 8), (3, 0, 4))),
    (((6, 0, 8), (6, 20, 8), (6, 20, 8)), ((2, 0, 3), (3, 10, 8), (3, 10, 4))),
    (((6, 50, 8), (6, 70, 8), (6, 70, 8)),
     ((2, (0, 20, 0, 30), 3), (3, (0, 10, 0, 60), 8), (3, 10, 4))),
], ids=["2-D", "one key head", "one query head", "broadcast", "groups cut", "no keys", "no queries",
        "empty chunks"])  # fmt: skip
def test_shapes(shapes, chunks):
    rng = np.random.default_rng(0)
    operands = [rng.standard_normal(shape) for shape in shapes]
    heads = 1 if len(shapes[0]) == len(shapes[1]) == 2 else 6 if shapes[0][0] != 50 else 3
    found = check(operands, chunks, causal=True, sinks=np.arange(float(heads)))
    queries = da.from_array(operands[0], chunks=chunks[0]).chunks
    kept = [a == b for a, b in zip(found[::-1], queries[::-1], strict=False)]
    same = [sum(a) == sum(b) for a, b in zip(found[::-1], queries[::-1], strict=False)]
    assert kept[1:] == same[1:]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype):
    operands = SHAPE.arrays(dtype)
    found = scaled_dot(*(da.from_array(x, chunks=(1, 3, 30, -1)) for x in operands), causal=True)
    want = fastattn.scaled_dot(*operands, causal=True).astype("float64")
    got = found.compute()
    assert found.dtype == got.dtype == float_type(dtype)
    # Each part is rounded to the dtype, and so is their sum: half an ulp of at most 4 each.
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(got.astype("float64"), want, rtol=0, atol=2 * 4 * eps)


def test_no_block_is_larger_than_its_chunks(monkeypatch):
    seen = []

    def attend(**words):
        seen.append(tuple(words[name].shape for name in ("q", "k", "v", "bias")))
        assert words["threads"] == 1
        return solve(**words)

    solve = fastattn.scaled_dot
    monkeypatch.setattr(fastattn, "scaled_dot", attend)
    chunks = ((1, 3, 20, 3), *CHUNKS[1:])
    operands = [da.from_array(x, chunks=c) for x, c in zip(SHAPE.arrays(), chunks, strict=True)]
    scaled_dot(*operands, bias=da.zeros((6, 50, 70))).compute(optimize_graph=False)
    assert len(seen) == 2 * 2 * 3 * 3
    assert max(seen) == ((1, 3, 20, 8), (1, 1, 30, 8), (1, 1, 30, 5), (3, 20, 30))


@pytest.mark.parametrize("words, error, message", [
    ({"mask": da.zeros((50, 70))}, TypeError, "mask: expected bool, got float64"),
    ({"bias": da.zeros((50, 71))}, ValueError, r"bias: expected .*, got \(50, 71\)"),
    ({"kv_lengths": [3, 71]}, ValueError, "kv_lengths: expected .*, got 71"),
    ({"kv_lengths": da.ones(2, dtype=int), "causal": True}, ValueError, "q_offset: expected a"),
    ({"spans": (1, 2, 3)}, TypeError, "spans: expected .*, got tuple"),
    ({"backend": "nobody"}, ValueError, "backend: expected .*, got 'nobody'"),
    ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
])  # fmt: skip
def test_errors_come_before_any_work(words, error, message):
    operands = map(da.from_array, SHAPE.arrays())
    with pytest.raises(error, match=r"^" + message):
        scaled_dot(*operands, **words)


def test_sparse_mask_is_refused():
    sparse = pytest.importorskip("scipy.sparse", reason="its arrays are such masks")
    operands = map(da.from_array, SHAPE.arrays())
    with pytest.raises(TypeError, match=r"^mask: expected an array, which can be cut, got a spa"):
        scaled_dot(*operands, mask=sparse.csr_array(np.ones((50, 70))))


def test_errors_that_only_the_computation_finds():
    q, k, v = map(da.from_array, SHAPE.arrays())
    found = scaled_dot(q, k, v, kv_lengths=da.from_array(np.array([3, 71])))
    with pytest.raises(ValueError, match=r"^kv_lengths: expected 0\.\.70, got 71$"):
        found.compute()
    unknown = k[:, :, da.ones(70, dtype=bool)]
    with pytest.raises(ValueError, match=r"^k: chunks of unknown size"):
        scaled_dot(q, unknown, v)


def test_docstrings():
    failed, attempted = doctest.testmod(integration)
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)], ids=str)
def test_chunks_drop_what_the_whole_drops(axes):
    rng = np.random.default_rng(6)
    shapes = ((*axes, 4, 50, 8), (*axes, 2, 60, 8), (*axes, 2, 60, 8))
    arrays = [rng.standard_normal(shape) for shape in shapes]
    given = {"dropout": (0.3, 7), "dropout_offset": (1, 2, 3, 4)}
    chunks = [(*(2 for _ in axes), heads, n, 8) for heads, n in ((2, 20), (1, 25), (1, 25))]
    chunked = [da.from_array(x, chunks=c) for x, c in zip(arrays, chunks, strict=True)]
    out = scaled_dot(*chunked, **given)
    expected = fastattn.scaled_dot(*arrays, q_offset=10, **given)
    np.testing.assert_allclose(out.compute(), expected, atol=1e-12)
