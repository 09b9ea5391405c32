"""`mask` as a CSR array of SciPy: what it may be, and that it is the mask that it looks like."""

import subprocess
import sys

import numpy as np
import pytest
from helpers.gradients import check_gradients
from helpers.oracles import check, same_bits
from helpers.paging import in_pages
from helpers.problems import Shape, options

import fastattn

sparse = pytest.importorskip("scipy.sparse")

SHAPE = Shape(batch=3, heads=4, n_queries=23, n_keys=31, kv_heads=2, head_dim=8, value_dim=5)


def csr(n_queries=23, n_keys=31, density=0.2, seed=0):
    """Of random entries; row 1 has none and row 2 all."""
    seen = np.random.default_rng([seed, 3]).random((n_queries, n_keys)) < density
    seen[1:2], seen[2:3] = False, True
    return sparse.csr_array(seen)


def untidy(mask, seed=0):
    """The same mask with its indices in any order, some twice, and zeros among the values."""
    rng = np.random.default_rng(seed)
    rows, keys = mask.nonzero()
    hidden = np.argwhere(~mask.toarray())[::3].T
    entries = [(rows, keys, 2.0), (rows[::2], keys[::2], 0.0), (*hidden, 0.0)]
    entries += [(rows[::3], keys[::3], -2.0)]  # adds up to 0
    rows, keys, values = (
        np.concatenate([np.broadcast_to(x[n], x[0].shape) for x in entries]) for n in range(3)
    )
    order = np.lexsort((rng.random(len(rows)), rows))
    starts = np.concatenate(([0], np.bincount(rows, minlength=mask.shape[0]).cumsum()))
    found = sparse.csr_matrix(mask.shape, dtype=float)
    found.data, found.indices, found.indptr = values[order], keys[order], starts
    return found


# ------------------------------------------------------------------------- what it may be


def test_it_is_the_dense_mask_of_its_entries(target):
    q, k, v = SHAPE.arrays()
    mask = csr()
    found = check(target, q, k, v, mask=mask, return_weights=True)
    dense = fastattn.scaled_dot(
        q, k, v, mask=mask.toarray(), return_lse=True, return_weights=True, backend="reference"
    )
    for x, y in zip(found, dense, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix"])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32, np.complex128])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_any_kind_of_values_and_indices(kind, dtype, index):
    q, k, v = SHAPE.arrays()
    mask = getattr(sparse, kind)(csr().astype(dtype))
    mask.indices, mask.indptr = mask.indices.astype(index), mask.indptr.astype(index)
    found = fastattn.scaled_dot(q, k, v, mask=mask)
    assert same_bits(found, fastattn.scaled_dot(q, k, v, mask=csr()))


def test_order_repetition_and_zeros_make_no_difference():
    q, k, v = SHAPE.arrays()
    mask = untidy(csr())
    before = [x.copy() for x in (mask.data, mask.indices, mask.indptr)]
    found = fastattn.scaled_dot(q, k, v, mask=mask)
    assert same_bits(found, fastattn.scaled_dot(q, k, v, mask=csr()))
    for x, y in zip((mask.data, mask.indices, mask.indptr), before, strict=True):
        assert same_bits(x, y)


def test_nan_is_not_zero():
    mask = sparse.csr_array(np.array([[np.nan, 0.0, -0.0]]))
    mask.data = np.array([np.nan])
    out = fastattn.scaled_dot(np.ones((1, 2)), np.ones((3, 2)), np.eye(3), mask=mask)
    np.testing.assert_array_equal(out, [[1, 0, 0]])


def test_one_for_each_entry_of_the_last_leading_axis(target):
    q, k, v = SHAPE.arrays()
    q = np.stack([q, q + 1])
    masks = [csr(seed=n) for n in range(3)]
    found = check(target, q, k, v, mask=masks)[0]
    for n, mask in enumerate(masks):
        each = target.attend(q[:, n], k[n], v[n], mask=mask)
        assert same_bits(found[:, n], each)
    array = np.empty(3, object)
    array[:] = masks
    assert same_bits(target.attend(q, k, v, mask=array), found)


def test_none_for_a_batch_of_none(target):
    q, k, v = (x[:0] for x in SHAPE.arrays())
    assert target.attend(q, k, v, mask=[]).shape == (0, 4, 23, 5)
    with pytest.raises(ValueError, match=r"^mask: expected 3 CSR arrays, .* got 0"):
        fastattn.scaled_dot(*SHAPE.arrays(), mask=[])


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 200)])
def test_sizes(target, sizes):
    n_queries, n_keys = sizes
    q, k, v = Shape(1, 2, n_queries, n_keys, 4).arrays()
    check(target, q, k, v, mask=csr(n_queries, n_keys))
    check(target, q, k, v, mask=sparse.csr_array((n_queries, n_keys), dtype=bool))


