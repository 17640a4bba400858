from __future__ import annotations

import numpy as np

from eoracc.passes.prune.prune_magnitude import PruneMagnitude
from tests.passes.groups import qkv


def test_keeps_the_weights_of_largest_magnitude_as_they_are() -> None:
    group = qkv(tokens=None)
    PruneMagnitude(sparsity=0.6).call(group)
    for linear in group.linears:
        weight, pruned = linear.weight(), linear.backbone_weight()
        kept = pruned != 0
        np.testing.assert_array_equal(pruned[kept], weight[kept])
        assert np.abs(weight[~kept]).max() < np.abs(weight[kept]).min()
        # By linear: rows differ in what they lose.
        assert len(set(kept.sum(axis=1).tolist())) > 1
