from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.grid import Grid, find_grid, group_width, groups, quantize, to_nbits
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.weight import weight_bytes

HALF_EPS = float(np.finfo(np.float16).eps) / 2
FLOAT_EPS = float(np.finfo(np.float32).eps)

GROUP_SIZES = [16, 24, 64, -1]


def random_weight(rows: int = 33, columns: int = 100) -> NDArray[np.float32]:
    rng = np.random.default_rng(rows * columns)
    return (0.05 * rng.standard_normal((rows, columns))).astype(np.float32)


def decode(weight: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    return to_nbits(quantize(weight, grid), grid).dequantize()


def expanded_scales(grid: Grid, columns: int) -> NDArray[np.float32]:
    return np.repeat(grid.scales.astype(np.float32), grid.group_size, axis=1)[:, :columns]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_without_clipping_every_value_is_within_half_a_step(
    bits: int, group_size: int, symmetric: bool
) -> None:
    weight = random_weight()
    grid = find_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_search=False
    )
    step = expanded_scales(grid, weight.shape[1])
    # A rounded zero point shifts the range by half a step at most, and casting the scale to
    # float16 by as much again of every one of its steps.
    slack = (0.5 if symmetric else 1.0) + 2**bits * HALF_EPS + 2**bits * FLOAT_EPS
    assert (np.abs(decode(weight, grid) - weight) <= slack * step).all()
    assert grid.scales.dtype == np.float16
    assert (grid.zero_points is None) == symmetric


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_ones(bits: int, symmetric: bool) -> None:
    weight = random_weight(9, 40)
    grid = find_grid(weight, bits=bits, group_size=16, symmetric=symmetric)
    quantized = to_nbits(quantize(weight, grid), grid)
    error = np.abs(quantized.dequantize() - weight)
    zero = np.full((9, 40), 2.0 ** (bits - 1))
    if grid.zero_points is not None:
        zero = np.repeat(grid.zero_points.astype(np.float64), 16, axis=1)[:, :40]
    for code in range(2**bits):
        other = np.abs((code - zero) * expanded_scales(grid, 40) - weight)
        # Dividing by the scale decides a tie to within a few roundings of the largest code.
        assert (error <= other + 4 * 2**bits * FLOAT_EPS * float(grid.scales.max())).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_the_clipping_search_never_costs(bits: int, group_size: int, symmetric: bool) -> None:
    weight = random_weight()
    importance = np.linspace(0, 3, weight.shape[1]) ** 4

    def costs(*, clip_search: bool) -> NDArray[np.float64]:
        grid = find_grid(
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            importance=importance,
            clip_search=clip_search,
        )
        squares = (decode(weight, grid).astype(np.float64) - weight) ** 2 * importance
        slabs = groups(weight.shape[1], grid.group_size)
        return np.stack([squares[:, slab].sum(axis=1) for slab in slabs])

    searched, full = costs(clip_search=True), costs(clip_search=False)
    assert (searched <= full * (1 + weight.shape[1] * 8 * FLOAT_EPS) + 1e-12).all()
    if bits < 8:
        # The finer the steps, the less a narrower range gains by them.
        assert searched.sum() < (0.95 if bits < 6 else 0.97) * full.sum()


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight = random_weight(64, 64)
    important = np.arange(64) % 4 == 0
    importance = np.full(64, 1e-3)
    importance[important] = 1
    plain = find_grid(weight, bits=3, group_size=64)
    guided = find_grid(weight, bits=3, group_size=64, importance=importance)
    before, after = ((decode(weight, grid) - weight) ** 2 for grid in (plain, guided))
    assert after[:, important].sum() < 0.95 * before[:, important].sum()
    assert after.sum() > before.sum()


