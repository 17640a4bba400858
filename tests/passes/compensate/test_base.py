"""What holds for every compensating pass, and what sets EoRA and plain SVD apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.errors import ConfigError, PassError
from eoracc.passes import load_passes
from eoracc.passes.base import passes_of
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.activation_scaled import ActivationScaled
from eoracc.passes.compensate.base import Compensation, RankOverride, compensation_solver
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.lqer import Lqer
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.compensate.zeroquant_v2 import ZeroQuantV2
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.factors import eora_factors, weighted_norm
from eoracc.passes.solvers.gram import Gram
from eoracc.plugins.operands.low_rank import LowRank
from tests.passes.groups import make_group, qkv

load_passes()

METHODS = passes_of(Compensation)
CALIBRATED = [method for method in METHODS if Calibrate in method.needs]


def solve(
    method: Compensation, linear: Linear, gram: Gram | None, rank: int, factor_type: FactorType
) -> LowRank:
    """Factors that ``method`` gives ``linear``, which keeps its own."""
    method = replace(method, rank=rank, factor_type=factor_type)
    return method.solve(method.lost_output(linear, gram))


@pytest.fixture
def group() -> LinearGroup:
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    return group


@pytest.mark.parametrize("method", METHODS)
def test_adds_float16_factors_that_lower_the_recorded_error(
    method: type[Compensation], group: LinearGroup
) -> None:
    method(rank=6, factor_type="float16").call(group)
    for linear in group.linears:
        assert linear.factors is not None
        assert linear.factors.lora_a.shape == (6, 72)
        assert linear.factors.lora_b.shape == (linear.out_features, 6)
        assert linear.factors.lora_a.dtype == linear.factors.lora_b.dtype == np.float16
        assert linear.record.errors[method.name] < linear.record.errors["quantize_rtn"]
        assert group.gram is not None
        weight = linear.weight()
        left = weighted_norm(weight - linear.effective_weight(), group.gram.matrix)
        np.testing.assert_allclose(
            linear.record.errors[method.name],
            left / weighted_norm(weight, group.gram.matrix),
            rtol=1e-4,
        )


@pytest.mark.parametrize("method", METHODS)
def test_rank_zero_changes_nothing_that_the_linear_computes(
    method: type[Compensation], group: LinearGroup
) -> None:
    before = [linear.effective_weight() for linear in group.linears]
    method(rank=0).call(group)
    for linear, weight in zip(group.linears, before, strict=True):
        np.testing.assert_array_equal(linear.effective_weight(), weight)
        assert linear.record.errors[method.name] == linear.record.errors["quantize_rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_leaves_the_rounding_of_the_factors(
    method: type[Compensation], group: LinearGroup
) -> None:
    method(rank=24, factor_type="float16").call(group)
    k = group.linears[1]
    # A dot product over the rank, each term off by two roundings of float16.
    assert k.record.errors[method.name] < 24 * 2 * 2.0**-11 * k.record.errors["quantize_rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_the_matrix_names_linear_rank_and_limit(
    method: type[Compensation], group: LinearGroup
) -> None:
    with pytest.raises(PassError, match=r"k_proj: rank 25 exceeds .*\[24, 72\].*give 24 at most"):
        method(rank=25).call(group)
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    overridden = method(rank=25, overrides={"*.k_proj": RankOverride(rank=24)})
    overridden.call(group)
    factors = group.linears[1].factors
    assert factors is not None
    assert factors.rank == 24


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_compressed_cannot_be_compensated(method: type[Compensation]) -> None:
    group = qkv()
    with pytest.raises(PassError, match=r"q_proj: is not compressed: put a quantize pass before"):
        method(rank=4).call(group)
    nodes = [linear.node for linear in group.linears]
    method(rank=4, overrides={"*": RankOverride(skip=True)}).call(group)
    assert [linear.node for linear in group.linears] == nodes


@pytest.mark.parametrize("method", METHODS)
def test_what_the_quantizer_was_told_to_skip_is_skipped_too(method: type[Compensation]) -> None:
    group = qkv()
    QuantizeGptq(overrides={"*.q_proj": QuantizeOverride(skip=True)}).call(group)
    method(rank=4).call(group)
    q, k = group.linears
    assert q.compressed is None
    assert q.factors is None
    assert k.factors is not None


def test_eora_beats_svd_in_the_output_and_svd_eora_in_the_weight(group: LinearGroup) -> None:
    eora, svd = compensation_solver("eora"), compensation_solver("svd")
    for linear in group.linears:
        assert group.gram is not None
        delta = linear.weight() - linear.backbone_weight()
        by_output, by_weight = (
            delta - solver(linear, group.gram, 6, "float16").product() for solver in (eora, svd)
        )
        assert linear.factors is None
        gram = group.gram.matrix
        assert weighted_norm(by_output, gram) < 0.9 * weighted_norm(by_weight, gram)
        assert np.linalg.norm(by_weight) < np.linalg.norm(by_output)


def test_solvers_go_by_the_name_of_their_pass() -> None:
    with pytest.raises(KeyError):
        compensation_solver("quantize_rtn")
    with pytest.raises(KeyError):
        compensation_solver("no such pass")


@pytest.mark.parametrize("method", CALIBRATED)
def test_what_goes_by_activations_says_what_to_do_without(method: type[Compensation]) -> None:
    with pytest.raises(PassError, match=rf"has no gram: put 'calibrate' before '{method.name}'"):
        method(rank=4).requires(qkv(tokens=None))
    group = qkv(tokens=None)
    QuantizeRtn(bits=2).call(group)
    with pytest.raises(PassError, match="to go by: put 'calibrate' before it"):
        solve(method(), group.linears[0], None, 4, "float16")


@pytest.mark.parametrize("method", [Svd, ZeroQuantV2])
def test_the_plain_svd_needs_no_gram(method: type[Compensation]) -> None:
    group = qkv(tokens=None)
    QuantizeRtn(bits=2).call(group)
    method(rank=4).call(group)
    assert group.linears[0].factors is not None
    assert group.linears[0].record.errors == {}


def product(method: Compensation, group: LinearGroup, rank: int = 6) -> NDArray[np.float32]:
    """What ``method`` would give the first linear of ``group``."""
    return solve(method, group.linears[0], group.gram, rank, "float16").product()


def test_zeroquant_v2_is_the_plain_svd_at_rank_8(group: LinearGroup) -> None:
    assert ZeroQuantV2().rank == 8
    np.testing.assert_array_equal(product(ZeroQuantV2(), group), product(Svd(), group))


def test_scales_lie_between_those_of_svd_and_lqer(group: LinearGroup) -> None:
    np.testing.assert_array_equal(product(ActivationScaled(alpha=0), group), product(Svd(), group))
    # Lqer's scale is the same but for a factor of all columns, which rounds differently.
    lqer = product(Lqer(), group)
    assert group.gram is not None
    scale, metric = group.gram.magnitudes, Lqer().metric(group.gram)
    assert metric is not None
    np.testing.assert_allclose(
        np.diag(metric.matrix) / np.diag(metric.matrix)[0], (scale / scale[0]) ** 2, rtol=1e-12
    )
    step = 2.0**-10 * float(np.abs(lqer).max())
    np.testing.assert_allclose(product(ActivationScaled(alpha=1), group), lqer, atol=4 * step)
    assert np.abs(product(ActivationScaled(), group) - lqer).max() > 40 * step


def test_the_more_a_method_knows_of_the_input_the_more_output_it_restores() -> None:
    rng = np.random.default_rng(3)
    weights = {"model.layers.0.mlp.up_proj": rng.standard_normal((40, 72)).astype(np.float32)}
    # Columns of unlike size, a little correlated: a diagonal sees most of it and not all.
    inputs = rng.standard_normal((400, 72)) * np.geomspace(4, 0.2, 72)
    inputs += 0.5 * rng.standard_normal((400, 1))
    group = make_group(weights, inputs.astype(np.float32))
    QuantizeRtn(bits=2, clip_search=False).call(group)
    assert group.gram is not None
    linear = group.linears[0]
    delta = linear.weight() - linear.backbone_weight()
    left = [
        weighted_norm(delta - product(method, group), group.gram.matrix)
        for method in (Eora(), Lqer(), ActivationScaled(), Svd())
    ]
    assert left == sorted(left)
    assert left[1] > 1.005 * left[0]
    assert left[3] > 1.1 * left[1]


def test_two_stages_in_one_metric_are_one(group: LinearGroup) -> None:
    once = qkv()
    QuantizeRtn(bits=2).call(once)
    Svd(rank=7, factor_type="float16").call(once)
    Svd(rank=4, factor_type="float16").call(group)
    first = [linear.factors for linear in group.linears]
    ZeroQuantV2(rank=3, factor_type="float16").call(group)
    for linear, other, before in zip(group.linears, once.linears, first, strict=True):
        assert linear.factors is not None
        assert other.factors is not None
        assert before is not None
        assert linear.factors.rank == 7
        np.testing.assert_array_equal(linear.factors.lora_a[:4], before.lora_a)
        # Each of 7 products is off by two roundings of float16.
        apart = np.abs(linear.factors.product() - other.factors.product()).max()
        tolerance = 7 * 2 * 2.0**-11 * np.abs(other.factors.product()).max()
        assert apart < tolerance
        lost = np.abs(linear.weight() - linear.backbone_weight() - before.product()).max()
        assert tolerance < 0.1 * lost


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_a_stage_in_another_metric_takes_up_what_the_first_has_left(
    factor_type: FactorType, group: LinearGroup
) -> None:
    Svd(rank=4, factor_type=factor_type).call(group)
    Eora(rank=4, factor_type=factor_type).call(group)
    alone = qkv()
    QuantizeRtn(bits=2).call(alone)
    Eora(rank=8, factor_type=factor_type).call(alone)
    for linear, other in zip(group.linears, alone.linears, strict=True):
        assert linear.factors is not None
        assert (linear.factors.rank, linear.factors.factor_type) == (8, factor_type)
        assert linear.record.errors["eora"] < 0.97 * linear.record.errors["svd"]
        # No split beats one solution in the metric that the error is measured in.
        assert other.record.errors["eora"] < linear.record.errors["eora"] * (1 + 1e-3)


def test_a_second_stage_of_rank_zero_leaves_the_first_alone(group: LinearGroup) -> None:
    Svd(rank=4, factor_type="int8").call(group)
    first = [linear.factors for linear in group.linears]
    Eora(rank=0).call(group)
    assert [linear.factors for linear in group.linears] == first
    assert all(
        linear.record.errors["eora"] == linear.record.errors["svd"] for linear in group.linears
    )


def test_the_ranks_of_all_stages_count(group: LinearGroup) -> None:
    Svd(rank=20).call(group)
    with pytest.raises(PassError, match=r"k_proj: rank 25 exceeds .*\[24, 72\]"):
        Eora(rank=5).call(group)


@pytest.mark.parametrize("method", METHODS)
def test_int4_factors_are_rounded_in_the_metric_of_the_method(
    method: type[Compensation], group: LinearGroup
) -> None:
    linear, gram = group.linears[0], group.gram
    assert gram is not None
    delta = linear.weight() - linear.backbone_weight()
    metric = method().metric(gram)
    matrix = np.eye(72) if metric is None else metric.matrix
    exact, rounded = (
        weighted_norm(delta - solve(method(), linear, gram, 6, kind).product(), matrix)
        for kind in ("float16", "int4")
    )
    bare = weighted_norm(delta, matrix)
    assert exact < rounded
    # Four bits keep most of what the factors give back.
    assert bare - rounded > 0.8 * (bare - exact)


def test_energy_gives_each_linear_the_rank_that_it_needs(group: LinearGroup) -> None:
    assert group.gram is not None
    Eora(rank=20, energy=0.2).call(group)
    ranks = []
    for linear in group.linears:
        delta = linear.weight() - linear.backbone_weight()
        energies = np.linalg.svd(delta @ group.gram.root, compute_uv=False) ** 2
        tails = 1 - np.concatenate([[0], np.cumsum(energies)]) / energies.sum()
        expected = int(np.flatnonzero(tails <= 0.2)[0])
        assert linear.factors is not None
        assert linear.factors.rank == expected
        assert 0 < expected < 20
        ranks.append(expected)
    assert len(set(ranks)) == 2


def test_energy_never_exceeds_the_rank_and_nests(group: LinearGroup) -> None:
    linear, gram = group.linears[0], group.gram
    whole = solve(Eora(), linear, gram, 6, "float16")
    np.testing.assert_array_equal(
        solve(Eora(energy=0), linear, gram, 6, "float16").lora_a, whole.lora_a
    )
    assert solve(Eora(energy=1), linear, gram, 6, "float16").rank == 0
    fewer = solve(Eora(energy=0.6), linear, gram, 20, "float16")
    assert 0 < fewer.rank < 20
    np.testing.assert_array_equal(
        fewer.lora_a, solve(Eora(), linear, gram, 20, "float16").lora_a[: fewer.rank]
    )


def test_energy_holds_for_the_plain_svd_that_few_tokens_get() -> None:
    group = qkv(tokens=5)
    QuantizeRtn(bits=2).call(group)
    linear = group.linears[0]
    found = solve(Eora(energy=0.5), linear, group.gram, 20, "float16")
    energies = np.linalg.svd(linear.weight() - linear.backbone_weight(), compute_uv=False) ** 2
    tails = 1 - np.concatenate([[0], np.cumsum(energies)]) / energies.sum()
    assert found.rank == int(np.flatnonzero(tails <= 0.5)[0])


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_energy_of_the_gram_gives_linears_of_one_input_one_rank(
    share: float, group: LinearGroup
) -> None:
    gram = group.gram
    assert gram is not None
    values = np.linalg.svd(gram.matrix, compute_uv=False)  # semidefinite: its eigenvalues
    tails = 1 - np.concatenate([[0], np.cumsum(values)]) / values.sum()
    expected = int(np.flatnonzero(tails <= share)[0])
    assert 0 < expected < 24
    options = Eora(energy=share, energy_of="gram")
    for linear in group.linears:
        found = solve(options, linear, gram, 24, "float16")
        assert found.rank == expected
        fixed = solve(Eora(), linear, gram, expected, "float16")
        np.testing.assert_array_equal(found.lora_a, fixed.lora_a)
        assert solve(options, linear, gram, expected - 1, "float16").rank == expected - 1
        # Whatever the error is: its rows have that much output outside the Gram's top eigenspace.
        delta = linear.weight() - linear.backbone_weight()
        bound = np.linalg.norm(delta, 2) * np.sqrt(tails[expected] * values.sum())
        exact, _ = eora_factors(delta, gram.matrix, expected)
        basis = np.linalg.qr(exact)[0]
        assert weighted_norm(delta - basis @ (basis.T @ delta), gram.matrix) <= bound


def test_energy_of_the_gram_needs_tokens_and_a_share() -> None:
    group = qkv(tokens=5)
    QuantizeRtn(bits=2).call(group)
    linear = group.linears[0]
    by_error, by_gram = (
        solve(Eora(energy=0.5, energy_of=kind), linear, group.gram, 20, "float16")
        for kind in ("error", "gram")
    )
    assert by_gram.rank == by_error.rank > 5
    with pytest.raises(ConfigError, match="no share for 'energy_of: gram': give 'energy'"):
        Eora(energy_of="gram")


def test_directions_leave_the_rest_of_the_input_out(group: LinearGroup) -> None:
    assert group.gram is not None
    linear, matrix = group.linears[0], group.gram.matrix
    np.testing.assert_array_equal(product(Eora(directions=72), group), product(Eora(), group))
    delta = linear.weight() - linear.backbone_weight()
    top = Eora(directions=10).metric(group.gram)
    assert top is not None
    by_all, by_top = product(Eora(), group), product(Eora(directions=10), group)
    assert weighted_norm(delta - by_top, top.matrix) < weighted_norm(delta - by_all, top.matrix)
    assert weighted_norm(delta - by_all, matrix) < weighted_norm(delta - by_top, matrix)


def test_eora_falls_back_to_svd_on_few_tokens_and_says_so() -> None:
    group = qkv(tokens=5)
    QuantizeRtn(bits=2).call(group)
    expected = [compensation_solver("svd")(linear, None, 4, "int4") for linear in group.linears]
    Eora(rank=4).call(group)
    for linear, svd in zip(group.linears, expected, strict=True):
        assert linear.factors is not None
        np.testing.assert_array_equal(linear.factors.lora_a, svd.lora_a)
        (note,) = linear.record.notes
        assert "plain SVD of the error, for only 5 calibration tokens reached it" in note


def test_storing_the_factors_in_float16_costs_next_to_nothing(group: LinearGroup) -> None:
    Eora(rank=6, factor_type="float16").call(group)
    assert group.gram is not None
    for linear in group.linears:
        delta = linear.weight() - linear.backbone_weight()
        b, a = eora_factors(delta, group.gram.matrix, 6)
        exact = weighted_norm(delta - b @ a, group.gram.matrix)
        stored = weighted_norm(linear.weight() - linear.effective_weight(), group.gram.matrix)
        assert exact <= stored < exact * 1.001
