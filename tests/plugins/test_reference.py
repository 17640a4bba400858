from __future__ import annotations

import numpy as np
import pytest

from eoracc.plugins.operands import BITS
from eoracc.plugins.reference import fused_matmul
from tests.plugins.fused_op import random_factors, random_weight


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_against_dense_product(bits: int, zero_points: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (7, 29)
    weight = random_weight(rng, shape, bits=bits, group_size=8, zero_points=zero_points)
    factors = random_factors(rng, shape, rank=3)
    bias = rng.standard_normal(7)
    x = rng.standard_normal((2, 3, 29))
    dense = weight.dequantize().astype(np.float64)
    dense += factors.lora_b.astype(np.float64) @ factors.lora_a.astype(np.float64)
    expected = np.einsum("abk,nk->abn", x, dense) + bias
    actual = fused_matmul(x, weight, factors, bias)
    assert actual.dtype == np.float64
    # The weight alone is rounded, to float32, in `dequantize`.
    bound = 29 * np.finfo(np.float32).eps * np.abs(x).max() * np.abs(dense).max()
    assert bound < 1e-2 * expected.std()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_without_factors_and_bias() -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, (2, 8), bits=4, group_size=8, zero_points=False)
    empty = random_factors(rng, (2, 8), rank=0)
    x = rng.standard_normal((1, 8))
    np.testing.assert_array_equal(fused_matmul(x, weight, None), fused_matmul(x, weight, empty))
