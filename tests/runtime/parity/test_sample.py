from __future__ import annotations

import numpy as np
import pytest

from eoracc.runtime.parity.sample import Sample


@pytest.mark.parametrize(("size", "step"), [(1, 1), (7, 1), (7, 7), (8, 3), (100, 11), (260, 13)])
@pytest.mark.parametrize("first", [0, 2])
def test_rows_in_succession_hold_every_value(size: int, step: int, first: int) -> None:
    sample = Sample(size, first % step, step)
    places = [sample.places(row) for row in range(5, 5 + step)]
    for row in places:
        assert len(row) == len(set(row.tolist())) == sample.count == int(np.ceil(size / step))
        assert set((np.diff(row) % size).tolist()) <= {step}
    assert set(np.concatenate(places).tolist()) == set(range(size))


def test_all_values_are_in_order() -> None:
    np.testing.assert_array_equal(Sample(9).places(4), np.arange(9))
