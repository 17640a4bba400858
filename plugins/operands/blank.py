"""Operands of zeros, for a graph whose size is asked for before its weights are solved.

Their memory is reserved and never touched, so that they take none. Scales of factors are zeros too,
which float16 holds, as solvers round them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["blank_factors", "blank_weight"]


def blank_weight(
    out_features: int, in_features: int, *, bits: int, group_size: int, zero_points: bool
) -> NBitsWeight:
    """A weight ``[N, K]`` of zeros with float16 scales.

    Args:
      out_features: ``N``.
      in_features: ``K``.
      bits: of a code.
      group_size: columns that share a scale, a multiple of 8.
      zero_points: whether there are any.

    >>> blank_weight(4, 20, bits=3, group_size=16, zero_points=True).packed.shape
    (4, 2, 6)
    """
    groups = -(-in_features // group_size)
    return NBitsWeight(
        packed=np.zeros((out_features, groups, group_size * bits // 8), np.uint8),
        scales=np.zeros((out_features, groups), np.float16),
        zero_points=np.zeros((out_features, groups), np.uint8) if zero_points else None,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )


def blank_factors(
    out_features: int,
    in_features: int,
    rank: int,
    factor_type: Literal["float16", "int8", "int4"],
) -> LowRank:
    """Factors ``[N, R]`` and ``[R, K]`` of zeros.

    Args:
      out_features: ``N``.
      in_features: ``K``.
      rank: ``R``.
      factor_type: what they are stored in.

    >>> blank_factors(4, 20, 2, "int4").factor_type
    'int4'
    """
    down, up = (rank, in_features), (out_features, rank)
    if factor_type == "float16":
        return LowRank(lora_a=np.zeros(down, np.float16), lora_b=np.zeros(up, np.float16))
    return LowRank(
        lora_a=np.zeros(down, np.int8),
        lora_b=np.zeros(up, np.int8),
        lora_a_scale=np.zeros(rank, np.float32),
        lora_b_scale=np.zeros(out_features, np.float32),
        bits=int(factor_type.removeprefix("int")),
    )
