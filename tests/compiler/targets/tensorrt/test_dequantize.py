"""Signed weights are what is stored, exactly, whatever its bits, zero points and groups."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.targets.tensorrt.dequantize import (
    SignedWeight,
    rounded_product,
    signed_factors,
)
from eoracc.compiler.targets.tensorrt.half_precision import round_scales
from eoracc.errors import ModelError, PassError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT16, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def stored(
    bits: int, *, zeros: bool, columns: int = 48, group_size: int = 16, seed: int = 0
) -> NBitsWeight:
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    return NBitsWeight.from_codes(
        rng.integers(0, 2**bits, (6, columns)).astype(np.uint8),
        rng.uniform(0.5, 1.5, (6, groups)).astype(np.float16),
        rng.integers(0, 2**bits, (6, groups)).astype(np.uint8) if zeros else None,
        bits=bits,
        group_size=group_size,
    )


def values(signed: SignedWeight) -> NDArray[np.float64]:
    """``(code - offset) * scale`` in float64, which is exact here."""
    scales = signed.scales().astype(np.float64).repeat(signed.block, axis=1)
    codes = signed.codes().astype(np.float64)
    if signed.offset_bits:
        codes -= signed.offsets().repeat(signed.block // 2, axis=1)
    return codes * scales


@pytest.mark.parametrize("columns", [48, 40, 24])
@pytest.mark.parametrize(("bits", "zeros"), list(product((2, 3, 4, 6, 8), (False, True))))
def test_every_value_is_the_stored_one(bits: int, columns: int, *, zeros: bool) -> None:
    weight = stored(bits, zeros=zeros, columns=columns)
    signed = SignedWeight("w", weight, FLOAT16)
    np.testing.assert_array_equal(values(signed), weight.dequantize())
    low, high = {4: (-8, 7), 8: (-128, 127)}[signed.bits]
    assert low <= signed.codes().min()
    assert signed.codes().max() <= high
    assert columns % signed.block == 0


@pytest.mark.parametrize(
    ("bits", "zeros", "expected"),
    [
        (2, True, (4, 0)),
        (3, True, (4, 0)),
        (4, False, (4, 0)),
        (4, True, (4, 4)),
        (6, False, (8, 0)),
        (6, True, (8, 0)),
        (8, False, (8, 0)),
        (8, True, (8, 8)),
    ],
)
def test_bits_in_the_graph(bits: int, expected: tuple[int, int], *, zeros: bool) -> None:
    signed = SignedWeight("w", stored(bits, zeros=zeros), FLOAT16)
    assert (signed.bits, signed.offset_bits) == expected


def test_zero_points_that_are_all_in_the_middle_need_no_offsets() -> None:
    weight = stored(4, zeros=True)
    assert weight.zero_points is not None
    weight.zero_points[:] = 8
    assert SignedWeight("w", weight, FLOAT16).offset_bits == 0
    weight.zero_points[5, 2] = 9
    assert SignedWeight("w", weight, FLOAT16).offset_bits == 4


@pytest.mark.parametrize(("point", "bits"), [(9, 4), (131, 8)])
def test_a_zero_point_beyond_the_codes_is_kept(point: int, bits: int) -> None:
    """The stored form allows any byte."""
    weight = stored(3, zeros=True)
    assert weight.zero_points is not None
    weight.zero_points[2, 1] = point
    signed = SignedWeight("w", weight, FLOAT16)
    assert signed.offset_bits == bits
    np.testing.assert_array_equal(values(signed), weight.dequantize())


def test_a_zero_point_that_cannot_be_stored_is_refused() -> None:
    weight = stored(3, zeros=True)
    assert weight.zero_points is not None
    weight.zero_points[2, 1] = 200
    with pytest.raises(PassError, match="w: has a zero point of 200 at 3 bits"):
        _ = SignedWeight("w", weight, FLOAT16).offset_bits


def test_an_odd_number_of_codes_takes_whole_bytes() -> None:
    weight = stored(4, zeros=False, columns=15)
    odd = NBitsWeight.from_codes(weight.codes()[:5], weight.scales[:5], None, bits=4, group_size=16)
    assert SignedWeight("w", odd, FLOAT16).bits == 8
    np.testing.assert_array_equal(values(SignedWeight("w", odd, FLOAT16)), odd.dequantize())
    assert SignedWeight("w", weight, FLOAT16).bits == 4


def test_blocks_that_cannot_be_halved_are_refused() -> None:
    signed = SignedWeight("layers.0.q_proj", stored(4, zeros=True, columns=15), FLOAT16)
    with pytest.raises(PassError, match=r"layers\.0\.q_proj: has 15 input .*'symmetric: true'"):
        _ = signed.offset_bits
    # Where zero points need no offsets there is nothing to halve.
    assert SignedWeight("w", stored(3, zeros=True, columns=15), FLOAT16).offset_bits == 0


def test_scales_are_rounded_in_the_reference_as_in_the_graph() -> None:
    weight = stored(4, zeros=True)
    rounded = rounded_product("w", weight, None, BFLOAT16)
    np.testing.assert_array_equal(rounded, values(SignedWeight("w", weight, BFLOAT16)))
    assert np.abs(rounded - weight.dequantize()).max() > 2.0**-10
    np.testing.assert_array_equal(rounded_product("w", weight, None, FLOAT16), weight.dequantize())


@pytest.mark.parametrize("kind", ["float16", "float32", "weighted", "int8", "int4"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_factors(kind: str, dtype: ir.DataType) -> None:
    factors = low_rank(kind)
    a, b = signed_factors(factors, dtype, "w")
    numpy = dtype.numpy()

    def rounded(array: Any) -> NDArray[np.float32]:  # noqa: ANN401
        return np.asarray(array).astype(numpy).astype(np.float32)

    if kind in ("int8", "int4"):
        assert (a.bits, b.bits) == ((8, 8) if kind == "int8" else (4, 4))
        assert factors.lora_a_scale is not None
        assert factors.lora_b_scale is not None
        expected_a = factors.lora_a * rounded(factors.lora_a_scale)[:, None]
        expected_b = factors.lora_b * rounded(factors.lora_b_scale)[:, None]
    else:
        assert a.scales is b.scales is None
        expected_a, expected_b = rounded(factors.down()), rounded(factors.up())
    np.testing.assert_array_equal(a.product(), expected_a)
    np.testing.assert_array_equal(b.product(), expected_b)
    weight = stored(4, zeros=False)
    plain = rounded_product("w", weight, None, dtype)
    with_factors = rounded_product("w", weight, factors, dtype)
    np.testing.assert_allclose(
        with_factors, plain + expected_b @ expected_a, rtol=0, atol=8 * 2.0**-24 * 4
    )


def test_a_factor_beyond_float16_is_refused() -> None:
    factors = LowRank(lora_a=np.full((2, 48), 1e5, np.float32), lora_b=np.zeros((6, 2), np.float32))
    with pytest.raises(ModelError, match="w: a low-rank factor holds 1e\\+05"):
        signed_factors(factors, FLOAT16, "w")


def test_scales_below_float16_are_refused() -> None:
    scales = np.array([[0.5, 3e-8], [2.0**-16, 0.1]], np.float32)
    with pytest.raises(ModelError, match=r"w: a scale of 3e-08 is beyond .* choose dtype bfloat16"):
        round_scales(scales, FLOAT16, "w")
    for dtype in (FLOAT16, BFLOAT16):
        assert round_scales(scales[1:], dtype, "w").dtype == dtype.numpy()
    assert round_scales(scales, BFLOAT16, "w")[0, 1] > 0


def low_rank(kind: str) -> LowRank:
    rng = np.random.default_rng(1)
    shapes = (2, 48), (6, 2)
    if kind in ("int8", "int4"):
        bits, largest = (8, 127) if kind == "int8" else (4, 7)
        codes = [rng.integers(-largest, largest + 1, shape).astype(np.int8) for shape in shapes]
        a_scale, b_scale = (
            (rng.uniform(0.1, 0.2, len(one)) / largest).astype(np.float32) for one in codes
        )
        return LowRank(
            lora_a=codes[0],
            lora_b=codes[1],
            lora_a_scale=a_scale,
            lora_b_scale=b_scale,
            bits=bits,
        )
    weight = np.array([0.5, 0.3], np.float32) if kind == "weighted" else None
    a, b = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes)
    if kind == "float16":
        return LowRank(lora_a=a.astype(np.float16), lora_b=b.astype(np.float16))
    return LowRank(lora_a=a, lora_b=b, lora_a_scale=weight)
