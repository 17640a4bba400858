from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from eoracc.compiler.eager.int8_activations import (
    linear_tolerance,
    round_activations,
    rounded_activations,
    rounding_tolerance,
)
from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import load as frontend
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.passes.pack_projections import PackProjections
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import random_factors, random_int8_factors, random_weight
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def test_rounds_to_half_a_step_of_each_block() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    x[1, 32:64] = 0
    rounded = round_activations(x, 32)
    for start in range(0, 70, 32):
        block, result = x[:, start : start + 32], rounded[:, start : start + 32]
        step = block.abs().amax(1, keepdim=True) / 127
        assert ((block - result).abs() <= step / 2 * (1 + 1e-5)).all()
        codes = result / torch.where(step > 0, step, torch.ones_like(step))
        np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    assert (rounded[1, 32:64] == 0).all(), "no step, no NaN"
    assert (rounded != x).any()


def linear_of(weight: NBitsWeight, factors: Any) -> Linear:  # noqa: ANN401 - LowRank or None
    node: Any = SimpleNamespace(name="linear")
    return Linear(
        "linear",
        node,
        weight.in_features,
        weight.out_features,
        None,
        False,
        compressed=weight,
        factors=factors,
    )


def rounded(x: NDArray[Any], block: int = 32) -> NDArray[np.float64]:
    result: NDArray[np.float64] = round_activations(torch.from_numpy(x), block).numpy()
    return result


@pytest.mark.parametrize("factors", [None, random_factors, random_int8_factors])
@pytest.mark.parametrize("group_size", [16, 24, 64])
def test_linear_tolerance_covers_rounding_and_little_else(group_size: int, factors: Any) -> None:  # noqa: ANN401
    rng = np.random.default_rng(1)
    shape = (200, 576)
    weight = random_weight(rng, shape, bits=3, group_size=group_size, zero_points=True)
    low_rank = None if factors is None else factors(rng, shape, rank=40)
    x = rng.standard_normal((8, 576), np.float32)
    tolerance = linear_tolerance(linear_of(weight, low_rank), x)
    block = {16: 16, 24: 8, 64: 32}[group_size]
    coarse, dense = rounded(x.astype(np.float64), block), weight.dequantize().astype(np.float64)
    expected, actual = x.astype(np.float64) @ dense.T, coarse @ dense.T
    if low_rank is not None:
        down, up = low_rank.down().astype(np.float64), low_rank.up().astype(np.float64)
        expected += x.astype(np.float64) @ down.T @ up.T
        actual += rounded(coarse @ down.T) @ up.T
    error = np.abs(actual - expected)
    assert (error <= tolerance).all()
    assert error.max() > tolerance.mean() / 8, "no wider than it need be"
    assert np.median(tolerance) < 0.1 * expected.std()


def test_rounded_eager_model_bounds_another_draw(tmp_path: Path) -> None:
    """Logits under a slightly different rounding stay within the tolerance, the exact ones do."""
    loaded = frontend.load(str(tiny_model("gemma3", tmp_path / "model")), work=tmp_path)
    PackProjections(mlp=False).call(loaded.model)
    linears = find_linears(loaded.model)
    for linear in linears:
        QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
    weights = {one.name: one.effective_weight() for one in linears if one.compressed is not None}
    model = load_eager(loaded.folder, weights)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, (2, 12))
    exact = reference_logits(model, ids).reshape(-1, VOCABULARY)
    with rounded_activations(model, linears):
        one = reference_logits(model, ids).reshape(-1, VOCABULARY)
    np.testing.assert_array_equal(reference_logits(model, ids).reshape(-1, VOCABULARY), exact)
    for linear in linears:  # blocks of 8 instead of 16: other steps
        if linear.compressed is not None:
            narrow = linear.compressed
            linear.compressed = NBitsWeight(**(vars(narrow) | {"group_size": 8}))
    with rounded_activations(model, linears):
        other = reference_logits(model, ids).reshape(-1, VOCABULARY)
    tolerance = rounding_tolerance(exact, one)
    moved = np.abs(one - exact).max()
    assert moved > 0
    assert np.abs(other - one).max() > 0
    assert max(moved, np.abs(other - exact).max()) <= tolerance
    assert tolerance < exact.std()


def test_tolerance_of_logits_by_hand() -> None:
    exact = np.zeros((2, 50), np.float32)
    moved = exact.copy()
    moved[0], moved[1] = 1e-3, 3e-3
    deviations = np.sqrt(2 * np.log(2 * 100 / 1e-9))
    assert rounding_tolerance(exact, moved) == pytest.approx(2 * deviations * 3e-3, rel=1e-6)
