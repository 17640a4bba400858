"""The codes of another package in the form that the op holds, or in floats where it cannot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.graph.imported import ImportedWeight
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.plugins.operands.weight import NBitsWeight, zero_point_bits

__all__ = ["held_weight"]

_MULTIPLE = 8
"""Of which the width of a group must be one."""


def held_weight(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.int32] | None,
    *,
    bits: int,
    groups: NDArray[np.integer],
) -> ImportedWeight:
    """A weight whose values are ``(code - zero point) * scale``, exactly.

    Codes become wider where the op has no codes of ``bits``, or no zero points as large as these.

    Args:
      codes: ``[N, K]``, below ``2**bits``.
      scales: ``[N, G]``.
      zero_points: ``[N, G]``, not negative; None stands for ``2**(bits - 1)``.
      bits: of a code, 8 at most.
      groups: the group of each column, ``[K]``, below ``G``.

    >>> codes, ones = np.uint8([[0, 31]]), np.ones((1, 1), np.float32)
    >>> held = held_weight(codes, ones, None, bits=5, groups=np.array([0, 0]))
    >>> held.weight.bits, held.weight.dequantize().tolist()
    (6, [[-16.0, 15.0]])
    """
    if zero_points is None:
        zero_points = np.full(scales.shape, 2 ** (bits - 1), np.int32)
    largest = int(zero_points.max(initial=0))
    width = _width(groups)
    wide = next((b for b in BITS if b >= bits and largest < 2 ** zero_point_bits(b)), None)
    if width is None or wide is None:
        why = (
            "its groups are no runs of columns (act-order)"
            if width is None
            else f"its zero points go to {largest}"
        )
        values = codes.astype(np.float32) - zero_points.astype(np.float32)[:, groups]
        values *= scales[:, groups]
        return ImportedWeight(DenseWeight(np.asfortranarray(values)), dequantized=why)
    symmetric = bool((zero_points == 2 ** (wide - 1)).all())
    return ImportedWeight(
        NBitsWeight.from_codes(
            codes,
            _narrow(scales),
            None if symmetric else zero_points.astype(np.uint8),
            bits=wide,
            group_size=width,
        )
    )


def _width(groups: NDArray[np.integer]) -> int | None:
    """Columns of a group where all are runs of one width, but for the last; else None."""
    count = len(groups)
    width = int(np.argmax(groups != groups[0])) or count
    if not np.array_equal(groups, np.arange(count) // width):
        return None
    if width == count:
        return -(-count // _MULTIPLE) * _MULTIPLE  # what is beyond the row is padding
    return width if width % _MULTIPLE == 0 else None


def _narrow(scales: NDArray[np.float32]) -> NDArray[np.float16] | NDArray[np.float32]:
    """``scales`` in float16 where that holds each of them."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half, scales) else scales
