from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.compensate.base import RankOverride
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import (
    FactorType,
    fit_scales,
    round_to_nearest,
    store_factors,
)
from eoracc.passes.solvers.factors import eora_factors, svd_factors
from eoracc.passes.solvers.gram import accumulate_gram
from eoracc.plugins.operands.low_rank import LowRank
from tests.passes.groups import correlated, ones, qkv


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_rounds_to_half_a_step_of_each_row(bits: int, largest: int) -> None:
    factor = np.random.default_rng(0).standard_normal((6, 50)) * np.geomspace(1e-3, 1e3, 6)[:, None]
    factor[2] = 0
    scale = fit_scales(factor, bits=bits)
    codes = round_to_nearest(factor, scale, bits=bits)
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == largest
    error = np.abs(codes * scale[:, None] - factor)
    # Codes are rounded after the scale, which float16 moves by too little to cut half a step off.
    assert (error <= (0.5 + largest * 2.0**-52) * scale[:, None]).all()
    assert (scale[2], codes[2].any()) == (0, False)
    assert (scale == scale.astype(np.float16)).all(), "float16 holds it"
    used = np.abs(codes).max(axis=1)
    assert (used[[0, 1, 3, 4, 5]] == largest).all(), "the whole range is used"


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_scales_that_float16_would_move_too_far_are_those_of_float32(
    bits: int, largest: int
) -> None:
    """Steps of float16 are 2^-24 below 2^-14; above 65504 it ends."""
    steps = np.array([1e5, 65500, 2.0**-14, 300.3 * 2.0**-24, 100.5 * 2.0**-24, 1e-9, 1e-30])
    scale = fit_scales(steps[:, None] * np.array([largest, 0.3]), bits=bits)
    expected = steps.astype(np.float32)
    expected[1:4] = steps[1:4].astype(np.float16)
    np.testing.assert_array_equal(scale, expected)


def test_search_narrows_the_range_of_a_row_with_an_outlier() -> None:
    rng = np.random.default_rng(1)
    factor = rng.standard_normal((4, 400))
    factor[0, 0] = 8.0

    def error(scale: NDArray[np.float64]) -> NDArray[np.float64]:
        rounded = round_to_nearest(factor, scale, bits=4) * scale[:, None]
        lost: NDArray[np.float64] = np.linalg.norm(rounded - factor, axis=1)
        return lost

    searched, widest = fit_scales(factor, bits=4, search=True), fit_scales(factor, bits=4)
    assert (error(searched) <= error(widest)).all()
    assert error(searched)[0] < 0.9 * error(widest)[0]
    # Where only the outlier counts, its row keeps the whole range.
    importance = np.zeros(400)
    importance[0] = 1.0
    held = fit_scales(factor, bits=4, search=True, importance=importance)
    assert held[0] == widest[0]


@pytest.mark.parametrize("values", [1e-42, 1e-320])
def test_rows_too_small_for_a_scale_become_zero(values: float) -> None:
    factor = np.full((1, 3), values)
    scale = fit_scales(factor, bits=8)
    assert not scale.any()
    assert not round_to_nearest(factor, scale, bits=8).any()


def test_int8_product_is_close_although_singular_values_fall() -> None:
    """Errors are half a step each; without equal columns in B the last ranks would be lost."""
    rng = np.random.default_rng(1)
    sigma = np.geomspace(1, 1e-4, 16)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (80, 120))
    b, a = u * np.sqrt(sigma), (v * np.sqrt(sigma)).T
    stored = store_factors(b, a, "int8")
    # The steps of A's last rows, 1e-4 / 127 of the first, are below those of float16.
    assert stored.nbytes == 16 * (80 + 120) + 4 * 16 + 2 * 80
    for rank in (0, 15):  # each rank on its own is off by a few steps of its own size
        alone = np.outer(stored.up()[:, rank], stored.down()[rank])
        expected = np.outer(b[:, rank], a[rank])
        assert np.linalg.norm(alone - expected) < 0.05 * np.linalg.norm(expected)
    assert store_factors(b, a, "float16").lora_a.dtype == np.float16


def _lost(target: NDArray[np.float64], factors: LowRank, root: NDArray[np.floating]) -> float:
    """The squared error that is left, in the metric of ``root``."""
    product = factors.up().astype(np.float64) @ factors.down().astype(np.float64)
    return float(np.linalg.norm(target - product @ root) ** 2)


@pytest.mark.parametrize("seed", range(3))
def test_int4_keeps_most_of_what_the_factors_give_back(seed: int) -> None:
    """Rounding both to nearest loses most of it: to noise along inputs that quantization spared."""
    rng = np.random.default_rng(seed)
    gram = accumulate_gram([(correlated(rng, 600, 96), ones(600))], 96)
    root = gram.root.astype(np.float64)
    # What GPTQ leaves is small where inputs are strong.
    delta = rng.standard_normal((64, 96)) @ np.linalg.inv(root)
    b, a = eora_factors(delta, gram.matrix, 16)
    nothing = LowRank(lora_a=np.zeros((0, 96), np.float16), lora_b=np.zeros((64, 0), np.float16))
    exact = LowRank(lora_a=a.astype(np.float32), lora_b=b.astype(np.float32))
    target = delta @ root
    most = _lost(target, nothing, root) - _lost(target, exact, root)

    def kept(factors: LowRank) -> float:
        return (_lost(target, nothing, root) - _lost(target, factors, root)) / most

    b_scale, a_scale = (fit_scales(one, bits=4) for one in (b, a))
    plain = LowRank(
        lora_a=round_to_nearest(a, a_scale, bits=4),
        lora_b=round_to_nearest(b, b_scale, bits=4),
        lora_a_scale=a_scale.astype(np.float32),
        lora_b_scale=b_scale.astype(np.float32),
        bits=4,
    )
    stored = store_factors(b, a, "int4", gram=gram, weighted=target)
    assert stored.factor_type == "int4"
    assert stored.nbytes == 16 * (64 + 96) // 2 + 2 * (16 + 64)
    assert 1 - kept(stored) < 0.5 * (1 - kept(plain))
    assert kept(store_factors(b, a, "int8", gram=gram, weighted=target)) > kept(stored)