@pytest.mark.parametrize("importance", [np.zeros(32), np.full(32, 1e-300), np.full(32, 1e300)])
def test_extreme_importance_is_taken_relatively(importance: NDArray[np.float64]) -> None:
    weight = random_weight(8, 32)
    plain = find_grid(weight, bits=3, group_size=16)
    weighted = find_grid(weight, bits=3, group_size=16, importance=importance)
    np.testing.assert_array_equal(plain.scales, weighted.scales)


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
class TestEdges:
    def test_zeros_stay_exactly_zero(self, bits: int, symmetric: bool, clip_search: bool) -> None:
        weight = random_weight(6, 48)
        weight[0] = 0
        weight[1, :16] = 0
        weight[:, ::5] = 0
        grid = find_grid(
            weight, bits=bits, group_size=16, symmetric=symmetric, clip_search=clip_search
        )
        assert not decode(weight, grid)[weight == 0].any()

    @pytest.mark.parametrize("constant", [0.3, -0.3, 1e-3, -700.0])
    def test_constant_groups_are_kept_but_for_the_cast(
        self, bits: int, symmetric: bool, clip_search: bool, constant: float
    ) -> None:
        weight = np.full((3, 32), constant, np.float32)
        grid = find_grid(
            weight, bits=bits, group_size=16, symmetric=symmetric, clip_search=clip_search
        )
        # Half a step of float16, which below its smallest normal number is a constant.
        limit = max(HALF_EPS * abs(constant), 2**bits * 2.0**-25)
        assert limit < 0.01 * abs(constant)
        np.testing.assert_allclose(decode(weight, grid), weight, rtol=0, atol=1.01 * limit)

    @pytest.mark.parametrize("magnitude", [1e-30, 1e-9, 3e-7, 1e6, 1e9])
    def test_scales_beyond_float16_give_finite_weights(
        self, bits: int, symmetric: bool, clip_search: bool, magnitude: float
    ) -> None:
        weight = magnitude * random_weight(4, 32) / 0.05
        grid = find_grid(
            weight, bits=bits, group_size=16, symmetric=symmetric, clip_search=clip_search
        )
        assert (grid.scales > 0).all()
        assert np.isfinite(grid.scales).all()
        decoded = decode(weight, grid)
        assert np.isfinite(decoded).all()
        assert (np.sign(decoded) * np.sign(weight) >= 0).all()
        assert (np.abs(decoded) <= 1.5 * np.abs(weight).max() + 2.0**-24).all()


def test_a_single_outlier_does_not_break_its_neighbours() -> None:
    weight = random_weight(4, 32)
    weight[2, 5] = 40
    decoded = decode(weight, find_grid(weight, bits=4, group_size=16))
    assert abs(decoded[2, 5] - 40) < 4
    np.testing.assert_array_equal(
        decoded[:2], decode(weight[:2], find_grid(weight[:2], bits=4, group_size=16))
    )


def test_whole_rows_and_short_last_groups() -> None:
    assert group_width(-1, 100) == 104
    assert [s.stop - s.start for s in groups(100, 64)] == [64, 36]
    assert find_grid(random_weight(), bits=4, group_size=-1).scales.shape == (33, 1)
    assert find_grid(random_weight(), bits=4, group_size=64).scales.shape == (33, 2)


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        *((576, 192), (640, 160), (896, 128), (1536, 192), (2048, 128), (4096, 128), (4864, 128)),
        *((6912, 192), (8960, 160), (11008, 128), (160, 160), (72, 72), (40, 40), (24, 24)),
    ],
)
def test_auto_takes_the_widest_group_that_divides(columns: int, width: int) -> None:
    assert group_width("auto", columns) == width
    assert columns % width == 0


def stored(columns: int, width: int) -> int:
    """Bytes of 64 rows of 3-bit codes with scales and zero points."""
    count = len(list(groups(columns, width)))
    return weight_bytes(64, columns, bits=3, groups=count, scale_bytes=2, zero_points=True)


@pytest.mark.parametrize(
    "columns", [1, 20, 100, 200, 248, 607, 608, 634, 704, 1000, 1002, 1184, 1376, 2752, 10000]
)
def test_auto_costs_about_as_little_as_the_cheapest_width(columns: int) -> None:
    """A divisor would be 32 for 608, 1184 and 1376, which takes half a bit of a weight more."""
    width = group_width("auto", columns)
    assert width <= 192
    assert width % 32 == 0 or width >= columns
    cheapest = min(stored(columns, other) for other in range(96, 193, 8))
    assert stored(columns, width) <= 1.01 * cheapest
    # No group is much shorter than the others unless blocks of 32 columns make it so.
    assert len(list(groups(columns, width))) * width - columns < 32 * -(-columns // 192)