def test_long_rows(target):
    q, k, v = Shape(1, 2, 3, 30_000, 4).arrays()
    check(target, q, k, v, mask=csr(3, 30_000, 0.6))
    check_gradients(target, q, k, v, mask=csr(3, 30_000, 0.6))


# -------------------------------------------------------------------------------- errors

Q, K = np.ones((4, 2, 3, 8)), np.ones((4, 2, 5, 8))


@pytest.mark.parametrize("kind", ["coo", "csc", "bsr", "lil", "dok", "dia"])
def test_other_formats_are_an_error_that_says_tocsr(kind):
    mask = csr(3, 5).asformat(kind)
    for given in (mask, [mask] * 4):
        with pytest.raises(TypeError, match=rf"^mask: .*CSR.* got {kind}.*\.tocsr\(\)"):
            fastattn.scaled_dot(Q, K, K, mask=given)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (csr(5, 3), ValueError, r"^mask: expected a CSR array of .* = \(3, 5\), got \(5, 3\)"),
        ([csr(3, 5)] * 3, ValueError, "^mask: expected 4 CSR arrays, .* got 3"),
        ([csr(3, 5)] * 3 + [csr(5, 3)], ValueError, r"^mask: item 3: .* got \(5, 3\)"),
        ([csr(3, 5)] * 3 + [np.ones((3, 5), bool)], TypeError, "^mask: item 3: .* got ndarray"),
        (np.ones((3, 5), np.int8), TypeError, r"^mask: expected bool, got int8; mask.astype\(bool"),
    ],
)  # fmt: skip
def test_errors(mask, error, message):
    with pytest.raises(error, match=message):
        fastattn.scaled_dot(Q, K, K, mask=mask)


def test_a_sequence_needs_a_leading_axis():
    with pytest.raises(ValueError, match=r"^mask: .*sequence.*leading axis"):
        fastattn.scaled_dot(Q[0], K[0], K[0], mask=[csr(3, 5)] * 2)


@pytest.mark.parametrize(
    "part, value",
    [
        ("indices", [0, 5]), ("indices", [-1, 2]), ("indices", [0]), ("indices", [0.0, 1.0]),
        ("indptr", [0, 2, 1, 2]), ("indptr", [1, 2, 2, 2]), ("indptr", [0, 1, 2, 3]),
        ("indptr", [0, 2]), ("data", [True]),
    ],
)  # fmt: skip
def test_what_points_nowhere_is_an_error(part, value):
    class Broken:
        format, shape = "csr", (3, 5)
        data, indices, indptr = np.ones(2), np.array([0, 1]), np.array([0, 1, 2, 2])

    mask = Broken()
    fastattn.scaled_dot(Q, K, K, mask=mask)
    setattr(mask, part, np.array(value))
    with pytest.raises((TypeError, ValueError), match=r"^mask: expected "):
        fastattn.scaled_dot(Q, K, K, mask=mask)


