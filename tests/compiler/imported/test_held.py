from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.compiler.imported.held import held_weight
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.plugins.operands.weight import NBitsWeight


@pytest.mark.parametrize(
    ("bits", "largest_zero", "stored_bits"),
    [
        (2, 3, 2),
        (2, 4, 2),
        (3, 8, 3),
        (4, 15, 4),
        (4, 16, 6),
        (5, 31, 6),
        (7, 100, 8),
        (8, 255, 8),
        (8, 256, None),
    ],
)
def test_values_are_exact_at_every_width(
    bits: int, largest_zero: int, stored_bits: int | None
) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (5, 40)).astype(np.uint8)
    zeros = rng.integers(0, largest_zero + 1, (5, 3)).astype(np.int32)
    zeros[0, 0] = largest_zero
    scales = rng.random((5, 3)).astype(np.float16).astype(np.float32)
    groups = np.arange(40) // 16

    held = held_weight(codes, scales, zeros, bits=bits, groups=groups)

    exact = (codes.astype(np.float64) - zeros[:, groups]) * scales.astype(np.float64)[:, groups]
    np.testing.assert_array_equal(held.weight.dequantize(), exact.astype(np.float32))
    if stored_bits is None:
        assert isinstance(held.weight, DenseWeight)
        assert held.dequantized == "its zero points go to 256"
    else:
        assert isinstance(held.weight, NBitsWeight)
        assert (held.weight.bits, held.dequantized) == (stored_bits, "")
        assert held.weight.scales.dtype == np.float16


def test_middle_zero_points_are_left_out() -> None:
    codes = np.arange(16, dtype=np.uint8)[None]
    scales, middle = np.ones((1, 2), np.float32), np.full((1, 2), 8, np.int32)
    groups = np.arange(16) // 8
    held = held_weight(codes, scales, middle, bits=4, groups=groups).weight
    assert isinstance(held, NBitsWeight)
    assert held.zero_points is None
    other = held_weight(
        codes, scales, middle + np.array([[0, 1]], np.int32), bits=4, groups=groups
    ).weight
    assert isinstance(other, NBitsWeight)
    assert other.zero_points is not None


def test_scales_beyond_float16_stay_float32() -> None:
    scales = np.array([[2.0**-30, 1.0]], np.float32)
    held = held_weight(
        np.ones((1, 16), np.uint8), scales, None, bits=4, groups=np.arange(16) // 8
    ).weight
    assert isinstance(held, NBitsWeight)
    assert held.scales.dtype == np.float32
    np.testing.assert_array_equal(held.scales, scales)


@pytest.mark.parametrize(
    "groups", [np.arange(16) % 2, np.arange(16) // 4, np.r_[np.zeros(4), np.ones(12)].astype(int)]
)
def test_groups_that_are_no_runs_of_eights_become_floats(
    groups: NDArray[np.int64],
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 16)).astype(np.uint8)
    scales = rng.random((3, 4)).astype(np.float32)
    held = held_weight(codes, scales, None, bits=4, groups=groups)
    assert isinstance(held.weight, DenseWeight)
    assert "runs of columns" in held.dequantized
    exact = (codes.astype(np.float64) - 8) * scales.astype(np.float64)[:, groups]
    np.testing.assert_array_equal(held.weight.dequantize(), exact.astype(np.float32))


@pytest.mark.parametrize("columns", [8, 20, 100])
def test_one_group_of_a_whole_row(columns: int) -> None:
    codes = np.random.default_rng(0).integers(0, 8, (2, columns)).astype(np.uint8)
    held = held_weight(
        codes, np.ones((2, 1), np.float32), None, bits=3, groups=np.zeros(columns, np.int32)
    )
    assert held.dequantized == ""
    np.testing.assert_array_equal(held.weight.dequantize(), codes.astype(np.float32) - 4)
