"""Alternate between a quantized weight and its low-rank correction.

Source: Saha et al., CALDERA, arXiv:2405.18886, algorithm 1: ``W ~ Q + L R``, where ``Q`` is solved
from ``W - L R`` and ``L R`` from ``W - Q`` by turns; the best iterate is returned. In the paper
``Q`` and the factors are on QuIP#'s lattices; here the passes of the build make them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.dense import DenseWeight, StoredWeight
from eoracc.plugins.operands.low_rank import LowRank

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

    weight: StoredWeight
    factors: LowRank
    error: float


def alternate(
    target: Float,
    weight: StoredWeight,
    *,
    quantize: Callable[[Float], StoredWeight],
    correct: Callable[[Float], LowRank],
    measure: Callable[[Float], float],
    iterations: int,
) -> tuple[Iterate, list[float]]:
    """Correct ``weight``, then quantize and correct by turns.

    The first iterate is ``weight`` with its correction, so the result is never worse than the
    correction alone. The loop ends early at a fixed point: once quantizing gives the same codes on
    the same grid again, all later iterates are equal.

    Args:
      target: the weight that the sum approximates, ``float32 [N, K]``.
      weight: the start.
      quantize: quantizes a weight ``[N, K]``.
      correct: approximates an error ``[N, K]`` by factors in their stored form.
      measure: the cost of an error; infinite or NaN where the error is unusable.
      iterations: number of further quantizations.

    Returns:
      The iterate with the least error (the first of equals), and the errors of all iterates.
    """
    best: Iterate | None = None
    errors: list[float] = []
    for turn in range(iterations + 1):
        residual = target - weight.dequantize()
        factors = correct(residual)
        iterate = Iterate(weight, factors, measure(residual - factors.product()))
        errors.append(iterate.error)
        if best is None or iterate.error < best.error:
            best = iterate
        if turn == iterations:
            break
        again = quantize(target - factors.product())
        if _same(again, weight):
            break
        weight = again
    assert best is not None  # noqa: S101 - the loop has run at least once
    return best, errors


def _same(one: StoredWeight, other: StoredWeight) -> bool:
    if isinstance(one, DenseWeight) or isinstance(other, DenseWeight):
        return np.array_equal(one.dequantize(), other.dequantize())
    if not (np.array_equal(one.packed, other.packed) and np.array_equal(one.scales, other.scales)):
        return False
    if one.zero_points is None or other.zero_points is None:
        return one.zero_points is other.zero_points
    return np.array_equal(one.zero_points, other.zero_points)
