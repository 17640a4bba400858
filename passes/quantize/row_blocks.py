"""Solve a weight of many rows, such as a head, in blocks of rows.

Rows of a weight are independent of one another given the Gram of the input. A solver holds several
float32 arrays of the size of the weight that it solves, and a head has a row for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["by_row_blocks", "rows_of"]

_BLOCK_WEIGHTS = 2**25
"""Weights of a block, 134 MB of float32: more than any linear of a block of a 7B model but its
widest has."""


def by_row_blocks(
    weight: NDArray[np.float32], solve: Callable[[NDArray[np.float32]], NBitsWeight]
) -> NBitsWeight:
    """Quantize ``weight [N, K]`` by ``solve``, block of rows by block of rows."""
    rows = max(_BLOCK_WEIGHTS // weight.shape[1], 1)
    if len(weight) <= rows:
        return solve(weight)
    return _stack([solve(weight[start : start + rows]) for start in range(0, len(weight), rows)])


def rows_of(weight: NBitsWeight, start: int, stop: int) -> NBitsWeight:
    """Rows ``start`` to ``stop`` of a quantized weight, as views."""
    zero_points = weight.zero_points
    return replace(
        weight,
        packed=weight.packed[start:stop],
        scales=weight.scales[start:stop],
        zero_points=None if zero_points is None else zero_points[start:stop],
    )


def _stack(blocks: Sequence[NBitsWeight]) -> NBitsWeight:
    zero_points = [block.zero_points for block in blocks if block.zero_points is not None]
    return replace(
        blocks[0],
        packed=np.concatenate([block.packed for block in blocks]),
        scales=np.concatenate([block.scales for block in blocks]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
    )
