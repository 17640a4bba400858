from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eoracc.plugins.operands import BITS, LowRank, NBitsWeight
from eoracc.plugins.reference import fused_matmul
from tests.plugins import native
from tests.plugins.fused_op import Float, assert_close, error_bound, random_factors, random_weight

ISAS = tuple(native.INSTRUCTION_SETS)

# Few rows, the edge between the two ways through the product, and more than a block of rows.
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 40)


def check(
    x: NDArray[Any],
    weight: NBitsWeight,
    factors: LowRank | None = None,
    bias: NDArray[Any] | None = None,
    *,
    isa: str,
) -> None:
    actual = native.multiply(x, weight, factors, bias, instruction_set=isa)
    if actual is None:
        pytest.skip(f"this processor has no {isa}")
    expected = fused_matmul(x, weight, factors, bias)
    assert_close(actual, expected, error_bound(x, weight, factors, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 24, 64, 128, 304])
def test_backbone(isa: str, bits: int, group_size: int, zero_points: bool) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(
        rng,
        (37, 299),
        bits=bits,
        group_size=group_size,
        zero_points=zero_points,
    )
    for rows in ROWS:
        check(rng.standard_normal((rows, 299), np.float32), weight, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (1, 8), (3, 7), (33, 9)])
def test_tiny_and_odd_sizes(isa: str, out_features: int, in_features: int) -> None:
    rng = np.random.default_rng(2)
    for bits in BITS:
        weight = random_weight(
            rng,
            (out_features, in_features),
            bits=bits,
            group_size=16,
            zero_points=True,
        )
        # Magnitudes away from zero, so that a single product is a signal.
        for rows in ROWS:
            check(rng.uniform(1, 2, (rows, in_features)).astype(np.float32), weight, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rank", [0, 1, 5, 16, 33, 300])
def test_low_rank(isa: str, rank: int, dtype: Float) -> None:
    rng = np.random.default_rng(3)
    shape = (45, 130)
    weight = random_weight(rng, shape, bits=3, group_size=32, zero_points=True, scales=dtype)
    factors = random_factors(rng, shape, rank=rank, dtype=dtype)
    bias = rng.standard_normal(45, np.float32)
    for rows in ROWS:
        check(rng.standard_normal((rows, 130), np.float32), weight, factors, bias, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_large_enough_for_every_tile_and_task(isa: str) -> None:
    rng = np.random.default_rng(4)
    shape = (300, 600)
    weight = random_weight(rng, shape, bits=4, group_size=128, zero_points=True)
    factors = random_factors(rng, shape, rank=70)
    check(rng.standard_normal((500, 600), np.float32), weight, factors, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_float16_activations(isa: str, rows: int) -> None:
    rng = np.random.default_rng(5)
    shape = (45, 130)
    weight = random_weight(rng, shape, bits=3, group_size=32, zero_points=True)
    factors = random_factors(rng, shape, rank=6)
    x = rng.standard_normal((rows, 130)).astype(np.float16)
    check(x, weight, factors, rng.standard_normal(45).astype(np.float16), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 30])
def test_int8_factors(isa: str, rows: int) -> None:
    rng = np.random.default_rng(6)
    weight = random_weight(rng, (45, 130), bits=3, group_size=32, zero_points=True)
    a = rng.integers(-127, 128, (19, 130), np.int8)
    b = rng.integers(-127, 128, (45, 19), np.int8)
    a_scale = (rng.uniform(0.5, 1.5, 19) / 500).astype(np.float32)
    b_scale = (rng.uniform(0.5, 1.5, 45) / 500).astype(np.float32)
    x = rng.standard_normal((rows, 130), np.float32)
    stored = LowRank(lora_a=a, lora_b=b)
    actual = native.multiply(
        x, weight, stored, instruction_set=isa, factor_scales=(a_scale, b_scale)
    )
    if actual is None:
        pytest.skip(f"this processor has no {isa}")
    widened = LowRank(
        lora_a=(a * a_scale[:, None]).astype(np.float32),
        lora_b=(b * b_scale[:, None]).astype(np.float32),
    )
    expected = fused_matmul(x, weight, widened)
    # Two products more on each term, and as many in the oracle's own widening.
    assert_close(actual, expected, 2 * error_bound(x, weight, widened, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 500])
def test_order_of_tasks_does_not_matter(isa: str, rows: int) -> None:
    rng = np.random.default_rng(7)
    shape = (300, 320)
    weight = random_weight(rng, shape, bits=3, group_size=64, zero_points=True)
    factors = random_factors(rng, shape, rank=70)
    x = rng.standard_normal((rows, 320), np.float32)
    counts: list[int] = []

    def backwards(count: int) -> list[int]:
        counts.append(count)
        return list(reversed(range(count)))

    forwards = native.multiply(x, weight, factors, instruction_set=isa)
    shuffled = native.multiply(x, weight, factors, instruction_set=isa, order=backwards)
    if forwards is None or shuffled is None:
        pytest.skip(f"this processor has no {isa}")
    assert max(counts) > 1
    np.testing.assert_array_equal(forwards, shuffled)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate(isa: str, rows: int, special: float) -> None:
    rng = np.random.default_rng(8)
    weight = random_weight(rng, (35, 43), bits=4, group_size=16, zero_points=False)
    x = rng.standard_normal((rows, 43), np.float32)
    x[1, 42] = special
    with np.errstate(invalid="ignore"):  # infinity times the code that means 0
        expected = fused_matmul(x, weight, None)
    actual = native.multiply(x, weight, instruction_set=isa)
    if actual is None:
        pytest.skip(f"this processor has no {isa}")
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_array_equal(actual[1], expected[1].astype(np.float32))
    assert np.isfinite(np.delete(actual, 1, axis=0)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 20])
def test_infinite_scale_of_a_short_group(isa: str, rows: int) -> None:
    rng = np.random.default_rng(9)
    weight = random_weight(rng, (3, 17), bits=2, group_size=16, zero_points=False)
    weight.packed[:, 1] = 0b11
    weight.scales[1, 1] = np.inf
    actual = native.multiply(np.ones((rows, 17), np.float32), weight, instruction_set=isa)
    if actual is None:
        pytest.skip(f"this processor has no {isa}")
    assert (actual[:, 1] == np.inf).all()
    assert np.isfinite(actual[:, [0, 2]]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_float16_corners(isa: str) -> None:
    """Every float16, subnormals, infinities and NaN included, is widened and rounded as it must."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    weight = NBitsWeight.from_codes(
        np.ones((len(halves), 1), np.uint8),
        halves[:, None].copy(),
        np.zeros((len(halves), 1), np.uint8),
        bits=2,
        group_size=8,
    )
    widened = native.multiply(np.ones((1, 1), np.float32), weight, instruction_set=isa)
    rounded = native.multiply(np.full((1, 1), 0.7, np.float16), weight, instruction_set=isa)
    if widened is None or rounded is None:
        pytest.skip(f"this processor has no {isa}")
    np.testing.assert_array_equal(widened[0], halves.astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (halves.astype(np.float32) * np.float32(np.float16(0.7))).astype(np.float16)
    np.testing.assert_array_equal(rounded[0], expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("in_features", [8, 24, 128, 136, 259])
def test_nothing_is_read_past_an_operand(isa: str, bits: int, in_features: int) -> None:
    """Weights may be mapped from a file that ends with its page; a read too far is a crash."""
    rng = np.random.default_rng(10)
    guard = native.before_a_guard_page
    drawn = random_weight(rng, (5, in_features), bits=bits, group_size=8, zero_points=True)
    assert drawn.zero_points is not None
    weight = NBitsWeight(
        packed=guard(drawn.packed),
        scales=guard(drawn.scales),
        zero_points=guard(drawn.zero_points),
        bits=bits,
        group_size=8,
        in_features=in_features,
    )
    factors = random_factors(rng, (5, in_features), rank=3)
    factors = LowRank(lora_a=guard(factors.lora_a), lora_b=guard(factors.lora_b))
    bias = guard(np.ones(5, np.float32))
    for rows in (1, 13):
        x = guard(rng.standard_normal((rows, in_features), np.float32))
        check(x, weight, factors, bias, isa=isa)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group_runs=st.integers(1, 20),
    rows=st.integers(0, 30),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 400),
    rank=st.integers(0, 40),
    zero_points=st.booleans(),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    bits: int,
    group_runs: int,
    rows: int,
    out_features: int,
    in_features: int,
    rank: int,
    zero_points: bool,
    isa: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shape = (out_features, in_features)
    weight = random_weight(
        rng, shape, bits=bits, group_size=8 * group_runs, zero_points=zero_points
    )
    factors = random_factors(rng, shape, rank=rank)
    bias = rng.uniform(1, 2, out_features).astype(np.float32)
    x = rng.standard_normal((rows, in_features), np.float32)
    actual = native.multiply(x, weight, factors, bias, instruction_set=isa)
    if actual is not None:
        expected = fused_matmul(x, weight, factors, bias)
        assert_close(actual, expected, error_bound(x, weight, factors, bias))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"in_features": 0},
        {"out_features": 0},
        {"rank": -1},
        {"rank": 4},
        {"bits": 5},
        {"group_size": 12},
        {"group_size": 0},
        {"x_type": 3},
        {"scales_type": 0},
        {"codes": None},
        {"scales": None},
        {"x": None},
    ],
)
def test_bad_operands_are_refused(change: dict[str, int | None]) -> None:
    data = np.zeros(64, np.uint8).ctypes.data
    good = {
        "rows": 1,
        "in_features": 8,
        "out_features": 1,
        "bits": 4,
        "group_size": 8,
        "x_type": 1,
        "scales_type": 1,
        "x": data,
        "y": np.zeros(1, np.float32).ctypes.data,
        "codes": data,
        "scales": data,
    }
    assert native.call(native.Matmul(**good), isa=0) == native.OK
    assert native.call(native.Matmul(**(good | change)), isa=0) == native.BAD_OPERAND


def test_unknown_instruction_set_is_refused() -> None:
    data = np.zeros(64, np.uint8)
    matmul = native.Matmul(
        in_features=8,
        out_features=1,
        bits=4,
        group_size=8,
        x_type=1,
        scales_type=1,
        codes=data.ctypes.data,
        scales=data.ctypes.data,
    )
    assert native.call(matmul, isa=99) == native.NO_SUCH_ISA
