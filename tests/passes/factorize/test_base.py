"""What holds for every factorising pass, and the options that set some of them apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from eoracc.errors import PassError
from eoracc.passes import load_passes
from eoracc.passes.base import pass_type, passes_of
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.base import Factorization, RatioOverride
from eoracc.passes.factorize.erc_svd import ErcSvd
from eoracc.passes.factorize.factorize_activation_scaled import FactorizeActivationScaled
from eoracc.passes.factorize.factorize_svd import FactorizeSvd
from eoracc.passes.factorize.nsvd import Nsvd
from eoracc.passes.factorize.saes_svd import SaesSvd
from eoracc.passes.factorize.svd_llm import SvdLlm
from eoracc.passes.factorize.svd_llm_v2 import SvdLlmV2
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.solvers.factors import weighted_norm
from eoracc.passes.solvers.gram import accumulate_cross, output_matching
from tests.passes.groups import correlated, make_group, ones, qkv

load_passes()

METHODS = passes_of(Factorization)
CALIBRATED = [method for method in METHODS if Calibrate in method.needs]
WHITENED: list[type[Factorization]] = [SvdLlm, SvdLlmV2, SaesSvd]


def products(group: LinearGroup) -> list[NDArray[np.float32]]:
    found = []
    for linear in group.linears:
        assert linear.factorized is not None
        found.append(linear.factorized.product())
    return found


def group_of(*, tokens: int | None = 400, drifted: bool = False) -> LinearGroup:
    """Two projections; with the original model's inputs beside theirs, or the very same ones."""
    group = qkv(tokens=tokens)
    gram = group.gram
    if gram is None:
        return group
    assert gram.activations is not None
    ((inputs, weights),) = gram.activations()
    originals = inputs
    if drifted:
        originals = inputs + correlated(np.random.default_rng(8), len(inputs), inputs.shape[1])
        cross = accumulate_cross([(originals - inputs, inputs, weights)], inputs.shape[1])
        group.gram = replace(gram, matching=output_matching(gram.matrix, cross))
    group.originals = lambda: iter([(originals, weights)])
    return group


@pytest.mark.parametrize("method", METHODS)
def test_replaces_each_weight_by_two_of_the_rank_that_the_ratio_asks_for(
    method: type[Factorization],
) -> None:
    group = group_of()
    factorize = method(ratio=0.4)
    factorize.requires(group)
    factorize.call(group)
    assert group.gram is not None
    for linear, rank in zip(group.linears, (15, 10), strict=True):
        assert linear.factorized is not None
        assert linear.factorized.rank == rank
        rows, columns = linear.out_features, linear.in_features
        assert rank * (rows + columns) <= 0.6 * rows * columns < (rank + 1) * (rows + columns)
        weight = linear.weight()
        left = weighted_norm(weight - linear.effective_weight(), group.gram.matrix)
        whole = weighted_norm(weight, group.gram.matrix)
        assert 0.01 < linear.record.errors[method.name] < 0.9
        np.testing.assert_allclose(linear.record.errors[method.name], left / whole, rtol=1e-4)
        assert linear.record.notes == []


@pytest.mark.parametrize("method", METHODS)
def test_no_other_of_the_family_loses_less_output_than_the_whitened_ones(
    method: type[Factorization],
) -> None:
    group, best = group_of(), group_of()
    method(ratio=0.3).call(group)
    SvdLlm(ratio=0.3).call(best)
    error = group.linears[0].record.errors[method.name]
    if method in WHITENED:
        assert error == pytest.approx(best.linears[0].record.errors["svd_llm"], rel=1e-5)
    else:
        assert error > 1.001 * best.linears[0].record.errors["svd_llm"]


@pytest.mark.parametrize("method", METHODS)
def test_a_ratio_of_zero_leaves_the_weight_as_it_is(method: type[Factorization]) -> None:
    group = group_of()
    method(ratio=0).call(group)
    for linear in group.linears:
        assert linear.factorized is None
        assert linear.node.op_type == "MatMul"


@pytest.mark.parametrize("method", METHODS)
def test_overrides_and_plans_give_a_linear_a_ratio_of_its_own(
    method: type[Factorization],
) -> None:
    group = group_of()
    q, k = group.linears
    k.plan["ratio"] = 0.6
    method(ratio=0.2, overrides={"*.q_proj": RatioOverride(skip=True)}).call(group)
    assert q.factorized is None
    assert k.factorized is not None
    assert k.factorized.rank == int(0.4 * 24 * 72 / (24 + 72))


