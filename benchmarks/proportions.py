"""Shares of correct answers: confidence intervals, and tests for a difference of two shares."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "PairedDifference", "compare_paired", "wilson_interval"]

_Z95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution: 95% lie between minus and plus it."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """How two models differ on the same questions.

    Attributes:
      difference: share that the second answers correctly minus share of the first.
      interval: 95% percentile bootstrap over questions.
      gained: questions that only the second answers correctly.
      lost: questions that only the first answers correctly.
      p_value: of McNemar's exact test, two-sided: the probability of a split at least as unequal
        among the questions on which they differ, if neither model were better.
    """

    difference: float
    interval: Interval
    gained: int
    lost: int
    p_value: float


def wilson_interval(correct: int, count: int) -> Interval:
    """95% interval of a share of ``correct`` in ``count``.

    Holds near 0 and 1 and for small counts, where the normal approximation leaves [0, 1].

    Source: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".

    >>> interval = wilson_interval(0, 10)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.0, 0.278)

    Raises:
      ValueError: ``count`` is 0, or ``correct`` is not within it.
    """
    if not 0 <= correct <= count or count == 0:
        raise ValueError(f"there is no share of {correct} in {count}")
    share = correct / count
    scale = 1 + _Z95**2 / count
    middle = (share + _Z95**2 / (2 * count)) / scale
    half = _Z95 * sqrt(share * (1 - share) / count + _Z95**2 / (4 * count**2)) / scale
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def compare_paired(
    first: NDArray[np.bool_], second: NDArray[np.bool_], *, seed: int = 0
) -> PairedDifference:
    """Compare which of the same questions two models answer correctly.

    Args:
      first: ``[questions]``.
      second: ``[questions]``, in the same order.
      seed: of the bootstrap.
    """
    count = len(first)
    gained = int((second & ~first).sum())
    lost = int((first & ~second).sum())
    # Only a question's difference counts, -1, 0 or 1: to draw questions with replacement is to draw
    # the counts of the three values.
    shares = np.array([gained, lost, count - gained - lost]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, _RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, (0.025, 0.975))
    return PairedDifference(
        difference=(gained - lost) / count,
        interval=Interval(float(low), float(high)),
        gained=gained,
        lost=lost,
        p_value=_sign_test(gained, lost),
    )


def _sign_test(first: int, second: int) -> float:
    """Two-sided probability of a split at least as unequal of as many fair coins."""
    count = first + second
    tail = sum(comb(count, index) for index in range(min(first, second) + 1))
    # Integers until here: with hundreds of coins they overflow a float.
    return min(1.0, float(Fraction(2 * tail, 2**count)))
