"""Low-rank factors in the types that they are stored in."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.factors import to_float16
from eoracc.plugins.operands import LowRank

__all__ = ["FactorType", "round_to_int8", "store_factors"]

FactorType = Literal["float16", "int8"]
"""Of both factors; int8 ones have a float32 scale a row."""

_LARGEST = 127


def store_factors(
    b: NDArray[np.float64], a: NDArray[np.float64], factor_type: FactorType
) -> LowRank:
    """Factors as the artifact holds them.

    For int8, columns of ``b`` are first brought to one norm, and the rows of ``a`` take up the
    difference in their scales: a row of ``b`` has one step for all ranks, in which the smaller ones
    would be lost.

    Args:
      b: ``[N, R]``.
      a: ``[R, K]``.
      factor_type: what to store.
    """
    if factor_type == "float16":
        return LowRank(lora_a=to_float16(a), lora_b=to_float16(b))
    norms = np.linalg.norm(b, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    lora_a, lora_a_scale = round_to_int8(a * norms[:, None])
    lora_b, lora_b_scale = round_to_int8(b / norms)
    return LowRank(
        lora_a=lora_a, lora_b=lora_b, lora_a_scale=lora_a_scale, lora_b_scale=lora_b_scale
    )


def round_to_int8(factor: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Each row as codes in -127..127 and a scale, off by half a scale at most.

    >>> codes, scale = round_to_int8(np.array([[2.0, -4.0, 0.1], [0.0, 0.0, 0.0]]))
    >>> codes.tolist(), [round(float(s), 4) for s in scale]
    ([[64, -127, 3], [0, 0, 0]], [0.0315, 0.0])
    """
    largest = np.abs(factor).max(axis=1, initial=0.0)
    scale = (largest / _LARGEST).astype(np.float32)
    # A scale that float32 rounds to 0 or to a denormal number leaves nothing of its row.
    usable = scale >= np.finfo(np.float32).tiny
    scale = np.where(usable, scale, np.float32(0))
    steps = np.where(usable, scale, np.float32(1)).astype(np.float64)[:, None]
    codes = np.clip(np.rint(np.where(usable[:, None], factor, 0.0) / steps), -_LARGEST, _LARGEST)
    return codes.astype(np.int8), scale
