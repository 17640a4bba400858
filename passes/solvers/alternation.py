"""A quantized weight and its low-rank correction, each solved for what the other leaves.

Source: Saha et al., CALDERA, arXiv:2405.18886, algorithm 1: ``W ~ Q + L R`` by turns, ``Q`` from
``W - L R`` and ``L R`` from ``W - Q``, and the best of all iterates in the end. There ``Q`` and the
factors are on QuIP#'s lattices; here they are what the passes of a build make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["Iterate", "alternate"]

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Iterate:
    """One state of the alternation.

    Attributes:
      weight: ``Q``.
      factors: ``L R``, ``lora_b @ lora_a``.
      error: of ``target - Q - L R``, as the caller measures it.
    """

    weight: NBitsWeight
    factors: LowRank
    error: float


def alternate(
    target: Float,
    weight: NBitsWeight,
    *,
    quantize: Callable[[Float], NBitsWeight],
    correct: Callable[[Float], LowRank],
    measure: Callable[[Float], float],
    iterations: int,
) -> tuple[Iterate, list[float]]:
    """Correct ``weight``, then quantize and correct by turns.

    The first iterate is ``weight`` with its correction, so that the best is never worse than
    correction alone. It ends early at a fixed point: where quantizing again gives the same codes on
    the same grid, all iterates to come are the same.

    Args:
      target: what the sum is to come near, ``float32 [N, K]``.
      weight: where to begin.
      quantize: a weight ``[N, K]``.
      correct: an error ``[N, K]``, by factors as they are stored.
      measure: what an error costs; infinite or NaN for one that is no use.
      iterations: how often to quantize again.

    Returns:
      The iterate with the least error, the earlier one of equals, and the errors of all iterates.
    """
    best: Iterate | None = None
    errors: list[float] = []
    for turn in range(iterations + 1):
        left = target - weight.dequantize()
        factors = correct(left)
        found = Iterate(weight, factors, measure(left - factors.product()))
        errors.append(found.error)
        if best is None or found.error < best.error:
            best = found
        if turn == iterations:
            break
        again = quantize(target - factors.product())
        if _same(again, weight):
            break
        weight = again
    assert best is not None  # noqa: S101 - the loop has run at least once
    return best, errors


def _same(one: NBitsWeight, other: NBitsWeight) -> bool:
    if not (np.array_equal(one.packed, other.packed) and np.array_equal(one.scales, other.scales)):
        return False
    if one.zero_points is None or other.zero_points is None:
        return one.zero_points is other.zero_points
    return np.array_equal(one.zero_points, other.zero_points)
