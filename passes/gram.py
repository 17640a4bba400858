"""The Gram matrix of a linear's input, accumulated so that the order of tokens does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.factors import gram_root
from eoracc.passes.gptq import Feedback, feedback

if TYPE_CHECKING:
    from eoracc.compiler.linears import Activations
    from eoracc.plugins.operands import NBitsWeight

__all__ = ["AddOuterProducts", "Gram", "Residual", "accumulate_gram"]

_BLOCK_TOKENS = 2048
"""Tokens per product."""
_SUM_TOKENS = 8192
"""Tokens whose products are summed in float32; those sums are added in float64."""

AddOuterProducts = Callable[[NDArray[np.float32], NDArray[np.float32]], None]
"""``add(rows, total)`` adds ``rows.T @ rows`` to ``total [K, K]``, its lower triangle at least."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What quantization took of one linear.

    Attributes:
      delta: ``W - W_hat``, ``float32 [N, K]``.
      weighted: ``delta L`` with the root ``L`` of the input's Gram, ``float32 [N, K]``: its norm is
        the output error over the calibration tokens.
    """

    delta: NDArray[np.float32]
    weighted: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Gram:
    """``H = sum_t w_t x_t x_t^T`` over calibration tokens.

    Attributes:
      matrix: ``float64 [K, K]``, symmetric positive semidefinite, possibly singular.
      tokens: ``sum_t w_t``, the number of tokens that were not padding.
      residuals: what quantization took of the linears that share this input, by quantized weight;
        kept for the passes to come (:func:`eoracc.passes.statistics.residual_of`).
      activations: what the sum is over, for statistics that few passes ask for; None where they are
        gone.
    """

    matrix: NDArray[np.float64]
    tokens: float
    activations: Activations | None = field(default=None, repr=False)
    residuals: WeakKeyDictionary[NBitsWeight, Residual] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @cached_property
    def root(self) -> NDArray[np.float32]:
        """``L`` with ``H = L L^T``, ``float32 [K, K]``, for all who weigh errors by this Gram.

        Factored in float64. Against the root, products in float32 will do: unlike against the Gram
        itself, nothing cancels.
        """
        return gram_root(self.matrix).astype(np.float32)

    @cached_property
    def magnitudes(self) -> NDArray[np.float64]:
        """``mean |x_i|`` over the tokens, ``[K]``; what has been masked counts for nothing.

        Raises:
          ValueError: the activations are gone.
        """
        if self.activations is None:
            raise ValueError("the activations that this Gram was summed over are gone")
        total = np.zeros(len(self.matrix))
        for inputs, weights in self.activations():
            total += weights @ np.abs(inputs)
        return total / self.tokens if self.tokens > 0 else total

    @cached_property
    def feedback(self) -> Feedback:
        """What rounding in the metric of this Gram needs, for all who round to few bits by it."""
        return feedback(self.matrix)


def accumulate_gram(
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]],
    in_features: int,
    *,
    add: AddOuterProducts | None = None,
) -> Gram:
    """Sum the weighted outer products of all tokens.

    The sum is over tokens, never over batches: batch size, order and sharding change it by
    rounding only. (Implementations that keep a running mean weight recent batches more.)

    Args:
      batches: inputs ``float32 [tokens, K]`` with token weights ``float32 [tokens]``; weight 0
        masks padding.
      in_features: ``K``.
      add: how products are made; None makes them in float32.
    """
    add = add or _add_outer_products
    matrix = np.zeros((in_features, in_features))
    partial = np.zeros((in_features, in_features), np.float32)
    total, pending = 0.0, 0
    for inputs, weights in batches:
        for block in _weighted_blocks(inputs, weights):
            if pending + len(block) > _SUM_TOKENS:
                matrix += partial
                partial[:] = 0
                pending = 0
            # Values that are not finite are for the caller to find, in the result.
            with np.errstate(over="ignore", invalid="ignore"):
                add(block, partial)
            pending += len(block)
        total += float(weights.sum(dtype=np.float64))
    matrix += partial
    return Gram(_mirrored(matrix), total)


def _weighted_blocks(
    inputs: NDArray[np.float32], weights: NDArray[np.float32]
) -> Iterator[NDArray[np.float32]]:
    """The rows that count, each times the root of its weight."""
    kept = weights > 0
    rows, roots = (inputs, weights) if kept.all() else (inputs[kept], weights[kept])
    uniform = bool((roots == 1).all())
    for start in range(0, len(rows), _BLOCK_TOKENS):
        block = rows[start : start + _BLOCK_TOKENS]
        yield block if uniform else block * np.sqrt(roots[start : start + _BLOCK_TOKENS, None])


def _add_outer_products(rows: NDArray[np.float32], total: NDArray[np.float32]) -> None:
    # x.T @ x of one array is a symmetric rank-k update in BLAS: half the arithmetic.
    total += rows.T @ rows


def _mirrored(lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric matrix of which ``lower`` holds the lower triangle."""
    upper = np.triu_indices(len(lower), 1)
    lower[upper] = lower.T[upper]
    return lower
