"""Keys in pages: the same as `scaled_dot` on each sequence by itself (contract, section 1)."""

import numpy as np
import pytest
from helpers.oracles import assert_solves, same_bits
from helpers.paging import in_pages
from helpers.problems import DTYPES, Shape

import fastattn
from fastattn.core.problem import make_problem

LENGTHS = np.array([150, 0, 67])
SHAPE = Shape(3, 4, 3, 150, 24, kv_heads=2, value_dim=20)


def draw(shape=SHAPE, dtype="float32"):
    return shape.arrays(dtype)


def attend(target, q, k, v, **options):
    return target.attend(q, k, v, return_lse=True, **options)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True, "q_offset": LENGTHS - 3},
    "window": {"window": (20, 0), "q_offset": LENGTHS - 3},
    "score": {"alibi": np.linspace(0.01, 0.5, 4), "sinks": np.zeros(4), "softcap": 2.0,
              "q_offset": LENGTHS - 3},
    "spans": {"spans": (np.array([5, 70, 9]), 140)},
    "relative bias": {"relative_bias": np.sin(np.arange(4 * 21.0)).reshape(4, 21),
                      "scale": np.linspace(-0.1, 0.3, 4), "q_offset": LENGTHS - 3},
}  # fmt: skip


@pytest.mark.parametrize("page", [1, 16, 24, 64, 128, 200])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_sequence_by_itself(target, page, options):
    """NaN in what is no key and garbage in entries that nobody needs change nothing."""
    q, k, v = draw()
    pool_k, pool_v, table = in_pages(k, v, LENGTHS, page)
    out, lse = attend(target, q, pool_k, pool_v, block_table=table, kv_lengths=LENGTHS, **options)
    for b, n in enumerate(LENGTHS):
        own = {name: x[b] if name == "q_offset" else x for name, x in options.items()}
        own["kv_lengths"] = n
        one = slice(b, b + 1)
        p = make_problem(q[one], k[one], v[one], return_lse=True, **own)
        assert_solves((out[one], lse[one]), p)


