"""Constants that several backends, or files that cannot include each other, spell on their own."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastattn.backends.cython import kernel_args
from fastattn.backends.numpy import score_functions, tiles
from fastattn.core import block_mask
from fastattn.core.extension import kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sizes():
    if kernels is None:
        pytest.skip("built without the extension")
    return kernels.tile_sizes()


def source(name: str) -> str:
    return (ROOT / name).read_text()


def test_blocks_of_numpy(sizes):
    """The rounding of a sum depends on the block that it starts from zero in."""
    assert sizes["BLOCK_K"] == tiles.BLOCK_K
    assert sizes["METRIC_BLOCK_D"] == score_functions.CHUNK


def test_sub_blocks_of_block_masks(sizes):
    """So that a sub-block is skipped as a whole."""
    assert sizes["SUB_BLOCK_K"] == block_mask.BLOCK_KEYS


def test_padding_of_relative_biases():
    """A vector of any instruction set may be read beside the table."""
    (lanes,) = re.findall(r"#define MAX_LANES (\d+)", source("csrc/tile_sizes.h"))
    assert int(lanes) == kernel_args._PAD


class TestNumba:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("numba")

    def test_blocks(self, sizes):
        from fastattn.backends.numba import score_functions, tile

        assert sizes["BLOCK_K"] == tile.BLOCK_K
        assert sizes["BLOCK_D"] == tile.BLOCK_D
        assert sizes["BLOCK_D_ONE_VECTOR"] == tile.BLOCK_D_ONE_VECTOR
        assert sizes["SUB_BLOCK_K"] == tile.SUB_BLOCK_K
        assert sizes["FMA_BLOCK_Q_BYTES"] == tile.TILE_BYTES
        assert sizes["METRIC_BLOCK_D"] == score_functions.CHUNK_DIMS

    def test_unit_of_weights(self, sizes):
        from fastattn.backends.numba.exponential import WEIGHT_UNIT

        assert sizes["WEIGHT_UNIT"] == WEIGHT_UNIT

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_polynomial(self, dtype):
        """Of 2**f - 1, as power_less_one of math-inl.h has it: the same numbers in the dtype."""
        from numba import from_dtype

        from fastattn.backends.numba.vectors import _POLYNOMIAL

        body = source("csrc/math-inl.h").partition("INLINE vec power_less_one(")[2]
        double, _, single = body.partition("return y * f;")[0].partition("#else")
        text = single if dtype is np.float32 else double
        found = re.findall(r"(\d+\.\d+(?:e-?\d+)?)f?\)?;", text)
        expected = [dtype(x) for x in _POLYNOMIAL[from_dtype(np.dtype(dtype))]]
        assert [dtype(x) for x in found] == expected


class TestInstructionSets:
    """Names and features in setup.py, instruction_sets.c and kernel_choice.pxi."""

    built = re.findall(r'"(\w+)": \(', source("setup.py"))
    listed = re.findall(r'\.name = "(\w+)"', source("csrc/instruction_sets.c"))
    needs = re.findall(r'\.features = "([\w ]*)"', source("csrc/instruction_sets.c"))

    def test_each_is_built(self):
        assert {"baseline", "neon"} < set(self.built)
        assert set(self.built) == set(self.listed)

    def test_each_needs_those_below_it(self):
        x86_64 = self.needs[: self.listed.index("baseline") + 1]
        assert x86_64[-1] == ""
        for name, above, below in zip(self.listed, x86_64, x86_64[1:], strict=False):
            assert above.split() == [*below.split(), name]

    def test_features_are_those_that_can_be_disabled(self):
        listed = re.search(r"^FEATURES = \((.*)\)", source("csrc/kernel_choice.pxi"), re.M)[1]
        x86_64, arm64 = (self.needs[self.listed.index(x)] for x in ("amx", "neon_bf16"))
        assert [*x86_64.split(), *arm64.split()] == re.findall(r"\w+", listed)
