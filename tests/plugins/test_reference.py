from __future__ import annotations

import numpy as np
import pytest

from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.reference import activate, fused_matmul, rms_norm
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


def test_norm_by_hand() -> None:
    """A row of mean square 4 with epsilon 5 is divided by 3."""
    x = np.array([[2.0, -2.0, 2.0, 2.0]])
    normalised = rms_norm(x, np.array([3.0, 3.0, 6.0, 0.0]), 5.0)
    np.testing.assert_allclose(normalised, [[2.0, -2.0, 4.0, 0.0]], rtol=1e-15)
    rng = np.random.default_rng(2)
    weight = random_weight(rng, (3, 4), bits=4, group_size=8, zero_points=False)
    norm = rng.standard_normal(4)
    np.testing.assert_array_equal(
        fused_matmul(x, weight, None, norm_weight=norm, norm_epsilon=5.0),
        fused_matmul(rms_norm(x, norm, 5.0), weight, None),
    )


def test_activations_against_torch() -> None:
    torch = pytest.importorskip("torch")
    x = np.linspace(-800, 800, 4001)
    given = torch.from_numpy(x)
    silu = torch.nn.functional.silu(given).numpy()
    gelu = torch.nn.functional.gelu(given, approximate="tanh").numpy()
    np.testing.assert_allclose(activate(x, "silu"), silu, rtol=1e-14)
    # 1 + tanh cancels where the result is small: a few unit roundoffs of |x| < 8 are left there.
    np.testing.assert_allclose(activate(x, "gelu_tanh"), gelu, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="'relu' is no activation"):
        activate(x, "relu")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_parts_are_linears_of_their_own(activation: str) -> None:
    """Two merged linears give what each gives alone; the residual comes after the gate."""
    rng = np.random.default_rng(3)
    x, residual = rng.standard_normal((2, 3, 29)), rng.standard_normal((2, 3, 16))
    weight = random_weight(rng, (32, 29), bits=3, group_size=8, zero_points=True)
    merged = random_factors(rng, (32, 29), rank=8)
    merged = LowRank(lora_a=merged.lora_a, lora_b=merged.lora_b[:, :4])
    whole = fused_matmul(x, weight, merged, parts=(16, 16))
    dense = weight.dequantize().astype(np.float64)
    a, b = (factor.astype(np.float64) for factor in (merged.lora_a, merged.lora_b))
    dense[:16] += b[:16] @ a[:4]
    dense[16:] += b[16:] @ a[4:]
    bound = 29 * np.finfo(np.float32).eps * np.abs(x).max() * np.abs(dense).max()
    assert bound < 1e-2 * whole.std()
    np.testing.assert_allclose(whole, x @ dense.T, rtol=0, atol=bound)
    gated = fused_matmul(
        x, weight, merged, parts=(16, 16), activation=activation, residual=residual
    )
    expected = activate(whole[..., :16], activation) * whole[..., 16:] + residual
    np.testing.assert_allclose(gated, expected, rtol=1e-13)


@pytest.mark.parametrize("leading", [(4,), (4, 3)])
def test_an_adapter_is_more_ranks_for_the_rows_that_use_it(leading: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((*leading, 29))
    weight = random_weight(rng, (32, 29), bits=3, group_size=8, zero_points=True)
    baked, first, second = (random_factors(rng, (32, 29), rank=rank) for rank in (3, 5, 2))
    index = [1, -2, 0, 1]
    actual = fused_matmul(
        x,
        weight,
        baked,
        adapters=[first, second],
        adapter_scales=[np.full(5, 0.5), np.ones(2)],
        adapter_index=index,
    )
    for row, used in enumerate(index):
        dense = weight.dequantize() + baked.lora_b.astype(np.float64) @ baked.lora_a
        if used >= 0:
            own = (first, second)[used]
            scale = 0.5 if used == 0 else 1.0
            dense = dense + scale * own.lora_b.astype(np.float64) @ own.lora_a.astype(np.float64)
        bound = 29 * np.finfo(np.float32).eps * np.abs(x).max() * np.abs(dense).max()
        np.testing.assert_allclose(actual[row], x[row] @ dense.T, rtol=0, atol=bound)
    for_all = fused_matmul(x, weight, baked, adapters=[first, second], adapter_index=[1])
    np.testing.assert_array_equal(for_all[0], actual[0])