@pytest.mark.parametrize("size", [1, 3e-5])
def test_int4_solves_b_again_in_the_metric_of_the_gram(size: float) -> None:
    """What is stored differs from the least-squares B for its own A by the rounding of B alone.

    Scales of the smaller A are moved by up to 2^-8 by float16; B makes up for that.
    """
    rng = np.random.default_rng(4)
    gram = accumulate_gram([(correlated(rng, 600, 96), ones(600))], 96)
    root = gram.root.astype(np.float64)
    delta = rng.standard_normal((64, 96)) * size
    b, a = eora_factors(delta, gram.matrix, 8)
    stored = store_factors(b, a, "int4", gram=gram, weighted=delta @ root)
    assert stored.lora_a_scale is not None
    np.testing.assert_array_equal(stored.lora_a_scale, stored.lora_a_scale.astype(np.float16))
    projected = stored.down().astype(np.float64) @ root
    best = delta @ root @ projected.T @ np.linalg.inv(projected @ projected.T)
    assert stored.lora_b_scale is not None
    error = np.abs(stored.up() - best)
    # Half a step, but where the search has cut a row's largest value off.
    inside = np.abs(stored.lora_b) < 7
    slack = 1e-4 * np.abs(best).max()  # A is solved against in float32
    assert (error <= 0.5 * stored.lora_b_scale[:, None] + slack)[inside].all()
    assert inside.mean() > 0.7


def test_int4_without_a_gram_weighs_all_inputs_alike() -> None:
    rng = np.random.default_rng(5)
    delta = rng.standard_normal((64, 96))
    b, a = svd_factors(delta, 8)
    stored = store_factors(b, a, "int4", weighted=delta)
    down = stored.down().astype(np.float64)
    best = delta @ np.linalg.pinv(down)
    assert stored.lora_b_scale is not None
    inside = np.abs(stored.lora_b) < 7
    error = np.abs(stored.up() - best)
    assert (error <= 0.501 * stored.lora_b_scale[:, None])[inside].all()
    # Nothing but B A to go by: as near to that.
    blind = store_factors(b, a, "int4")
    product = blind.product()
    assert np.linalg.norm(product - b @ a) < 0.3 * np.linalg.norm(b @ a)


@pytest.mark.parametrize("factor_type", ["int8", "int4"])
@pytest.mark.parametrize("rank", [0, 3])
def test_factors_of_nothing(factor_type: FactorType, rank: int) -> None:
    """Rank 0, and factors that are all zero."""
    gram = accumulate_gram([(correlated(np.random.default_rng(6), 99, 24), ones(99))], 24)
    for metric in (None, gram):
        stored = store_factors(np.zeros((16, rank)), np.zeros((rank, 24)), factor_type, gram=metric)
        assert stored.rank == rank
        assert not stored.product().any()


def test_int4_with_a_singular_gram() -> None:
    """Fewer tokens than columns, dead columns, ranks that give nothing of any token."""
    rng = np.random.default_rng(7)
    inputs = correlated(rng, 5, 40)
    inputs[:, 10:20] = 0
    gram = accumulate_gram([(inputs, ones(5))], 40)
    delta = rng.standard_normal((24, 40))
    b, a = eora_factors(delta, gram.matrix, 8)
    stored = store_factors(b, a, "int4", gram=gram, weighted=delta @ gram.root)
    assert np.isfinite(stored.product()).all()
    target = delta @ gram.root.astype(np.float64)
    assert _lost(target, stored, gram.root) < 0.1 * np.linalg.norm(target) ** 2


@pytest.mark.parametrize(("kind", "lost"), [("int8", 0.02), ("int4", 0.2)])
def test_pass_option_and_override(kind: FactorType, lost: float) -> None:
    group, peer = qkv(), qkv()
    for one in (group, peer):
        QuantizeRtn(bits=2).call(one)
    Eora(
        rank=6, factor_type=kind, overrides={"*.k_proj": RankOverride(factor_type="float16")}
    ).call(group)
    Eora(rank=6).call(peer)
    query, key = group.linears
    assert query.factors is not None
    assert key.factors is not None
    assert query.factors.factor_type == kind
    assert key.factors.lora_a.dtype == np.float16
    assert query.factors.lora_a_scale is not None
    assert query.factors.rank == 6
    # What rounding loses of the correction is little against what the correction gives back.
    gained = query.record.errors["quantize_rtn"] - peer.linears[0].record.errors["eora"]
    assert query.record.errors["eora"] - peer.linears[0].record.errors["eora"] <= lost * gained


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_rank_zero_stores_nothing(kind: FactorType) -> None:
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    Eora(rank=0, factor_type=kind).call(group)
    assert [linear.factors for linear in group.linears] == [None, None]
    assert all(
        one.record.errors["eora"] == one.record.errors["quantize_rtn"] for one in group.linears
    )
