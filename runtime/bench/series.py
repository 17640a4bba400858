"""Repeated measurements, interleaved, with their median and spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = ["Measurement", "interleave", "ratios"]

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Measurement:
    """Quartiles of a quantity that was measured several times.

    Attributes:
      median: of the repeats.
      low: first quartile.
      high: third quartile.
      repeats: number of values.
    """

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Measurement:
        """Summarize at least one value.

        >>> Measurement.of([3.0, 1.0, 2.0])
        Measurement(median=2.0, low=1.5, high=2.5, repeats=3)
        """
        low, median, high = map(float, np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(median, low, high, len(values))


def interleave(
    measures: Mapping[_Key, Callable[[], float]], repeats: int
) -> dict[_Key, list[float]]:
    """Take ``measures`` in turn, ``repeats`` times each, after one round of warm-up.

    Other load on the machine then affects all of them alike. Each round starts with another one.

    Returns:
      Values of each measure by round; values of one round were measured in succession.
    """
    order = list(measures)
    for key in order:
        measures[key]()
    taken: dict[_Key, list[float]] = {key: [] for key in order}
    for turn in range(repeats):
        start = turn % len(order) if order else 0
        for key in order[start:] + order[:start]:
            taken[key].append(measures[key]())
    return taken


def ratios(values: Sequence[float], base: Sequence[float]) -> Measurement:
    """``values`` divided by ``base``, round by round.

    >>> ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]).median
    2.0
    """
    return Measurement.of([float(ratio) for ratio in np.divide(values, base)])