@pytest.mark.parametrize("n", [1, 9, 40, 140])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_and_number_of_queries(target, n, dtype):
    lengths = [600, 521]
    q, k, v = draw(Shape(2, 4, n, 600, 40, kv_heads=2), dtype)
    pools = in_pages(k, v, lengths, 48)
    offsets = np.array(lengths) - n
    options = {"kv_lengths": lengths, "causal": True, "q_offset": offsets}
    results = attend(target, q, *pools[:2], block_table=pools[2], **options)
    assert_solves(results, make_problem(q, k, v, return_lse=True, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [24, 64])
@pytest.mark.parametrize("n", [1, 40])
def test_pages_change_no_bit(target, dtype, page, n):
    """Where a key lies decides nothing about the order of sums."""
    if not target.bitwise:
        pytest.skip(f"{target.backend} does not promise the same bits")
    q, k, v = draw(Shape(2, 4, n, 4800, 16, kv_heads=2), dtype)
    lengths = [4800, 300]
    *pools, table = in_pages(k, v, lengths, page)
    one = attend(target, q, *pools, block_table=table, kv_lengths=lengths)
    assert all(map(same_bits, one, attend(target, q, k, v, kv_lengths=lengths)))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_definition(options):
    """The reference reads pages as every backend does."""
    q, k, v = draw()
    options = {"kv_lengths": LENGTHS, "backend": "reference", "return_lse": True, **options}
    *pools, table = in_pages(k, v, LENGTHS, 24)
    paged = fastattn.scaled_dot(q, *pools, block_table=table, **options)
    for x, y in zip(
        paged, fastattn.scaled_dot(q, k, v, **{"q_offset": 147, **options}), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_shared_pages_and_one_table_for_all(target):
    q, k, v = draw(Shape(2, 2, 5, 8, 16))
    pool, lengths = (k[:, :, :4], v[:, :, :4]), [8, 5]
    table = [[1, 0]]
    whole = [np.concatenate((x[1], x[0]), axis=1)[None] for x in pool]
    out = target.attend(q, *pool, block_table=table, kv_lengths=lengths)
    assert_solves(out, make_problem(q, *whole, kv_lengths=lengths))


def test_arrays_of_queries_by_keys(target):
    """Their key axis is that of whole pages."""
    q, k, v = draw(Shape(2, 2, 5, 20, 16))
    rng = np.random.default_rng(0)
    lengths = [20, 9]
    *pools, table = in_pages(k, v, lengths, 8)
    bias, mask = rng.standard_normal((2, 2, 5, 24)), rng.random((2, 2, 5, 24)) < 0.7
    out, lse, weights = target.attend(
        q, *pools, block_table=table, kv_lengths=lengths, bias=bias, mask=mask,
        return_lse=True, return_weights=True,
    )  # fmt: skip
    assert (weights[..., 20:] == 0).all()
    options = {"bias": bias[..., :20], "mask": mask[..., :20], "kv_lengths": lengths}
    p = make_problem(q, k, v, return_lse=True, return_weights=True, **options)
    assert_solves((out, lse, weights[..., :20]), p)


def test_pools_of_any_strides(target):
    q, k, v = draw(Shape(2, 2, 3, 20, 16))
    *pools, table = in_pages(k, v, [20, 9], 8)
    strided = [np.asfortranarray(x)[:, ::-1][:, ::-1] for x in pools]
    options = {"block_table": table.astype(np.int32)[:, ::-1][:, ::-1], "kv_lengths": [20, 9]}
    assert_solves(target.attend(q, *strided, **options), make_problem(q, k, v, kv_lengths=[20, 9]))


def test_without_a_page(target):
    q, k, v = (np.zeros(s, np.float32) for s in ((2, 2, 3, 8), (0, 2, 4, 8), (0, 2, 4, 8)))
    for table in (np.zeros((2, 0), int), [[5, 6], [-1, 2]]):
        out, lse = attend(target, q, k, v, block_table=table, kv_lengths=[0, 0])
        assert (out == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("batch, value_dim", [(0, 8), (2, 0), (2, 8)])
def test_sizes_of_zero(target, batch, value_dim, page):
    """Pages without a key, and a batch of none whose table may hold any number."""
    q, k = np.ones((batch, 2, 3, 8), np.float32), np.ones((5, 2, page, 8), np.float32)
    v = np.ones((5, 2, page, value_dim), np.float32)
    lengths = np.full(batch, page)
    table = [[1, 9]]
    out = target.attend(q, k, v, block_table=table, kv_lengths=lengths)
    assert out.shape == (batch, 2, 3, value_dim)
    assert (out == (page > 0)).all()
    assert target.attend(q, k, v, block_table=table, kv_lengths=0).shape == out.shape


@pytest.mark.parametrize("name", [None, "bias", "sinks", "alibi"])
def test_gradients(target, name):
    """Of queries and options; pages are shared, so keys and values have none."""
    shape = Shape(2, 4, 5, 40, 24, kv_heads=2)
    q, k, v = draw(shape, "float64")
    lengths, rng = [40, 21], np.random.default_rng(1)
    *pools, table = in_pages(k, v, lengths, 16)
    options = {"kv_lengths": lengths, "causal": True, "q_offset": np.array(lengths) - 5}
    wide = dict(options)
    if name == "bias":
        wide["bias"] = rng.standard_normal((4, 5, 48))
        options["bias"] = wide["bias"][..., :40]
    elif name is not None:
        wide[name] = options[name] = rng.uniform(0, 1, 4)
    wrt = () if name is None else (name,)
    reason = target.unsupported_backward(q, *pools, block_table=table, wrt=wrt, **wide)
    if reason is not None:
        pytest.skip(f"{target.backend} cannot serve this call: {reason}")
    _, pullback = fastattn.vjp(
        fastattn.scaled_dot, q, *pools, block_table=table, backend=target.backend, wrt=wrt, **wide
    )
    grad_out = rng.standard_normal((2, 4, 5, 24))
    dq, dk, dv, *more = pullback(grad_out)
    assert dk is None and dv is None
    wanted = fastattn.vjp(fastattn.scaled_dot, q, k, v, backend="reference", wrt=wrt, **options)[1](
        grad_out
    )
    np.testing.assert_allclose(dq, wanted[0], atol=1e-12)
    for x, y in zip(more, wanted[3:], strict=True):
        np.testing.assert_allclose(x[..., : y.shape[-1]], y, atol=1e-12)
        assert (x[..., y.shape[-1] :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [64, 24])
def test_gradient_bits_of_keys_in_one_piece(target, dtype, page):
    if target.backend != "cython":
        pytest.skip("it has no kernel for gradients")
    shape = Shape(2, 4, 150, 1152, 24, kv_heads=2)
    q, k, v = draw(shape, dtype)
    *pools, table = in_pages(k, v, [1152, 1152], page)
    options = {"kv_lengths": [1100, 700], "causal": True, "q_offset": [900, 600]}
    options |= {"alibi": [0.5, 0.25, 0.125, 1.0], "wrt": ("alibi",), "backend": target.backend}
    out, back = fastattn.vjp(fastattn.scaled_dot, q, k, v, **options)
    _, back_paged = fastattn.vjp(fastattn.scaled_dot, q, *pools, block_table=table, **options)
    dq, _, _, slopes = back(out)
    found = back_paged(out)
    assert found[1] is found[2] is None
    assert np.array_equal(found[0], dq) and np.array_equal(found[3], slopes)


Q, K, V = draw(Shape(2, 4, 3, 8, 8, kv_heads=2))
ERRORS = [
    ({"kv_lengths": None}, "kv_lengths: expected a value with block_table, got None"),
    ({"block_table": [[0, 2], [1, 0]]}, "block_table: expected pages in 0..1, got 2 for page 1"),
    ({"block_table": [[0, 1], [-1, 0]]}, "block_table: expected pages in 0..1, got -1 for page 0"),
    ({"block_table": [[0, 1]] * 3}, "block_table: expected shape (batch, pages)"),
    ({"block_table": [0, 1]}, "block_table: expected shape (batch, pages)"),
    ({"block_table": [[0.0, 1.0]]}, "block_table: expected integers"),
    ({"block_table": [[True, False]]}, "block_table: expected integers"),
    ({"block_table": np.ma.array([[0, 1]])}, "block_table: expected a plain array"),
    ({"kv_lengths": 17}, "kv_lengths: expected 0..16, got 17"),
    ({"q": Q[0]}, "q: expected shape (batch, heads, queries, head_dim) with block_table"),
    ({"k": K[0]}, "k: expected shape (n_pages, kv_heads, page, head_dim) with block_table"),
    ({"v": V[None]}, "v: expected shape (n_pages, kv_heads, page, value_dim) with block_table"),
    ({"v": V[:, :, :7]}, "v: expected 2 pages of 8 keys as in k, got 2 of 7"),
    ({"v": V[:1]}, "v: expected 2 pages of 8 keys as in k, got 1 of 8"),
    ({"k": K[:, :1].repeat(3, axis=1), "v": V[:, :1].repeat(3, axis=1)}, "k: expected a number"),
    ({"causal": True}, "q_offset: expected a value"),
    ({"mask": np.ones((3, 15), bool)}, "mask: expected a shape"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(changes, message):
    arguments = {"q": Q, "k": K, "v": V, "block_table": [[0, 1], [1, 0]], "kv_lengths": 16}
    out = np.full((2, 4, 3, 8), 7, np.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        fastattn.scaled_dot(**{**arguments, "out": out, **changes})
    assert str(caught.value).startswith(message)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "hidden",
    [
        {"kv_lengths": 8},
        {"window": (2, None), "q_offset": 8, "reverse": True},
        {"spans": (0, 8)},
        {"causal": True, "q_offset": 2},
    ],
    ids=str,
)
def test_an_entry_that_nobody_needs_may_be_anything(target, hidden):
    """Beyond the lengths or hidden from all queries; but not hidden from all but one."""
    hidden = {"kv_lengths": 16, **hidden}
    table = [[-5, 1]] if hidden.pop("reverse", False) else [[1, 10**12]]
    fine = [[0, 1]] if table[0][0] < 0 else [[1, 0]]
    q, k, v = Q[:1], K, V
    if "window" in hidden:  # the queries at 10, 11, 12 see 8 and more
        hidden["q_offset"] = 10
    got = target.attend(q, k, v, block_table=table, **hidden)
    np.testing.assert_array_equal(got, target.attend(q, k, v, block_table=fine, **hidden))
    with pytest.raises(ValueError, match=r"^block_table: "):
        target.attend(q, k, v, block_table=table, kv_lengths=16)