@pytest.mark.parametrize("method", METHODS)
def test_a_single_rank_is_left_however_much_is_removed(method: type[Factorization]) -> None:
    group = group_of()
    method(ratio=0.999).call(group)
    for linear in group.linears:
        assert linear.factorized is not None
        assert linear.factorized.rank == 1


@pytest.mark.parametrize("method", CALIBRATED)
def test_without_statistics_the_way_out_is_named(method: type[Factorization]) -> None:
    with pytest.raises(PassError, match=f"put 'calibrate' before '{method.name}'"):
        method().requires(qkv(tokens=None))


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_gram_that_is_not_finite_is_refused(method: type[Factorization]) -> None:
    group = group_of()
    assert group.gram is not None
    group.gram.matrix[3, 3] = np.nan
    with pytest.raises(PassError, match="its gram holds NaN or Inf"):
        method().requires(group)


@pytest.mark.parametrize("method", CALIBRATED)
def test_too_few_tokens_get_the_plain_svd_and_a_note(method: type[Factorization]) -> None:
    group, plain = group_of(tokens=8), group_of(tokens=8)
    method(ratio=0.4).call(group)
    FactorizeSvd(ratio=0.4).call(plain)
    for ours, theirs in zip(products(group), products(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for linear in group.linears:
        (note,) = linear.record.notes
        assert note.startswith(f"{method.name}: plain SVD of the weight, for only 8 calibration")


@pytest.mark.parametrize("method", METHODS)
def test_dead_inputs_are_no_special_case(method: type[Factorization]) -> None:
    rng = np.random.default_rng(4)
    inputs = correlated(rng, 200, 31)
    inputs[:, ::4] = 0
    weight = rng.standard_normal((17, 31)).astype(np.float32)
    group = make_group({"model.layers.0.mlp.up_proj": weight}, inputs)
    group.originals = lambda: iter([(inputs, ones(len(inputs)))])
    method(ratio=0.3).call(group)
    (product,) = products(group)
    assert np.isfinite(product).all()


@pytest.mark.parametrize("method", [SvdLlm, SvdLlmV2, Nsvd, ErcSvd, FactorizeActivationScaled])
def test_matched_outputs_are_what_the_product_comes_near(method: type[Factorization]) -> None:
    group = group_of(drifted=True)
    assert group.gram is not None
    # All of the weight's rank: what is left is the target, to the rounding of float32.
    targets = [group.gram.target(linear.weight()) for linear in group.linears]
    u, v = method().solve(targets[1], group.gram, 24)
    np.testing.assert_allclose(u @ v, targets[1], rtol=0, atol=1e-5)
    method(ratio=0.05).call(group)
    q, k = group.linears
    for linear, target in zip((q, k), targets, strict=True):
        assert linear.factorized is not None
        product = linear.factorized.product()
        near = weighted_norm(target - product, group.gram.matrix)
        assert near < weighted_norm(linear.weight() - product, group.gram.matrix)


def test_defaults_are_those_of_the_papers() -> None:
    assert ErcSvd().beta == 0.05
    assert (ErcSvd().stages, ErcSvd().residual_metric) == (2, "weight")
    assert Nsvd().share == 0.95
    assert FactorizeActivationScaled().alpha == 0.5


class TestErcSvd:
    """Options of ``erc_svd``."""

    @pytest.mark.parametrize(("ratio", "beta"), [(0.4, 0.05), (0.4, 0.3), (0.4, 0.9), (0.9, 0.2)])
    def test_is_the_published_product_of_the_published_ranks(
        self, ratio: float, beta: float
    ) -> None:
        """Of the Gram alone; more residual than there is rank leaves the plain SVD."""
        group = group_of()
        assert group.gram is not None
        ErcSvd(ratio=ratio, beta=beta).call(group)
        whitening = np.linalg.cholesky(group.gram.matrix)
        inverse = np.linalg.inv(whitening)
        for linear in group.linears:
            weight = linear.weight().astype(np.float64)
            effective = weight.size / sum(weight.shape)
            rank = int((1 - ratio) * effective)
            residual = min(rank, int(beta * effective))
            left, singular, right = np.linalg.svd(weight @ whitening, full_matrices=False)
            kept = rank - residual
            first = (left[:, :kept] * singular[:kept]) @ right[:kept] @ inverse
            left, singular, right = np.linalg.svd(weight - first, full_matrices=False)
            second = (left[:, :residual] * singular[:residual]) @ right[:residual]
            assert linear.factorized is not None
            # Factors are float32: sums of as many products as the rank.
            limit = 4 * rank * float(np.finfo(np.float32).eps) * float(np.abs(weight).max())
            np.testing.assert_allclose(linear.factorized.product(), first + second, atol=limit)
            assert limit < 1e-3 * float(np.abs(weight - first - second).max())

    @pytest.mark.parametrize(
        "options", [{"beta": 0.0}, {"residual_metric": "activation"}, {"stages": 1}]
    )
    def test_without_a_plain_stage_it_is_svd_llm(self, options: dict[str, Any]) -> None:
        group, whitened = group_of(), group_of()
        ErcSvd(ratio=0.4, **options).call(group)
        SvdLlm(ratio=0.4).call(whitened)
        for ours, theirs in zip(products(group), products(whitened), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

    def test_beta_moves_ranks_from_outputs_to_weights(self) -> None:
        losses = []
        for beta in (0.0, 0.05, 0.2):
            group = group_of()
            ErcSvd(ratio=0.4, beta=beta).call(group)
            linear = group.linears[0]
            assert linear.factorized is not None
            lost = np.linalg.norm(linear.weight() - linear.factorized.product())
            losses.append((linear.record.errors["erc_svd"], -float(lost)))
        assert losses == sorted(losses)
        assert len(set(losses)) == 3

    def test_adaptive_keeps_the_rank(self) -> None:
        group = group_of()
        ErcSvd(ratio=0.4, beta="adaptive").call(group)
        assert [p.factorized.rank for p in group.linears if p.factorized is not None] == [15, 10]

    @pytest.mark.parametrize("beta", ["adaptiv", 2, -0.1])
    def test_a_beta_that_is_none_is_refused_in_one_sentence(self, beta: object) -> None:
        with pytest.raises(ValidationError) as caught:
            TypeAdapter(ErcSvd).validate_python({"beta": beta})
        (error,) = caught.value.errors()
        assert error["loc"] == ("beta",)
        assert error["msg"] == f"must be a number in 0..1 or 'adaptive', not {beta}"

    @pytest.mark.parametrize("options", [{"stages": 3}, {"residual_metric": "activation"}])
    def test_adaptive_stands_alone(self, options: dict[str, Any]) -> None:
        with pytest.raises(PassError, match="leave 'residual_metric' and 'stages' out"):
            ErcSvd(beta="adaptive", **options)


class TestSaesSvd:
    """SAES-SVD's target."""

    def test_needs_the_original_models_inputs(self) -> None:
        with pytest.raises(PassError, match="option 'match: outputs'"):
            SaesSvd().requires(qkv())

    @pytest.mark.parametrize(("beta", "same"), [(0.0, False), (1.0, True)])
    def test_beta_leads_from_the_weight_to_the_matched_target(
        self, beta: float, same: bool
    ) -> None:
        group, other = group_of(drifted=True), group_of(drifted=same)
        SaesSvd(ratio=0.3, beta=beta).call(group)
        SvdLlm(ratio=0.3).call(other)
        for ours, theirs in zip(products(group), products(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
        unlike = group_of(drifted=not same)
        SvdLlm(ratio=0.3).call(unlike)
        assert np.abs(products(group)[0] - products(unlike)[0]).max() > 0.01

    def test_the_adaptive_beta_is_neither_end_by_default(self) -> None:
        results = []
        for beta in (None, 0.0, 1.0):
            group = group_of(drifted=True)
            SaesSvd(ratio=0.3, beta=beta).call(group)
            results.append(products(group)[0])
        assert np.abs(results[0] - results[1]).max() > 1e-3
        assert np.abs(results[0] - results[2]).max() > 1e-3


def test_damping_leads_svd_llm_to_the_plain_svd() -> None:
    group, plain = group_of(), group_of()
    SvdLlm(ratio=0.4, damping=1e9).call(group)
    FactorizeSvd(ratio=0.4).call(plain)
    for ours, theirs in zip(products(group), products(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_all_of_the_family_are_registered_under_their_names() -> None:
    assert [pass_type(method.name) for method in METHODS] == [*METHODS]
