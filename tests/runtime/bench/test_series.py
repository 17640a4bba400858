from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from eoracc.runtime.bench.series import Measurement, interleave, ratios


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_measurement_is_median_and_quartiles(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    measured = Measurement.of(values.tolist())
    assert measured.median == np.median(values)
    assert measured.low == np.percentile(values, 25)
    assert measured.high == np.percentile(values, 75)
    assert measured.repeats == count


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
    measured = ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0])
    assert (measured.low, measured.median, measured.high) == (0.5, 0.5, 0.5)
