from __future__ import annotations

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.compensate.adapter import AdapterSolver
from eoracc.passes.compensate.base import RankOverride
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.factors import weighted_norm
from eoracc.passes.solvers.gram import Gram, accumulate_gram
from tests.passes.groups import correlated, make_group, ones, qkv

U16 = 2.0**-11
"""Unit roundoff of float16."""


@pytest.fixture
def group() -> LinearGroup:
    """A compressed group with a compensation that is baked in."""
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    Eora(rank=5).call(group)
    return group


def task_gram(tokens: int = 300) -> Gram:
    """Statistics of another text than the compensation was solved for."""
    inputs = correlated(np.random.default_rng(11), tokens, 72)
    return accumulate_gram([(inputs, ones(tokens))], 72)


def solver(rank: int = 6, factor_type: FactorType = "float16") -> AdapterSolver:
    return AdapterSolver(rank=rank, factor_type=factor_type)


def residual(linear: Linear) -> np.ndarray:
    return linear.weight().astype(np.float64) - linear.effective_weight()


def test_leaves_the_tail_of_what_the_backbone_lacks(group: LinearGroup) -> None:
    gram = task_gram()
    root = np.linalg.cholesky(gram.matrix)
    for linear in group.linears:
        before = linear.factors
        solved = solver().solve(linear, linear.effective_weight(), gram)
        # Eckart-Young, in float64: no factors of that rank leave less.
        values = np.linalg.svd(residual(linear) @ root, compute_uv=False)
        output = weighted_norm(linear.weight(), gram.matrix)
        tail = np.linalg.norm(values[6:]) / output
        # Rounding each factor's values to float16 moves each of the 6 terms by 2 u of itself.
        rounding = 2 * U16 * np.sqrt(6) * np.linalg.norm(values[:6]) / output
        assert rounding < 0.02 * tail
        assert solved.error_with == pytest.approx(tail, abs=rounding)
        assert solved.error_without == pytest.approx(np.linalg.norm(values) / output, rel=1e-4)
        left = residual(linear) - solved.factors.product()
        found = weighted_norm(left, gram.matrix) / output
        assert solved.error_with == pytest.approx(found, rel=1e-4)
        assert linear.factors is before, "the backbone stays as it is"


def test_other_tokens_give_other_factors(group: LinearGroup) -> None:
    linear = group.linears[0]
    assert group.gram is not None
    own, foreign = (
        solver().solve(linear, linear.effective_weight(), gram).factors
        for gram in (task_gram(), group.gram)
    )
    left = [residual(linear) - factors.product() for factors in (own, foreign)]
    on_task = [weighted_norm(one, task_gram().matrix) for one in left]
    assert on_task[0] < 0.97 * on_task[1]


def test_a_rank_above_what_is_left_leaves_nothing() -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.up_proj"
    group = make_group({name: rng.standard_normal((40, 72)).astype(np.float32)})
    QuantizeRtn(bits=2).call(group)
    linear = group.linears[0]
    assert linear.compressed is not None
    # A backbone that lacks a matrix of rank 2.
    lost = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 72))).astype(np.float32)
    solved = solver(8).solve(linear, linear.weight() - lost, task_gram())
    assert solved.factors.rank == 8
    assert solved.error_with < 2 * U16 * 8 * solved.error_without
    assert np.isfinite(solved.factors.product()).all()


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_scores_the_factors_as_they_are_stored(group: LinearGroup, factor_type: FactorType) -> None:
    gram, linear = task_gram(), group.linears[0]
    solved = solver(factor_type=factor_type).solve(linear, linear.effective_weight(), gram)
    assert solved.factors.factor_type == factor_type
    left = weighted_norm(residual(linear) - solved.factors.product(), gram.matrix)
    output = weighted_norm(linear.weight(), gram.matrix)
    assert solved.error_with == pytest.approx(left / output, rel=1e-4)
    assert solved.error_with < solved.error_without


def test_too_few_tokens_give_the_plain_svd(group: LinearGroup) -> None:
    linear = group.linears[0]
    solved = solver().solve(linear, linear.effective_weight(), task_gram(tokens=31))
    left = residual(linear) - solved.factors.product()
    values = np.linalg.svd(residual(linear), compute_uv=False)
    tail, kept = np.linalg.norm(values[6:]), np.linalg.norm(values[:6])
    assert np.linalg.norm(left) == pytest.approx(tail, abs=2 * U16 * np.sqrt(6) * kept)


def test_has_slots_in_compressed_linears_of_blocks_alone(group: LinearGroup) -> None:
    options = AdapterSolver(
        rank=4,
        factor_type="int8",
        overrides={
            "*.k_proj": RankOverride(rank=2, factor_type="int4"),
            "*.x_proj": RankOverride(skip=True),
        },
    )
    q, k = group.linears
    found = options.options_for(k)
    assert found is not None
    assert (found.rank, found.factor_type) == (2, "int4")
    assert options.options_for(q) == AdapterSolver(rank=4, factor_type="int8")
    assert options.unmatched_overrides([q.name, k.name]) == ("*.x_proj",)
    assert solver(0).options_for(q) is None
    uncompressed = qkv().linears[0]
    assert solver().options_for(uncompressed) is None
    head = make_group({"lm_head": np.eye(48, 72, dtype=np.float32)})
    QuantizeRtn(bits=8).call(head)
    everywhere = AdapterSolver(
        rank=4, factor_type="int8", overrides={"lm_head": RankOverride(rank=4)}
    )
    assert everywhere.options_for(head.linears[0]) is None


def test_a_rank_beyond_the_matrix_is_refused(group: LinearGroup) -> None:
    k = group.linears[1]
    with pytest.raises(PassError, match=r"k_proj: rank 25 exceeds .*\[24, 72\].*give 24 at most"):
        solver(25).solve(k, k.effective_weight(), task_gram())
