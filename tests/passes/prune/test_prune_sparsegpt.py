from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes.prune.prune_magnitude import PruneMagnitude
from eoracc.passes.prune.prune_sparsegpt import PruneSparsegpt
from eoracc.passes.prune.prune_wanda import PruneWanda
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from tests.passes.groups import qkv


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_leaves_less_error_than_wanda(options: dict[str, Any]) -> None:
    solved, masked = qkv(), qkv()
    PruneSparsegpt(**options).call(solved)
    PruneWanda(**options).call(masked)
    for one, other in zip(solved.linears, masked.linears, strict=True):
        error = one.record.errors["prune_sparsegpt"]
        assert 0 < error < 0.95 * other.record.errors["prune_wanda"]


def test_damping_is_that_of_the_option() -> None:
    errors = []
    for damping in (0.01, 1.0):
        group = qkv()
        PruneSparsegpt(damping=damping).call(group)
        errors.append(sum(linear.record.errors["prune_sparsegpt"] for linear in group.linears))
    assert errors[0] < errors[1]


def test_too_few_tokens_fall_back_to_magnitude_and_say_so() -> None:
    group, alike = qkv(tokens=20), qkv(tokens=None)
    PruneSparsegpt(pattern="2:4").call(group)
    PruneMagnitude(pattern="2:4").call(alike)
    for linear, other in zip(group.linears, alike.linears, strict=True):
        (note,) = linear.record.notes
        assert "pruned by magnitude, for only 20 calibration tokens reached it" in note
        np.testing.assert_array_equal(linear.backbone_weight(), other.backbone_weight())
    QuantizeGptq(bits=4).call(group)
    for linear in group.linears:
        zeros = (linear.backbone_weight() == 0).reshape(linear.out_features, -1, 4)
        assert zeros.sum(axis=2).min() >= 2


def test_without_a_gram_it_says_what_to_do() -> None:
    with pytest.raises(PassError, match="has no gram: put 'calibrate' before 'prune_sparsegpt'"):
        PruneSparsegpt().requires(qkv(tokens=None))
