"""With matched outputs every compensation goes by the target, not by the weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.caldera import Caldera
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.solvers.factors import weighted_norm
from eoracc.passes.solvers.gram import accumulate_cross, output_matching
from tests.passes.groups import correlated, qkv


def drifted() -> LinearGroup:
    """Two projections in two bits whose inputs the prefix has changed."""
    group = qkv()
    gram = group.gram
    assert gram is not None
    assert gram.activations is not None
    ((inputs, weights),) = gram.activations()
    drift = correlated(np.random.default_rng(8), len(inputs), inputs.shape[1])
    cross = accumulate_cross([(drift, inputs, weights)], inputs.shape[1])
    group.gram = replace(gram, matching=output_matching(gram.matrix, cross))
    QuantizeGptq(bits=2, group_size=24).call(group)
    return group


@pytest.mark.parametrize("method", [Eora(rank=4), Caldera(rank=4, iterations=3)])
def test_what_is_left_is_left_of_the_target(method: Compensation) -> None:
    group, bare = drifted(), drifted()
    replace(method, factor_type="float16").call(group)
    Eora(rank=4, factor_type="float16").call(bare)
    assert group.gram is not None
    matrix = group.gram.matrix
    for linear, eora in zip(group.linears, bare.linears, strict=True):
        target = group.gram.target(linear.weight())
        left = weighted_norm(target - linear.effective_weight(), matrix)
        np.testing.assert_allclose(
            linear.record.errors[method.name], left / weighted_norm(target, matrix), rtol=1e-4
        )
        assert linear.record.errors[method.name] < linear.record.errors["quantize_gptq"]
        # Of the alternation the first iterate is EoRA of the target.
        assert linear.record.errors[method.name] <= eora.record.errors["eora"]
        away = weighted_norm(linear.weight() - linear.effective_weight(), matrix)
        assert away > 1.5 * left, "the weight is not what it comes near"
