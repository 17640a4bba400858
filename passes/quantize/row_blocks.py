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

__all__ = ["by_row_blocks", "row_blocks", "rows_of", "stack_rows"]

_BLOCK_WEIGHTS = 2**25
"""Weights of a block, 134 MB of float32: more than any linear of a block of a 7B model but its
widest has."""


def by_row_blocks(
    weight: NDArray[np.float32], solve: Callable[[NDArray[np.float32]], NBitsWeight]
) -> NBitsWeight:
    """Quantize ``weight [N, K]`` by ``solve``, block of rows by block of rows."""
    return stack_rows([solve(weight[rows]) for rows in row_blocks(weight.shape)])


def row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """The rows of each block of a weight of ``shape``, ``(N, K)``."""
    count, width = shape
    step = max(_BLOCK_WEIGHTS // width, 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def rows_of(weight: NBitsWeight, rows: slice) -> NBitsWeight:
    """Some rows of a quantized weight, as views."""
    zero_points = weight.zero_points
    return replace(
        weight,
        packed=weight.packed[rows],
        scales=weight.scales[rows],
        zero_points=None if zero_points is None else zero_points[rows],
    )


def stack_rows(blocks: Sequence[NBitsWeight]) -> NBitsWeight:
    """The weight whose blocks of rows are ``blocks``, one at least."""
    if len(blocks) == 1:
        return blocks[0]
    zero_points = [block.zero_points for block in blocks if block.zero_points is not None]
    return replace(
        blocks[0],
        packed=np.concatenate([block.packed for block in blocks]),
        scales=np.concatenate([block.scales for block in blocks]),
        zero_points=np.concatenate(zero_points) if zero_points else None,
    )
