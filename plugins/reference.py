"""The fused op in NumPy and float64: the oracle that every kernel and function is held against."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands import LowRank, NBitsWeight

__all__ = ["fused_matmul"]


def fused_matmul(
    x: NDArray[np.floating[Any]],
    weight: NBitsWeight,
    factors: LowRank | None,
    bias: NDArray[np.floating[Any]] | None = None,
) -> NDArray[np.float64]:
    """``x @ W.T + (x @ lora_a.T) @ lora_b.T + bias``, every operand widened before use.

    Args:
      x: ``[..., K]``.
      weight: ``W``, ``[N, K]``.
      factors: the low-rank term, None for none.
      bias: ``[N]``, None for none.

    Returns:
      ``float64 [..., N]``.

    >>> weight = NBitsWeight.from_codes(
    ...     np.array([[3, 1, 2]], np.uint8), np.array([[0.5]], np.float32), None,
    ...     bits=2, group_size=8,
    ... )
    >>> fused_matmul(np.array([1.0, 2.0, 4.0]), weight, None).tolist()
    [-0.5]
    """
    x = x.astype(np.float64)
    zero_points = weight.zero_points
    if zero_points is None:
        zero_points = np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8)
    steps = weight.codes() - _per_column(zero_points, weight)
    dequantized = steps * _per_column(weight.scales, weight)
    y: NDArray[np.float64] = x @ dequantized.T
    if factors is not None:
        down = x @ factors.lora_a.T.astype(np.float64)
        y = y + down @ factors.lora_b.T.astype(np.float64)
    return y if bias is None else y + bias


def _per_column(per_group: NDArray[Any], weight: NBitsWeight) -> NDArray[np.float64]:
    columns = np.repeat(per_group.astype(np.float64), weight.group_size, axis=1)
    return columns[:, : weight.in_features]
