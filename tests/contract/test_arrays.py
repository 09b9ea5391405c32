"""Any array NumPy can hold, without copies where the contract says so (section 1, "Arrays")."""

import numpy as np
import pytest
from helpers.layouts import LAYOUTS
from helpers.oracles import assert_solves, check
from helpers.problems import Shape

import fastattn
from fastattn.core.problem import make_problem

SHAPE = Shape(2, 4, 18, 30, 8, kv_heads=2)


@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layouts(target, dtype, layout, which):
    """Any strides, read-only, misaligned, byte-swapped; the inputs stay as they were."""
    plain = dict(zip("qkv", SHAPE.arrays(dtype), strict=True))
    chosen = "qkv" if which == "all" else which
    given = {n: LAYOUTS[layout](x) if n in chosen else x for n, x in plain.items()}
    results = check(target, **given, causal=True)
    if layout != "list":  # a list is float64
        assert_solves(results, make_problem(**plain, causal=True, return_lse=True))
    for name in "qkv":
        np.testing.assert_array_equal(given[name], plain[name])


@pytest.mark.parametrize("layout", ["sequence first", "transposed", "backwards", "every other"])
@pytest.mark.parametrize("n_queries", [1, 40])
def test_strides_over_many_blocks(target, layout, n_queries):
    arrays = Shape(1, 4, n_queries, 1100, 24, kv_heads=2, value_dim=20).arrays()
    check(target, *map(LAYOUTS[layout], arrays))


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("axis", range(4))
def test_zero_strides(target, which, axis):
    given = dict(zip("qkv", SHAPE.arrays(), strict=True))
    x = given[which]
    given[which] = np.broadcast_to(x.take([0], axis), x.shape)
    check(target, **given)


@pytest.mark.parametrize(
    "layout", [n for n in LAYOUTS if n not in ("sequence first", "batch last")]
)
def test_two_dimensional_layouts(target, layout):
    arrays = (x[0, 0] for x in SHAPE.arrays())
    if layout == "transposed":
        check(target, *(np.ascontiguousarray(x.T).T for x in arrays))
    else:
        check(target, *map(LAYOUTS[layout], arrays))


def test_memmap(target, tmp_path):
    arrays = []
    for name, x in zip("qkv", SHAPE.arrays(), strict=True):
        np.save(tmp_path / name, x)
        arrays.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    out, _ = check(target, *arrays)
    assert type(out) is np.ndarray


