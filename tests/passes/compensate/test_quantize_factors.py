from __future__ import annotations

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.quantize_factors import (
    FactorBits,
    FactorBitsOverride,
    QuantizeFactors,
)
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import FactorType
from tests.passes.groups import qkv


def compensated(factor_type: FactorType = "float16", *, tokens: int | None = 400) -> LinearGroup:
    group = qkv(tokens=tokens)
    QuantizeRtn(bits=2).call(group)
    compensation = Svd if tokens is None else Eora
    compensation(rank=8, factor_type=factor_type).call(group)
    return group


@pytest.mark.parametrize("bits", [8, 4])
def test_does_what_factor_type_does(bits: FactorBits) -> None:
    """But for float16, through which the factors have gone first."""
    group, peer = compensated(), compensated("int8" if bits == 8 else "int4")
    QuantizeFactors(bits=bits).call(group)
    for one, other in zip(group.linears, peer.linears, strict=True):
        assert one.factors is not None
        assert other.factors is not None
        assert one.factors.factor_type == f"int{bits}"
        assert one.factors.nbytes == other.factors.nbytes
        before, after = one.record.errors["eora"], one.record.errors["quantize_factors"]
        given_back = one.record.errors["quantize_rtn"] - before
        assert abs(after - other.record.errors["eora"]) < 0.05 * given_back
        assert before < after < before + (0.02 if bits == 8 else 0.2) * given_back
        # The node holds what was scored, and in the type that says how it is stored.
        assert one.node.inputs[5] is not None
        assert str(one.node.inputs[5].dtype) == f"INT{bits}"


def test_overrides_and_linears_that_are_as_asked_for() -> None:
    group = compensated()
    key = {"*.k_proj": FactorBitsOverride(skip=True)}
    QuantizeFactors(bits=4, overrides=key).call(group)
    query, left = group.linears
    assert query.factors is not None
    assert left.factors is not None
    assert (query.factors.factor_type, left.factors.factor_type) == ("int4", "float16")
    assert "quantize_factors" not in left.record.errors
    again = QuantizeFactors(bits=4, overrides={"*.k_proj": FactorBitsOverride(bits=8)})
    again.call(group)
    assert left.factors.factor_type == "int8"
    assert query.factors.factor_type == "int4"
    nodes = [linear.node for linear in group.linears]
    again.call(group)
    assert [linear.node for linear in group.linears] == nodes, "nothing is left to do"


def test_8_bits_become_4_but_not_the_other_way() -> None:
    group = compensated("int8")
    QuantizeFactors(bits=4).requires(group)
    QuantizeFactors(bits=4).call(group)
    with pytest.raises(PassError, match="q_proj: its factors have 4 bits already"):
        QuantizeFactors(bits=8).requires(group)


@pytest.mark.parametrize("tokens", [None, 20])
def test_without_statistics_all_inputs_weigh_alike(tokens: int | None) -> None:
    group = compensated(tokens=tokens)
    before = [linear.effective_weight() for linear in group.linears]
    QuantizeFactors(bits=4).call(group)
    for linear, weight in zip(group.linears, before, strict=True):
        lost = np.linalg.norm(linear.effective_weight() - weight)
        assert lost < 0.3 * np.linalg.norm(weight - linear.backbone_weight())
        assert ("quantize_factors" in linear.record.errors) == (tokens is not None)


def test_linears_without_factors_are_left_alone() -> None:
    group = qkv()
    QuantizeRtn(bits=2).call(group)
    nodes = [linear.node for linear in group.linears]
    QuantizeFactors().call(group)
    assert [linear.node for linear in group.linears] == nodes
    Eora(rank=0).call(group)
    nodes = [linear.node for linear in group.linears]
    QuantizeFactors().call(group)
    assert [linear.node for linear in group.linears] == nodes
    assert group.linears[0].factors is None


def test_bits_that_a_survey_plans_for_codes_are_not_the_factors() -> None:
    group = compensated()
    for linear in group.linears:
        linear.plan["bits"] = 2
    QuantizeFactors(bits=4).call(group)
    assert all(one.factors is not None and one.factors.bits == 4 for one in group.linears)