def test_scipy_is_not_imported():
    code = """if True:
        import sys
        import numpy as np
        import fastattn
        x = np.ones((3, 3))
        fastattn.scaled_dot(x, x, x, mask=x > 0, backend="numpy")
        print("scipy" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------- together with the rest


@pytest.mark.parametrize(
    "names",
    ["causal", "window", "q_offset causal", "kv_lengths", "spans", "softcap", "bias", "-inf bias",
     "alibi q_offset", "sinks", "relative_bias", "-inf distances q_offset", "scales",
     "scales softcap", "scale softcap bias alibi sinks window spans",
     "scales bias relative_bias alibi sinks"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dropout", [None, (0.3, 5)])
def test_options(target, names, dtype, dropout):
    q, k, v = SHAPE.arrays(dtype)
    given = options(names.split(), SHAPE, seed=1) | {"dropout": dropout}
    check(target, q, k, v, mask=csr(), return_max=True, return_weights=True, **given)
    check_gradients(target, q, k, v, mask=csr(density=0.5), **given)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(target, dtype):
    q, k, v = SHAPE.arrays(dtype)
    check(target, q, k, v, mask=csr(), return_weights=True)
    check_gradients(target, q, k, v, mask=csr())


@pytest.mark.parametrize("shape", [(4, 1), (1, 1, 1), (1, 23, 1), (4, 1, 31), (23, 31), (31,)])
def test_a_bias_that_broadcasts(target, shape):
    q, k, v = SHAPE.arrays()
    shape = {(4, 1): (4, 1, 1)}.get(shape, shape)
    bias = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    check(target, q, k, v, mask=csr(), bias=bias)
    check_gradients(target, q, k, v, mask=csr(density=0.5), bias=bias)


@pytest.mark.parametrize("offset", [(0, 0, 0, 0), (7, 2**33, 2**33 + 5, 2**35 - 3)])
def test_the_same_weights_are_dropped_as_under_a_dense_mask(target, offset):
    q, k, _ = SHAPE.arrays("float64")
    v, mask = np.broadcast_to(np.eye(31), (3, 2, 31, 31)).copy(), csr(density=0.6)
    dropped = {"dropout": (0.4, 9), "dropout_offset": offset}
    out, pullback = target.vjp(q, k, v, mask=mask, **dropped)
    dense = fastattn.scaled_dot(q, k, v, mask=mask.toarray(), backend="reference", **dropped)
    assert same_bits(out == 0, dense == 0)
    assert 0.3 < (out[:, :, 2] == 0).mean() < 0.5  # row 2 sees all
    grad_v = pullback(np.ones_like(out))[2][..., 0]
    np.testing.assert_allclose(grad_v, out.reshape(3, 2, -1, 31).sum(axis=2), rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_seen_is_never_touched(target, value):
    q, k, v = SHAPE.arrays()
    mask = csr(density=0.3)
    hidden = ~mask.toarray()
    clean = target.attend(q, k, v, mask=mask, causal=True, return_lse=True)
    for row in (0, 5, 22):
        seen = ~hidden[row] & (np.arange(31) <= row + 8)
        k2, v2 = (np.where(seen[:, None], x, value).astype(np.float32) for x in (k, v))
        found = target.attend(q, k2, v2, mask=mask, causal=True, return_lse=True)
        for x, y in zip(found, clean, strict=True):
            assert same_bits(x[:, :, row], y[:, :, row])


def test_what_is_seen_acts_as_the_formula_says(target):
    q, k, v = SHAPE.arrays()
    v[0, 0, 7, 2] = np.inf
    k[1, 1, 9] = np.nan
    q[2, 3, 4] = np.nan
    check(target, q, k, v, mask=csr(density=0.4))


def test_large_numbers(target):
    q, k, v = SHAPE.arrays()
    check(target, q * np.float32(1e25), k * np.float32(1e15), v, mask=csr(), scale=1e-38)
    check(target, q, k, np.full_like(v, 3e38), mask=csr())
    check(target, q * np.float32(1e20), k * np.float32(1e20), v, mask=csr())
    check(target, q, k, v, mask=csr(), relative_bias=np.full((4, 5), 3e38), scale=[1, 2, -1e38, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_lse(target, dtype):
    q, k, v = SHAPE.arrays(dtype)
    check_gradients(target, q * 300, k * 300, v, mask=csr(density=0.5), with_lse=False)


def test_one_head_out_and_strides(target):
    q, k, v = (x[0, 0] for x in SHAPE.arrays())
    out = np.empty((23, 10), np.float32)[:, ::2]
    found = target.attend(q[::-1], k[:, ::-1], v, mask=csr(), out=out)
    assert found is out
    again = target.attend(q[::-1].copy(), k[:, ::-1].copy(), v, mask=csr())
    assert same_bits(out, again)


def test_broadcast_gradients(target):
    q, k, v = SHAPE.arrays()
    check_gradients(target, q[:1], k, v[:, :1], mask=csr())
    check_gradients(target, q, k[:1, :1], v[0], mask=[csr(seed=n) for n in range(3)])


@pytest.mark.parametrize("function", ["dot", "cosine", "gaussian", "euclidean", "additive"])
@pytest.mark.parametrize("backend", ["numpy", None])
def test_other_scores(function, backend):
    q, k, v = SHAPE.arrays("float64")
    rng = np.random.default_rng(0)
    given = {"bias": rng.standard_normal((23, 31)), "causal": True}
    if function == "additive":
        given |= {name: rng.standard_normal((8, 6)) for name in ("w_q", "w_k")}
        given["w"] = rng.standard_normal(6)
    function = getattr(fastattn, function)
    grad = rng.standard_normal((3, 4, 23, 5))
    found = []
    for mask, by in ((csr(density=0.5), backend), (csr(density=0.5).toarray(), "numpy")):
        out, pullback = fastattn.vjp(
            function, q, k, v, mask=mask, wrt=("bias",), backend=by, **given
        )
        found.append((out, *pullback(grad)))
    for x, y in zip(*found, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-11)


def test_gaussian_without_self():
    q = k = np.random.default_rng(0).standard_normal((2, 31, 3))
    v = SHAPE.arrays("float64")[2][0]
    mask = csr(31, 31)
    found = fastattn.gaussian(q, k, v, mask=mask, exclude_self=True)
    dense = fastattn.gaussian(q, k, v, mask=mask.toarray(), exclude_self=True)
    np.testing.assert_allclose(found, dense, rtol=1e-12)


@pytest.mark.parametrize("backend", ["numpy", None])
def test_weight_maps(backend):
    q, k, _ = SHAPE.arrays("float64")
    given = {"causal": True, "sinks": np.ones(4)}
    k[0, 0, 3] = np.nan
    for function, args in (
        (fastattn.key_importance, ()), (fastattn.attention_map, ((4, 5),)),
        (fastattn.top_keys, (3,)), (fastattn.top_keys, (40,)),
    ):  # fmt: skip
        found = function(q, k, *args, mask=csr(), backend=backend, **given)
        dense = function(q, k, *args, mask=csr().toarray(), backend="reference", **given)
        for x, y in zip(np.atleast_1d(found), np.atleast_1d(dense), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)


def test_weight_maps_of_many_queries_do_not_depend_on_the_threads():
    q, k, _ = Shape(2, 4, 600, 700, 8, kv_heads=2).arrays()
    mask = csr(600, 700, 0.05)
    for function, args in ((fastattn.key_importance, ()), (fastattn.attention_map, ((7, 9),))):
        found = function(q, k, *args, mask=mask, threads=3)
        assert same_bits(found, function(q, k, *args, mask=mask, threads=1))
        dense = function(q, k, *args, mask=mask.toarray(), backend="reference")
        np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", [1, 4, 5])
def test_keys_in_pages(target, page):
    q, k, v = SHAPE.arrays()
    lengths = np.array([31, 7, 0])
    n_keys = -(-31 // page) * page
    mask = csr(23, n_keys, 0.4)
    given = {"kv_lengths": lengths, "q_offset": lengths - 23, "causal": True}
    pool_k, pool_v, table = in_pages(k, v, lengths, page)
    call = {"mask": mask, "block_table": table, **given}
    wanted, pull_wanted = fastattn.vjp(
        fastattn.scaled_dot, q, k, v, mask=mask[:, :31], backend="reference", **given
    )
    out = target.attend(q, pool_k, pool_v, **call)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6)
    out, pullback = target.vjp(q, pool_k, pool_v, **call)
    dq, dk, dv = pullback(out)
    np.testing.assert_allclose(dq, pull_wanted(out)[0], rtol=1e-4, atol=1e-5)
    assert dk is dv is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "int8", "int4"])
def test_a_cache(target, dtype):
    q, k, v = Shape(2, 4, 5, 70, 40, kv_heads=2).arrays()
    cache = fastattn.KVCache(2, 2, 40, dtype=dtype)
    cache.append(k, v)
    mask = csr(5, 70)
    target.attend(q, k, v, mask=mask)  # skips where there is no kernel
    found = cache.attend(q, mask=mask, backend=target.backend)
    dense = cache.attend(q, mask=mask.toarray(), backend="reference")
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- promises


def test_same_bits_for_threads_and_slices(target):
    q, k, v = Shape(2, 4, 700, 700, 16, kv_heads=2).arrays()
    mask, bias = csr(700, 700, 0.05), np.random.default_rng(0).standard_normal((4, 301))
    call = {"mask": mask, "wrt": ("relative_bias",), "dropout": (0.2, 1)}
    out, pullback = target.vjp(q, k, v, relative_bias=bias, threads=3, **call)
    grads = pullback(out)
    one, pull_one = target.vjp(q, k, v, relative_bias=bias, threads=1, **call)
    assert same_bits(out, one)
    assert all(same_bits(x, y) for x, y in zip(grads, pull_one(out), strict=True))
    call["dropout_offset"] = (1, 2, 0, 0)
    part, pull_part = target.vjp(q[1:, 2:], k[1:, 1:], v[1:, 1:], relative_bias=bias[2:], **call)
    assert same_bits(part, out[1:, 2:])
    for x, y, first in zip(pull_part(part)[:3], grads[:3], (2, 1, 1), strict=True):
        assert same_bits(x, y[1:, first:])


@pytest.mark.parametrize("name", ["bias", "relative_bias"])
def test_hidden_entries_change_no_bit(target, name):
    """Keys that are hidden by a bias of -inf are as good as not listed."""
    q, k, v = Shape(1, 2, 40, 60, 16).arrays()
    listed = csr(40, 60, 0.3).toarray() != 0
    before = 20 - np.arange(60) + np.arange(40)[:, None]  # how many places a key is before a query
    hidden = (before < -10) & listed
    if name == "bias":
        biases = np.where(hidden, -np.inf, np.random.default_rng(0).standard_normal((2, 40, 60)))
    else:
        biases = np.random.default_rng(0).standard_normal((2, 23))
        biases[:, -1] = -np.inf  # of keys 11 places or more behind the query
    options = {name: biases, "q_offset": 20}
    whole = target.attend(q, k, v, mask=sparse.csr_array(listed), **options)
    less = target.attend(q, k, v, mask=sparse.csr_array(listed & ~hidden), **options)
    assert same_bits(whole, less)


def test_memory_follows_the_entries(target):
    """A dense mask of these queries and keys would take 10 TiB."""
    n = 3_200_000
    q = np.broadcast_to(np.ones((1, 2), np.float32), (n, 2))
    v = np.broadcast_to(np.ones((1, 1), np.float32), (n, 1))
    starts = np.minimum(np.arange(n + 1), 5)
    mask = sparse.csr_array((np.ones(5, bool), np.arange(5), starts), shape=(n, n))
    out = target.attend(q, q, v, mask=mask)
    assert out.sum() == 5
