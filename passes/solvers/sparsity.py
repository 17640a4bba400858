"""Which weights pruning keeps: a share of them, or N of every M neighbours in a row.

Scores are compared among the candidates of one choice, and the lowest are removed; of equal scores
the first is. A *mask* is true where a weight is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mask", "Sparsity", "keep_all_but"]

Mask = NDArray[np.bool_]

_DIGITS = 6
"""Decimals to which counts are rounded before their fraction is cut off: 0.29 of 100 is 29."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How many weights are removed, and from where.

    Attributes:
      fraction: share that is removed, at least 0 and below 1.
      run: ``M``, consecutive columns of a row of which that share is removed; 0 where the weights
        that are removed may lie anywhere.
    """

    fraction: float
    run: int = 0

    @classmethod
    def of_pattern(cls, pattern: str) -> Sparsity:
        """The sparsity of ``N:M``: of every M consecutive weights of a row, N are kept.

        >>> Sparsity.of_pattern("2:4")
        Sparsity(fraction=0.5, run=4)
        """
        kept, run = map(int, pattern.split(":"))
        return cls(fraction=(run - kept) / run, run=run)

    def removed(self, count: int) -> int:
        """How many of ``count`` weights are removed, at most the share asked for."""
        return math.floor(round(self.fraction * count, _DIGITS))

    def mask_of_rows(self, scores: NDArray[np.floating]) -> Mask:
        """The mask of a weight of which every row loses the same share.

        Args:
          scores: of each weight, ``[N, K]``, nonnegative.

        Returns:
          ``bool [N, K]``.
        """
        if not self.run:
            return _mask(scores, self.removed(scores.shape[1]))
        runs = scores.reshape(len(scores), -1, self.run)
        return _mask(runs, self.removed(self.run)).reshape(scores.shape)

    def mask_of_weights(self, scores: NDArray[np.floating]) -> Mask:
        """The mask of a weight of which rows may lose different shares.

        Args:
          scores: of each weight, ``[N, K]``, nonnegative.

        Returns:
          ``bool [N, K]``. A pattern holds in every row.
        """
        if self.run:
            return self.mask_of_rows(scores)
        return keep_all_but(scores, self.removed(scores.size))


def keep_all_but(scores: NDArray[np.floating], count: int) -> Mask:
    """The mask that removes the ``count`` lowest of all ``scores``, of any shape."""
    return _mask(scores.reshape(-1), count).reshape(scores.shape)


def _mask(scores: NDArray[np.floating], count: int) -> Mask:
    """True but for the ``count`` lowest along the last axis."""
    if count == 0:
        return np.ones(scores.shape, np.bool_)
    # Not sorted, which takes 26 times as long for a whole weight of 1536 x 4096.
    limit = np.partition(scores, count - 1, axis=-1)[..., count - 1, None]
    lower, equal = scores < limit, scores == limit
    room = count - np.count_nonzero(lower, axis=-1, keepdims=True)
    removed: Mask = lower | (equal & (np.cumsum(equal, axis=-1) <= room))
    return ~removed
