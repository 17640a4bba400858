"""What holds for every compensating pass, and what sets EoRA and plain SVD apart."""

from __future__ import annotations

import numpy as np
import pytest

from eoracc.compiler.errors import PassError
from eoracc.compiler.linears import LinearGroup
from eoracc.passes import load_passes
from eoracc.passes.compensation import Compensation, RankOverride, compensation_solver
from eoracc.passes.eora import Eora
from eoracc.passes.factors import eora_factors, weighted_norm
from eoracc.passes.overrides import QuantizeOverride
from eoracc.passes.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize_rtn import QuantizeRtn
from eoracc.passes.svd import Svd
from tests.passes.groups import qkv

load_passes()

METHODS = [Eora, Svd]


@pytest.fixture
def group() -> LinearGroup:
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    return group


@pytest.mark.parametrize("method", METHODS)
def test_adds_float16_factors_that_lower_the_recorded_error(
    method: type[Compensation], group: LinearGroup
) -> None:
    assert method(rank=6).call(group)
    for linear in group.linears:
        assert linear.factors is not None
        assert linear.factors.lora_a.shape == (6, 72)
        assert linear.factors.lora_b.shape == (linear.out_features, 6)
        assert linear.factors.lora_a.dtype == linear.factors.lora_b.dtype == np.float16
        assert linear.errors[method.name] < linear.errors["quantize_rtn"]
        assert group.gram is not None
        weight = linear.weight()
        left = weighted_norm(weight - linear.effective_weight(), group.gram.matrix)
        np.testing.assert_allclose(
            linear.errors[method.name], left / weighted_norm(weight, group.gram.matrix), rtol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_rank_zero_changes_nothing_that_the_linear_computes(
    method: type[Compensation], group: LinearGroup
) -> None:
    before = [linear.effective_weight() for linear in group.linears]
    method(rank=0).call(group)
    for linear, weight in zip(group.linears, before, strict=True):
        np.testing.assert_array_equal(linear.effective_weight(), weight)
        assert linear.errors[method.name] == linear.errors["quantize_rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_leaves_the_rounding_of_the_factors(
    method: type[Compensation], group: LinearGroup
) -> None:
    method(rank=24).call(group)
    k = group.linears[1]
    # A dot product over the rank, each term off by two roundings of float16.
    assert k.errors[method.name] < 24 * 2 * 2.0**-11 * k.errors["quantize_rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_beyond_the_matrix_names_linear_rank_and_limit(
    method: type[Compensation], group: LinearGroup
) -> None:
    with pytest.raises(PassError, match=r"k_proj: rank 25 exceeds .*\[24, 72\].*give 24 at most"):
        method(rank=25).call(group)
    overridden = method(rank=25, overrides={"*.k_proj": RankOverride(rank=24)})
    assert overridden.call(group)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_compressed_cannot_be_compensated(method: type[Compensation]) -> None:
    group = qkv()
    with pytest.raises(PassError, match=r"q_proj: is not compressed: put a quantize pass before"):
        method(rank=4).call(group)
    assert not method(rank=4, overrides={"*": RankOverride(skip=True)}).call(group)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_quantizer_was_told_to_skip_is_skipped_too(method: type[Compensation]) -> None:
    group = qkv()
    QuantizeGptq(overrides={"*.q_proj": QuantizeOverride(skip=True)}).call(group)
    assert method(rank=4).call(group)
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
            delta - solve(linear, group.gram, 6).product() for solve in (eora, svd)
        )
        assert linear.factors is None
        gram = group.gram.matrix
        assert weighted_norm(by_output, gram) < 0.9 * weighted_norm(by_weight, gram)
        assert np.linalg.norm(by_weight) < np.linalg.norm(by_output)


def test_solvers_go_by_the_name_of_their_pass(group: LinearGroup) -> None:
    with pytest.raises(KeyError):
        compensation_solver("quantize_rtn")
    with pytest.raises(KeyError):
        compensation_solver("no such pass")
    with pytest.raises(PassError, match="no gram"):
        compensation_solver("eora")(group.linears[0], None, 4)


def test_eora_without_a_gram_says_what_to_do() -> None:
    with pytest.raises(PassError, match=r"has no gram: put 'calibrate' before 'eora'"):
        Eora(rank=4).requires(qkv(tokens=None))


def test_svd_needs_no_gram() -> None:
    group = qkv(tokens=None)
    QuantizeRtn(bits=2).call(group)
    assert Svd(rank=4).call(group)
    assert group.linears[0].errors == {}


def test_eora_falls_back_to_svd_on_few_tokens_and_says_so() -> None:
    group = qkv(tokens=5)
    QuantizeRtn(bits=2).call(group)
    expected = [compensation_solver("svd")(linear, None, 4) for linear in group.linears]
    Eora(rank=4).call(group)
    for linear, svd in zip(group.linears, expected, strict=True):
        assert linear.factors is not None
        np.testing.assert_array_equal(linear.factors.lora_a, svd.lora_a)
        (note,) = linear.notes
        assert "plain SVD of the error, for only 5 calibration tokens reached it" in note


def test_storing_the_factors_in_float16_costs_next_to_nothing(group: LinearGroup) -> None:
    Eora(rank=6).call(group)
    assert group.gram is not None
    for linear in group.linears:
        delta = linear.weight() - linear.backbone_weight()
        b, a = eora_factors(delta, group.gram.matrix, 6)
        exact = weighted_norm(delta - b @ a, group.gram.matrix)
        stored = weighted_norm(linear.weight() - linear.effective_weight(), group.gram.matrix)
        assert exact <= stored < exact * 1.001
