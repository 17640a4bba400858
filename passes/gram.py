"""The Gram matrix of a linear's input, accumulated so that the order of tokens does not matter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.factors import gram_root

__all__ = ["Gram", "accumulate_gram"]

_BLOCK_TOKENS = 2048
"""Tokens per float32 product; their sums are added in float64."""


@dataclass(frozen=True, eq=False)
class Gram:
    """``H = sum_t w_t x_t x_t^T`` over calibration tokens.

    Attributes:
      matrix: ``float64 [K, K]``, symmetric positive semidefinite, possibly singular.
      tokens: ``sum_t w_t``, the number of tokens that were not padding.
    """

    matrix: NDArray[np.float64]
    tokens: float

    @cached_property
    def root(self) -> NDArray[np.float32]:
        """``L`` with ``H = L L^T``, ``float32 [K, K]``, for all who weigh errors by this Gram.

        Factored in float64. Against the root, products in float32 will do: unlike against the Gram
        itself, nothing cancels.
        """
        return gram_root(self.matrix).astype(np.float32)


def accumulate_gram(
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]], in_features: int
) -> Gram:
    """Sum the weighted outer products of all tokens.

    The sum is over tokens, never over batches: batch size, order and sharding change it by
    rounding only. (Implementations that keep a running mean weight recent batches more.)

    Args:
      batches: inputs ``float32 [tokens, K]`` with token weights ``float32 [tokens]``; weight 0
        masks padding.
      in_features: ``K``.
    """
    matrix = np.zeros((in_features, in_features))
    total = 0.0
    for inputs, weights in batches:
        kept = weights > 0
        rows = inputs[kept] if not kept.all() else inputs
        roots = np.sqrt(weights[kept])
        uniform = bool((roots == 1).all())
        for start in range(0, len(rows), _BLOCK_TOKENS):
            block = rows[start : start + _BLOCK_TOKENS]
            if not uniform:
                block = block * roots[start : start + _BLOCK_TOKENS, None]
            # Values that are not finite are for the caller to find, in the result.
            with np.errstate(over="ignore", invalid="ignore"):
                # x.T @ x of one array is a symmetric rank-k update in BLAS: half the arithmetic.
                matrix += block.T @ block
        total += float(weights[kept].sum(dtype=np.float64))
    return Gram(matrix, total)
