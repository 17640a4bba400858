from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.adapters.weighted_sum import weighted_sum
from tests.slots_artifact import LAYER, random_factors

Array: TypeAlias = NDArray[np.float64]

NAME = f"{LAYER}.self_attn.q_proj"
UNIT = 2.0**-24


def draw(factor_type: str, seed: int, rank: int = 3) -> LowRank:
    return random_factors(factor_type, rank=rank, seed=seed, linears=(NAME,))[NAME]


def exact(terms: list[tuple[LowRank, float]]) -> Array:
    """The sum of the products, dense in float64."""
    total = np.zeros((terms[0][0].lora_b.shape[0], terms[0][0].lora_a.shape[1]))
    for factors, weight in terms:
        total += weight * (values(factors, "b") @ values(factors, "a"))
    return total


def values(factors: LowRank, factor: str) -> Array:
    codes: Array = getattr(factors, f"lora_{factor}").astype(np.float64)
    scale = getattr(factors, f"lora_{factor}_scale")
    return codes if scale is None else codes * scale.astype(np.float64)[:, None]


def row_scale(factors: LowRank) -> Array:
    assert factors.lora_b_scale is not None
    return factors.lora_b_scale.astype(np.float64)


def product(factors: LowRank) -> Array:
    return values(factors, "b") @ values(factors, "a")


@pytest.mark.parametrize("factor_type", ["float16", "float32"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -1.7), (1.0, 1e-3, 100.0)])
def test_float_factors_are_summed_exactly(factor_type: str, weights: tuple[float, ...]) -> None:
    terms = [(draw(factor_type, seed, rank=2 + seed), w) for seed, w in enumerate(weights)]
    total = weighted_sum(terms)
    assert total.factor_type == factor_type
    assert total.rank == sum(factors.rank for factors, _ in terms)
    # Nothing is rounded but the weights, to float32.
    size = sum(
        abs(w) * np.abs(values(factors, "b")) @ np.abs(values(factors, "a")) for factors, w in terms
    )
    assert (np.abs(product(total) - exact(terms)) <= 2 * UNIT * size).all()


@pytest.mark.parametrize("types", [("int8", "int8"), ("int4", "int8"), ("int4", "int4")])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -1.7), (1e-3, 100.0)])
def test_integer_factors_are_off_by_half_a_step_of_the_coarsest(
    types: tuple[str, str], weights: tuple[float, float]
) -> None:
    terms = [
        (draw(kind, seed, rank=3 + seed), weight)
        for seed, (kind, weight) in enumerate(zip(types, weights, strict=True))
    ]
    total = weighted_sum(terms)
    assert (total.factor_type, total.rank) == ("int8", 7)
    # The error of lora_b as documented, then through lora_a.
    sizes = [abs(w) * np.linalg.norm(values(factors, "a")) for factors, w in terms]
    steps = [row_scale(factors) / (18 if factors.bits == 4 else 1) for factors, _ in terms]
    common = np.max([step * size for step, size in zip(steps, sizes, strict=True)], axis=0)
    bound = sum(
        np.outer(common / size / 2, abs(w) * np.abs(values(factors, "a")).sum(axis=0))
        for (factors, w), size in zip(terms, sizes, strict=True)
    )
    rounding = (
        8
        * UNIT
        * sum(
            abs(w) * np.abs(values(factors, "b")) @ np.abs(values(factors, "a"))
            for factors, w in terms
        )
    )
    error = np.abs(product(total) - exact(terms))
    assert (error <= bound + rounding).all()
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(exact(terms))


def test_term_of_the_largest_steps_keeps_its_codes() -> None:
    large, small = draw("int8", 0), draw("int8", 1)
    total = weighted_sum([(large, 100.0), (small, 1e-4)])
    np.testing.assert_array_equal(total.lora_b[:, : large.rank], large.lora_b)
    np.testing.assert_array_equal(total.lora_a, np.concatenate([large.lora_a, small.lora_a]))


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_one_term_is_exact_and_keeps_its_type(factor_type: str) -> None:
    factors = draw(factor_type, 0)
    assert weighted_sum([(factors, 1.0)]) is factors
    weighted = weighted_sum([(factors, 0.7), (draw(factor_type, 1), 0.0)])
    assert (weighted.factor_type, weighted.rank) == (factor_type, factors.rank)
    np.testing.assert_array_equal(weighted.lora_b, factors.lora_b)
    size = 0.7 * np.abs(values(factors, "b")) @ np.abs(values(factors, "a"))
    assert (np.abs(product(weighted) - 0.7 * product(factors)) <= 2 * UNIT * size).all()


@pytest.mark.parametrize("factor_type", ["float16", "int8"])
def test_nothing_is_left_of_weight_0(factor_type: str) -> None:
    total = weighted_sum([(draw(factor_type, 0), 0.0)])
    assert (total.rank, total.factor_type) == (0, factor_type)
    assert total.product().shape == (48, 40)
    assert not total.product().any()


def test_rows_of_zeros() -> None:
    factors = draw("int8", 0)
    assert factors.lora_b_scale is not None
    scale = factors.lora_b_scale.copy()
    scale[3] = 0
    empty = LowRank(
        lora_a=factors.lora_a,
        lora_b=factors.lora_b,
        lora_a_scale=factors.lora_a_scale,
        lora_b_scale=scale,
    )
    total = weighted_sum([(empty, 1.0), (empty, 1.0)])
    assert np.isfinite(total.product()).all()
    assert not total.product()[3].any()


def test_factors_of_several_types() -> None:
    with pytest.raises(PluginError, match="one type, not float16 and int8"):
        weighted_sum([(draw("float16", 0), 1.0), (draw("int8", 0), 1.0)])
    with pytest.raises(PluginError, match="one type, not none"):
        weighted_sum([])
