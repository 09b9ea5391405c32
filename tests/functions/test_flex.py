"""Functions of the user's in the kernel, against the same functions on the full grid."""

import importlib.util
import math

import numpy as np
import pytest
from helpers.oracles import assert_solves, same_bits
from helpers.problems import Shape, options

import fastattn
from fastattn.core.block_mask import BlockMask
from fastattn.core.problem import make_problem

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="only Numba compiles a function of the user's"
)

SHAPE = Shape(2, 4, 100, 150, 16, kv_heads=2)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
TABLE = np.random.default_rng(5).standard_normal((2, 250)).astype(np.float32)
DOCUMENT_Q = np.repeat(np.arange(3), [30, 45, 25])
DOCUMENT_K = np.repeat(np.arange(3), [64, 16, 70])


# Each kernel takes Numba some ten seconds: one for every pair of functions, dtype, and presence of
# a bias. The tests share a few.


def relative(score, batch, head, i, j):
    if j > i + 100:
        return -math.inf
    return score - SLOPES[head] * abs(i - j) + TABLE[batch, i - j + 149]


def same_document(batch, head, i, j):
    return DOCUMENT_Q[i] == DOCUMENT_K[j]


# Their ends lie anywhere in blocks, strips of keys and vectors of queries.
DOCUMENT = np.repeat(np.arange(7), [1, 15, 17, 63, 66, 130, 40])


def own_document(batch, head, i, j):
    return DOCUMENT[i] == DOCUMENT[j]


