from __future__ import annotations

import numpy as np

from eoracc.compiler.sweep.batch import make_batches
from tests.graph_session import padded_mask


def test_batches_hold_positions_that_do_not_count_padding() -> None:
    ids = np.arange(15).reshape(3, 5)
    mask = padded_mask([5, 2, 3], 5, left=True)
    first, second = make_batches(ids, mask, size=2)
    assert first.values["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert second.values["position_ids"].tolist() == [[0, 0, 0, 1, 2]]
    assert second.token_weights.tolist() == [0, 0, 1, 1, 1]
    assert make_batches(ids[:0], mask[:0], size=2) == []