class Wrapped:
    """Something that `numpy.asarray` takes."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


def test_whatever_asarray_takes(target):
    q, k, v = SHAPE.arrays()
    out, _ = check(target, Wrapped(q), Wrapped(k), Wrapped(v))
    np.testing.assert_array_equal(out, target.attend(q, k, v))


def test_memoryviews(target):
    q, k, v = SHAPE.arrays()
    mask = np.tri(SHAPE.n_queries, SHAPE.n_keys, dtype=bool)
    expected = target.attend(q, k, v, mask=mask)
    out = target.attend(*map(memoryview, (q, k, v)), mask=memoryview(mask))
    np.testing.assert_array_equal(out, expected)


class Subclass(np.ndarray):
    pass


def test_subclass_is_read_as_plain(target):
    q, k, v = SHAPE.arrays()
    out, _ = check(target, *(x.view(Subclass) for x in (q, k, v)))
    np.testing.assert_array_equal(out, target.attend(q, k, v))


@pytest.mark.parametrize("layout", ["transposed", "backwards", "every other", "read-only",
                                    "misaligned", "byte-swapped", "list"])  # fmt: skip
def test_layouts_of_bias(target, layout):
    grid = SHAPE[0], SHAPE.heads, SHAPE.n_queries, SHAPE.n_keys
    bias = np.random.default_rng(1).standard_normal(grid)
    bias[bias > 1] = -np.inf
    check(target, *SHAPE.arrays(), bias=LAYOUTS[layout](bias))


@pytest.mark.parametrize("layout", ["transposed", "backwards", "read-only", "list"])
def test_layouts_of_mask(target, layout):
    grid = SHAPE[0], SHAPE.heads, SHAPE.n_queries, SHAPE.n_keys
    check(
        target, *SHAPE.arrays(), mask=LAYOUTS[layout](np.random.default_rng(1).random(grid) < 0.6)
    )


@pytest.mark.parametrize("layout", ["backwards", "misaligned", "byte-swapped", "list"])
@pytest.mark.parametrize("name", ["sinks", "spans", "kv_lengths", "q_offset"])
def test_layouts_of_small_options(target, name, layout):
    change = LAYOUTS[layout]
    value = {
        "sinks": np.array([0.1, 1.0, 2.0, 3.0]),
        "kv_lengths": np.array([12, 30]),
        "q_offset": np.array([12, -3]),
        "spans": np.arange(18),
    }[name]
    value = (change(value), change(value + 5)) if name == "spans" else change(value)
    check(target, *SHAPE.arrays(), causal=name == "q_offset", **{name: value})


# ------------------------------------------------------------------- what must not be copied


@pytest.mark.parametrize("layout", ["sequence first", "transposed", "backwards", "read-only"])
def test_strided_inputs_are_not_copied(layout):
    """The sequence-first layout is a view, and no copy is made of it."""
    arrays = [LAYOUTS[layout](x) for x in SHAPE.arrays()]
    p = make_problem(*arrays)
    assert not p.copied
    for given, read in zip(arrays, (p.q, p.k, p.v), strict=True):
        assert np.shares_memory(given, read)


@pytest.mark.parametrize("layout", ["transposed", "backwards", "misaligned", "byte-swapped"])
def test_mask_and_bias_are_never_copied(layout):
    grid = SHAPE[0], SHAPE.heads, SHAPE.n_queries, SHAPE.n_keys
    for dtype in ("float16", "float64", "int8"):
        if dtype != "int8" or layout != "misaligned":
            bias = LAYOUTS[layout](np.zeros(grid, dtype))
            assert np.shares_memory(make_problem(*SHAPE.arrays(), bias=bias).bias, bias)
    if layout != "misaligned":
        mask = LAYOUTS[layout](np.zeros(grid, bool))
        assert np.shares_memory(make_problem(*SHAPE.arrays(), mask=mask).mask, mask)


# ------------------------------------------------------------------------- the memory of out


def memory_order(x):
    """The strides of the axes that have any."""
    return [s for s, n in zip(x.strides, x.shape, strict=True) if n > 1]


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "list"])
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("others", ["float32", "float64"])
def test_out_has_the_memory_order_of_q(target, layout, value_dim, others):
    """As ``np.empty_like(q)`` would, whether or not `q` had to be converted."""
    q, k, v = SHAPE._replace(value_dim=value_dim).arrays()
    q = LAYOUTS[layout](q)
    out = target.attend(q, k.astype(others), v)
    wanted = np.empty_like(q, dtype=out.dtype, shape=out.shape)
    assert memory_order(out) == memory_order(wanted)
    assert out.flags.writeable and out.dtype.isnative


def test_out_of_two_axes_has_the_memory_order_of_q(target):
    q, k, v = (x[0, 0] for x in SHAPE.arrays())
    assert target.attend(np.asfortranarray(q), k, v).flags.f_contiguous
    assert target.attend(q, k, v).flags.c_contiguous


def test_out_owns_nothing_of_the_inputs(target):
    q, k, v = SHAPE.arrays()
    out = target.attend(q, k, v)
    assert not any(np.shares_memory(out, x) for x in (q, k, v))


MASKED_OPTIONS = ["q", "k", "v", "mask", "bias", "alibi", "sinks", "kv_lengths", "q_offset", "out"]


@pytest.mark.parametrize("name", MASKED_OPTIONS)
def test_masked_arrays_are_refused(name):
    arguments = dict(zip("qkv", SHAPE.arrays(), strict=True))
    arguments.setdefault(name, np.zeros(4))
    arguments[name] = np.ma.masked_array(arguments[name])
    with pytest.raises(TypeError, match=rf"^{name}: (?i:.*masked ?array)"):
        fastattn.scaled_dot(**arguments)
