"""The alternation on its own: the best is kept, it never gets worse, it ends at a fixed point."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.alternation import alternate
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.passes.solvers.factors import eora_factors, gram_root
from eoracc.passes.solvers.gptq import gptq
from eoracc.passes.solvers.gram import Gram
from eoracc.passes.solvers.grid import round_to_nearest
from eoracc.plugins.operands.dense import StoredWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.passes.groups import correlated

Float = NDArray[np.float32]
RANK = 6


@pytest.fixture
def target() -> Float:
    return np.random.default_rng(3).standard_normal((40, 72)).astype(np.float32)


@pytest.fixture
def gram() -> Gram:
    inputs = correlated(np.random.default_rng(4), 400, 72).astype(np.float64)
    return Gram(inputs.T @ inputs, 400)


def quantized(target: Float, gram: Gram) -> NBitsWeight:
    return gptq(target, gram.matrix, bits=2, group_size=24)


def corrected(delta: Float, gram: Gram, factor_type: FactorType = "float16") -> LowRank:
    weighted = delta @ gram.root
    b, a = eora_factors(delta, gram.matrix, RANK, weighted=weighted)
    return store_factors(b, a, factor_type, gram=gram, weighted=weighted)


def lost(target: Float, weight: StoredWeight, factors: LowRank, gram: Gram) -> float:
    """In float64, by the definition of the output error."""
    delta = target.astype(np.float64) - weight.dequantize() - factors.product()
    return float(np.sqrt(np.trace(delta @ gram.matrix @ delta.T)))


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_keeps_the_best_of_all_iterates_and_gains_on_correction_alone(
    factor_type: FactorType, target: Float, gram: Gram
) -> None:
    weight = quantized(target, gram)
    seen: list[tuple[NBitsWeight, LowRank]] = []

    def correct(delta: Float) -> LowRank:
        seen.append((weight, corrected(delta, gram, factor_type)))
        return seen[-1][1]

    best, errors = alternate(
        target,
        weight,
        quantize=lambda left: quantized(left, gram),
        correct=correct,
        measure=lambda delta: float(np.linalg.norm(delta @ gram.root)),
        iterations=5,
    )
    assert len(errors) == len(seen)
    assert best.error == min(errors)
    # Products in float32 over 72 columns and the 6 of the factors.
    np.testing.assert_allclose(best.error, lost(target, best.weight, best.factors, gram), rtol=1e-4)
    np.testing.assert_allclose(errors[0], lost(target, *seen[0], gram), rtol=1e-4)
    assert best.error < 0.97 * errors[0], "what CALDERA is for"


def test_with_an_exact_quantizer_of_each_half_it_never_gets_worse() -> None:
    """On one fixed grid, and inputs that are all alike, both halves are solved to the optimum."""
    target = np.random.default_rng(5).standard_normal((24, 32)).astype(np.float32)
    grid = round_to_nearest(target, bits=2, group_size=32, symmetric=True, clip_search=False)
    scale = grid.scales.astype(np.float32)

    def nearest(left: Float) -> NBitsWeight:
        codes = np.clip(np.rint(left / scale) + 2, 0, 3).astype(np.uint8)
        return NBitsWeight.from_codes(codes, grid.scales, None, bits=2, group_size=32)

    def correct(delta: Float) -> LowRank:
        b, a = eora_factors(delta.astype(np.float64), np.eye(32), RANK)
        return LowRank(lora_a=a.astype(np.float32), lora_b=b.astype(np.float32))

    best, errors = alternate(
        target,
        nearest(target),
        quantize=nearest,
        correct=correct,
        measure=lambda delta: float(np.linalg.norm(delta)),
        iterations=200,
    )
    rounding = 32 * 2.0**-23 * errors[0]
    assert all(after <= before + rounding for before, after in pairwise(errors))
    assert errors[-1] < errors[0] - 100 * rounding
    # It has ended before its iterations did, where nothing changes any more: a fixed point.
    assert len(errors) < 201
    assert isinstance(best.weight, NBitsWeight)
    again = nearest(target - best.factors.product())
    np.testing.assert_array_equal(again.packed, best.weight.packed)


def test_no_iterations_are_correction_alone(target: Float, gram: Gram) -> None:
    weight = quantized(target, gram)
    best, errors = alternate(
        target,
        weight,
        quantize=lambda _: pytest.fail("asked to quantize"),
        correct=lambda delta: corrected(delta, gram),
        measure=lambda delta: float(np.linalg.norm(delta @ gram.root)),
        iterations=0,
    )
    assert best.weight is weight
    assert len(errors) == 1


def test_an_iterate_that_is_worse_or_no_number_is_not_taken(target: Float, gram: Gram) -> None:
    weight = quantized(target, gram)
    costs = iter([1.0, float("nan"), float("inf"), 2.0])
    best, errors = alternate(
        target,
        weight,
        quantize=lambda left: quantized(left, gram),
        correct=lambda delta: corrected(delta, gram),
        measure=lambda _: next(costs),
        iterations=3,
    )
    assert best.weight is weight
    assert best.error == 1.0
    assert len(errors) == 4


def test_the_earlier_of_two_that_cost_the_same_is_taken(target: Float, gram: Gram) -> None:
    weight = quantized(target, gram)
    best, errors = alternate(
        target,
        weight,
        quantize=lambda left: quantized(left, gram),
        correct=lambda delta: corrected(delta, gram),
        measure=lambda _: 1.0,
        iterations=2,
    )
    assert best.weight is weight
    assert errors == [1.0, 1.0, 1.0]


def test_roots_of_singular_grams_do(target: Float) -> None:
    inputs = np.random.default_rng(6).standard_normal((3, 72))
    gram = Gram(inputs.T @ inputs, 3)
    assert gram_root(gram.matrix).shape == (72, 72)
    best, errors = alternate(
        target,
        quantized(target, gram),
        quantize=lambda left: quantized(left, gram),
        correct=lambda delta: corrected(delta, gram),
        measure=lambda delta: float(np.linalg.norm(delta @ gram.root)),
        iterations=2,
    )
    assert np.isfinite(errors).all()
    assert best.error <= errors[0]
