from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from eoracc.runtime.bench.series import Measurement, interleave, ratios


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_measurement_is_median_and_quartiles(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    found = Measurement.of(values.tolist())
    assert found.median == np.median(values)
    assert found.low == np.percentile(values, 25)
    assert found.high == np.percentile(values, 75)
    assert found.repeats == count


def test_measures_take_turns_and_everyone_comes_first() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    taken = interleave({name: partial(measure, name) for name in "abc"}, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    # The first turn does not count.
    assert taken == {"a": [4, 9, 11, 13], "b": [5, 7, 12, 14], "c": [6, 8, 10, 15]}


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was ten times slower in the second round.
    found = ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])
    assert (found.low, found.median, found.high) == (0.5, 0.5, 0.5)