def checkerboard(batch, head, i, j):
    return (i // 20 + j // 30 + batch + head) % 2 == 0 and i != 77


def check(dtype="float32", shape=SHAPE, return_lse=True, **opts):
    """Attend by `flex`, hold the results to the reference's and return them."""
    arrays = shape.arrays(dtype)
    results = fastattn.flex(*arrays, return_lse=return_lse, **opts)
    opts.pop("threads", None)
    assert_solves(results, make_problem(*arrays, return_lse=return_lse, **opts))
    return results


def slope_of_one(score, batch, head, i, j):
    return 1.0


def bent(score, batch, head, i, j):
    return score + 0.3 * score * score / (1 + head) if j != 5 else -math.inf


def slope_of_bent(score, batch, head, i, j):
    return 1 + 0.6 * score / (1 + head)


def check_gradients(dtype="float32", shape=SHAPE, wrt=(), **opts):
    """`vjp` of `flex` on Numba gives the reference's gradients; returns them."""
    arrays = shape.arrays(dtype)
    found = []
    for backend in ("numba", "reference"):
        results, pullback = fastattn.vjp(
            fastattn.flex, *arrays, wrt=wrt, return_lse=True, backend=backend, **opts
        )
        grads = [np.random.default_rng(n).standard_normal(x.shape) for n, x in enumerate(results)]
        found.append(pullback(*grads))
    for x, y in zip(*found, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        atol = (2e-5 if dtype == "float32" else 1e-12) * max(1, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    return found[0]


@needs_numba
class TestGradients:
    def test_of_a_mask(self):
        dq, _, _ = check_gradients(mask_mod=checkerboard)
        assert (dq[:, :, 77] == 0).all()
        check_gradients("float64", mask_mod=own_document)

    def test_of_scores(self):
        check_gradients(score_mod=relative, score_grad=slope_of_one)
        check_gradients("float64", score_mod=bent, score_grad=slope_of_bent)

    def test_with_options(self):
        names = ("causal", "bias", "sinks", "alibi", "softcap", "spans", "mask")
        chosen = options(names, SHAPE)
        check_gradients(
            "float64", score_mod=bent, score_grad=slope_of_bent, mask_mod=checkerboard,
            wrt=("bias", "alibi", "sinks"), **chosen,
        )  # fmt: skip

    def test_of_a_block_mask(self):
        n = DOCUMENT.size
        arrays = Shape(1, 2, n, n, 8).arrays()
        made = fastattn.block_mask(own_document, n, n)
        out, pullback = fastattn.vjp(fastattn.flex, *arrays, block_mask=made)
        whole, pull_whole = fastattn.vjp(fastattn.flex, *arrays, mask_mod=own_document)
        assert same_bits(out, whole)
        for x, y in zip(pullback(out), pull_whole(out), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    def test_blocks_that_nobody_sees_are_skipped(self):
        """The block mask hides what its function would show."""
        arrays = Shape(1, 1, 128, 256, 8).arrays()
        liar = fastattn.block_mask(checkerboard, 128, 256)
        assert liar.blocks.all()
        liar.blocks[..., 2:] = 0
        out, pullback = fastattn.vjp(fastattn.flex, *arrays, block_mask=liar)
        _, dk, dv = pullback(out)
        assert (dk[..., 128:, :] == 0).all()
        assert (dv[..., 128:, :] == 0).all()
        assert dk[..., :128, :].any()

    def test_agree_with_a_small_step(self):
        q, k, v = Shape(1, 1, 6, 7, 4).arrays("float64")
        call = {"score_mod": bent, "score_grad": slope_of_bent}
        out, pullback = fastattn.vjp(fastattn.flex, q, k, v, **call)
        dq, _, _ = pullback(out)
        step = 1e-6 * np.random.default_rng(0).standard_normal(q.shape)
        ahead, back = (fastattn.flex(q + x, k, v, bent) for x in (step, -step))
        np.testing.assert_allclose((ahead**2 - back**2).sum() / 4, (dq * step).sum(), rtol=1e-6)


class TestGradientErrors:
    def test_a_score_mod_needs_its_slope(self):
        with pytest.raises(ValueError, match=r"^score_grad: expected the derivative"):
            fastattn.vjp(fastattn.flex, *SHAPE.arrays(), relative)

    def test_a_slope_is_a_function(self):
        with pytest.raises(TypeError, match=r"^score_grad: expected a function, got int"):
            fastattn.vjp(fastattn.flex, *SHAPE.arrays(), relative, score_grad=1)

    @needs_numba
    def test_a_slope_that_cannot_be_compiled(self):
        for wrong in (lambda s: s, lambda s, b, h, i, j: "a"):
            with pytest.raises(TypeError, match=r"^score_grad: .*lambda"):
                fastattn.vjp(fastattn.flex, *SHAPE.arrays(), relative, score_grad=wrong)

    @needs_numba
    def test_flex_ignores_it(self):
        arrays = SHAPE.arrays()
        found = fastattn.flex(*arrays, relative, score_grad=slope_of_one)
        assert same_bits(found, fastattn.flex(*arrays, relative))


@needs_numba
class TestFunctions:
    @pytest.mark.parametrize(
        "dtype, function", [("float32", relative), ("float64", bent), ("float16", relative)]
    )
    def test_score_mod(self, dtype, function):
        check(dtype, score_mod=function)

    def test_mask_mod(self):
        """One row sees nothing."""
        out, lse = check(mask_mod=checkerboard)
        assert (out[:, :, 77] == 0).all()
        assert (lse[:, :, 77] == -np.inf).all()

    def test_infinite_score_hides(self):
        """As a bias of -inf does, NaN in the values included."""
        q, k, v = Shape(1, 1, 20, 130, 8).arrays()
        v[..., 120:, :] = np.nan
        out = fastattn.flex(q, k, v, relative)
        assert_solves(out, make_problem(q, k, v, score_mod=relative))
        assert np.isfinite(out).all()

    @pytest.mark.parametrize(
        "names",
        [("causal",), ("window",), ("kv_lengths",), ("spans", "mask"), ("bias", "sinks", "alibi"),
         ("softcap", "scale"), ("-inf",)],
        ids="-".join,
    )  # fmt: skip
    def test_with_options(self, names):
        chosen = options(names, SHAPE)
        dtype, function = ("float64", bent) if "bias" in chosen else ("float32", relative)
        check(dtype, score_mod=function, mask_mod=checkerboard, **chosen)

    def test_in_pieces(self):
        """Queries side by side that see different keys are computed a vector at a time."""
        check(score_mod=relative, window=(3, 3), q_offset=0)
        check(score_mod=relative, mask_mod=checkerboard, causal=True, q_offset=0)

    def test_weights(self):
        check(score_mod=relative, mask_mod=checkerboard, return_weights=True)

    def test_two_dimensional(self):
        q, k, v = (x[0, 0] for x in SHAPE.arrays())
        out = fastattn.flex(q, k, v, relative)
        assert_solves(out, make_problem(q, k, v, score_mod=relative))

    def test_out(self):
        q, k, v = SHAPE.arrays()
        out = np.empty_like(q)
        assert fastattn.flex(q, k, v, relative, out=out) is out
        assert same_bits(out, fastattn.flex(q, k, v, relative))

    def test_no_function_is_scaled_dot(self):
        arrays = SHAPE.arrays()
        plain = fastattn.scaled_dot(*arrays, backend="numba")
        assert same_bits(fastattn.flex(*arrays, backend="numba"), plain)

    @pytest.mark.parametrize("threads", [2, 5])
    def test_threads_change_no_bit(self, threads):
        arrays = SHAPE.arrays()
        results = [
            fastattn.flex(*arrays, relative, checkerboard, threads=n, return_lse=True)
            for n in (1, threads)
        ]
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))

    def test_compiled_function_of_vectormath(self):
        from numba import njit

        from fastattn import vectormath

        @njit
        def capped(score, batch, head, i, j):
            return 2 * vectormath.tanh(score / 2) + vectormath.exp(-score * score)

        check(score_mod=capped)

    def test_kernels_are_kept(self):
        from fastattn.backends.numba import hooks, launch

        check(score_mod=relative)
        one = launch.launcher(hooks.score_function(relative, 4), None)
        assert one is launch.launcher(hooks.score_function(relative, 4), None)
        before = len(one.signatures)
        check(score_mod=relative)
        assert before == len(one.signatures) >= 1


@needs_numba
class TestBlockMask:
    def test_blocks(self):
        """Counted by hand: blocks of 16 queries and 64 keys."""
        blocks = fastattn.block_mask(same_document, 100, 150).blocks
        grid = DOCUMENT_Q[:, None] == DOCUMENT_K
        wanted = np.zeros((1, 1, 7, 3), np.uint8)
        for row, column in np.ndindex(7, 3):
            block = grid[row * 16 : row * 16 + 16, column * 64 : column * 64 + 64]
            wanted[..., row, column] = 2 if block.all() else 1 if block.any() else 0
        assert {0, 1, 2} == set(wanted.ravel())
        np.testing.assert_array_equal(blocks, wanted)

    @pytest.mark.parametrize("function", [own_document, checkerboard])
    @pytest.mark.parametrize("opts", [{}, {"causal": True}, {"return_weights": True}], ids=str)
    def test_same_as_the_function(self, function, opts):
        made = fastattn.block_mask(function, 100, 150, batch=2, heads=4)
        arrays = SHAPE.arrays()
        for mask in ({"block_mask": made}, {"mask_mod": function}):
            out = fastattn.flex(*arrays, **mask, **opts)
            assert_solves(out, make_problem(*arrays, mask_mod=function, **opts))

    def test_hidden_blocks_are_not_read(self):
        """What is in them would show: a NaN in a key makes every score with it a NaN."""
        made = fastattn.block_mask(own_document, 100, 150)
        q, k, v = SHAPE.arrays()
        k[:, :, DOCUMENT[:150] == 3] = np.nan
        out = fastattn.flex(q, k, v, block_mask=made)
        assert np.isfinite(out[:, :, DOCUMENT[:100] != 3]).all()
        assert np.isnan(out[:, :, DOCUMENT[:100] == 3]).all()

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_documents_of_any_length(self, dtype):
        """What is in one stays there."""
        n = DOCUMENT.size
        q, k, v = Shape(1, 2, n, n, 24, value_dim=20).arrays(dtype)
        k[..., DOCUMENT == 2, 3] = v[..., DOCUMENT == 4, 5] = np.nan
        made = fastattn.block_mask(own_document, n, n)
        results = fastattn.flex(q, k, v, block_mask=made, return_lse=True, return_weights=True)
        wanted = make_problem(q, k, v, mask_mod=own_document, return_lse=True, return_weights=True)
        assert_solves(results, wanted)
        assert np.isfinite(results[0][:, :, (DOCUMENT != 2) & (DOCUMENT != 4)]).all()

    def test_function_is_not_called_where_all_agree(self):
        """Blocks of another function tell whether this one is asked."""
        made = fastattn.block_mask(lambda batch, head, i, j: j < 64, 100, 150)
        assert not (made.blocks == 1).any()
        liar = BlockMask(checkerboard, 100, 150, made.blocks)
        arrays = SHAPE.arrays()
        wanted = fastattn.scaled_dot(*arrays, kv_lengths=64, backend="numba")
        np.testing.assert_array_equal(fastattn.flex(*arrays, block_mask=liar), wanted)

    def test_repr(self):
        made = fastattn.block_mask(same_document, 100, 150)
        assert repr(made).startswith("BlockMask(same_document, (1, 1, 100, 150)")


ARRAYS = Shape(2, 2, 5, 7, 8).arrays()
HALVES = np.zeros(5, np.float16)  # which Numba cannot close over
DATES = np.zeros(1, "M8[D]")


@needs_numba
class TestErrors:
    @pytest.mark.parametrize(
        "opts, message",
        [
            ({"score_mod": 3}, "score_mod: expected a function, got int"),
            ({"mask_mod": np.ones((5, 7), bool)}, "mask_mod: expected a function, got ndarray"),
            ({"block_mask": same_document}, "block_mask: expected the result of"),
            ({"score_mod": lambda score: score}, "score_mod: '<lambda>' cannot be compiled"),
            (
                {"mask_mod": lambda batch, head, i, j: (i, j)},
                "mask_mod: expected a bool",
            ),
            ({"score_mod": lambda s, b, h, i, j: 1j * s}, "score_mod: expected a real number from"),
            ({"score_mod": lambda s, b, h, i, j: s + HALVES[i]}, "score_mod: '<lambda>' cannot"),
            ({"mask_mod": lambda b, h, i, j: DATES[0] == DATES[0]}, "mask_mod: '<lambda>' cannot"),
        ],
        ids=[
            "number",
            "array",
            "mask",
            "arguments",
            "mask-result",
            "score-result",
            "float16",
            "dates",
        ],
    )
    def test_wrong_function(self, opts, message):
        with pytest.raises(TypeError) as caught:
            fastattn.flex(*ARRAYS, **opts)
        assert str(caught.value).startswith(message)

    def test_numbas_reason_is_told(self):
        def uses_a_dict(score, batch, head, i, j):
            return {}.no_such_method(score)

        with pytest.raises(TypeError, match=r"^score_mod: 'uses_a_dict' cannot.*(?s:.*)no_such"):
            fastattn.flex(*ARRAYS, uses_a_dict)

    def test_block_mask_of_other_sizes(self):
        made = fastattn.block_mask(lambda batch, head, i, j: True, 5, 8)
        with pytest.raises(ValueError, match=r"^block_mask: expected .*, got .* \(1, 1, 5, 8\)"):
            fastattn.flex(*ARRAYS, block_mask=made)
        made = fastattn.block_mask(lambda batch, head, i, j: True, 5, 7, heads=3)
        with pytest.raises(ValueError, match=r"^block_mask: expected one made for"):
            fastattn.flex(*ARRAYS, block_mask=made)

    def test_block_mask_of_another_function(self):
        made = fastattn.block_mask(lambda batch, head, i, j: True, 5, 7)
        with pytest.raises(ValueError, match=r"^block_mask: .* mask_mod, got one of another"):
            fastattn.flex(*ARRAYS, mask_mod=checkerboard, block_mask=made)

    @pytest.mark.parametrize("sizes", [(0, 7), (5, -1), (5, 7, 0), (5, 7, 1, 0)])
    def test_block_mask_sizes(self, sizes):
        with pytest.raises(ValueError, match=r"^(n_queries|n_keys|batch|heads): expected "):
            fastattn.block_mask(checkerboard, *sizes)

    def test_what_a_function_raises_arrives(self):
        def stops(score, batch, head, i, j):
            if j == 3:
                raise OverflowError("three")
            return score

        with pytest.raises(OverflowError, match="three"):
            fastattn.flex(*ARRAYS, stops)


@pytest.mark.parametrize("backend", ["cython", "numpy"])
def test_backends_that_cannot_say_so(backend):
    if backend not in fastattn.available_backends():
        pytest.skip(f"{backend} is not here")
    with pytest.raises(ValueError, match=rf"^backend: '{backend}' given, which cannot serve"):
        fastattn.flex(*ARRAYS, relative, backend=backend)


def test_without_numba(monkeypatch):
    """Nobody else can serve: the error tells of each backend why."""
    from fastattn.backends import numba

    monkeypatch.setattr(numba, "_missing", lambda: "numba is not installed")
    with pytest.raises(ValueError, match=r"^backend: none .*numba: numba is not installed"):
        fastattn.flex(*ARRAYS, relative)


def test_reference_serves():
    out = fastattn.flex(*ARRAYS, relative, backend="reference")
    assert_solves(out, make_problem(*ARRAYS, score_mod=relative))
