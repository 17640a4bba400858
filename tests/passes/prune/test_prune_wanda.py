from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.prune.prune_magnitude import PruneMagnitude
from eoracc.passes.prune.prune_wanda import PruneWanda
from tests.passes.groups import correlated, make_group, qkv


@pytest.mark.parametrize("options", [{"sparsity": 0.3}, {"pattern": "2:4"}])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e15])
def test_removes_what_moves_each_output_least(options: dict[str, Any], size: float) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((6, 24)).astype(np.float32)
    inputs = (correlated(rng, 90, 24) * size).astype(np.float32)
    inputs[:, 5] = 0  # never active
    group = make_group({"model.layers.0.mlp.up_proj": weight}, inputs)
    PruneWanda(**options).call(group)
    (linear,) = group.linears
    pruned = linear.backbone_weight()
    run = 4 if "pattern" in options else 24
    for row, left in zip(weight.astype(np.float64), pruned, strict=True):
        for start in range(0, 24, run):
            # By definition: the output's change over all tokens if this weight alone were zero.
            moved = {
                column: np.linalg.norm(row[column] * inputs[:, column].astype(np.float64))
                for column in range(start, start + run)
            }
            removed = sorted(moved, key=moved.__getitem__)[: 2 if run == 4 else 7]
            assert set(np.flatnonzero(left[start : start + run] == 0) + start) == set(removed)
    np.testing.assert_array_equal(pruned[pruned != 0], weight[pruned != 0])


def test_inputs_that_are_always_zero_leave_magnitude() -> None:
    weight = np.random.default_rng(1).standard_normal((6, 24)).astype(np.float32)
    group = make_group({"model.layers.0.mlp.up_proj": weight}, np.zeros((90, 24), np.float32))
    alike = make_group({"model.layers.0.mlp.up_proj": weight})
    PruneWanda(pattern="2:4").call(group)
    PruneMagnitude(pattern="2:4").call(alike)
    np.testing.assert_array_equal(
        group.linears[0].backbone_weight(), alike.linears[0].backbone_weight()
    )


def test_too_few_tokens_fall_back_to_magnitude_and_say_so() -> None:
    group = qkv(tokens=20)
    PruneWanda(pattern="2:4").call(group)
    alike = qkv(tokens=None)
    PruneMagnitude(pattern="2:4").call(alike)
    for linear, other in zip(group.linears, alike.linears, strict=True):
        (note,) = linear.record.notes
        assert "pruned by magnitude, for only 20 calibration tokens reached it" in note
        np.testing.assert_array_equal(linear.backbone_weight(), other.backbone_weight())


def test_without_a_gram_it_says_what_to_do() -> None:
    with pytest.raises(PassError, match="has no gram: put 'calibrate' before 'prune_wanda'"):
        PruneWanda().requires(qkv(tokens=None))
