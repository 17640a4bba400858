"""Reference outputs of a linear in one or two bytes each, and their tolerances in half of one.

An output is of no use in more digits than its tolerance has. It is kept in steps of a quarter of
its tolerance, and of these the last byte, or the last two. So outputs are compared modulo 64 or
16384 tolerances. A larger error escapes in a single output where it is close to a multiple of that:
with one byte for one output in 28 and each row of inputs, of which there are two; and what is that
wrong is mostly wrong in more than one output. Small folders keep two bytes. So does every linear
where the native library may round between factors by so much that one byte would not tell right
from wrong.

Tolerances ``[rows, N]`` grow with the inputs of a row and the weights of an output, and so does
what rounding adds. Each is kept as ``scale[row] * 2^(-level[output] * span / 15)``, which is not
below it, with 16 levels from the largest output of the linear to the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["HALF_STEP", "LinearCodes", "decode", "encode"]

_STEPS = 4
"""Of an output, to its tolerance."""

HALF_STEP = 0.5 / _STEPS
"""Tolerances by which the coding of an output may move it."""

_NARROW = 7
"""Most tolerances, on average, that rounding may add to outputs of one byte."""

_LEVELS = 15
_SMALLEST = 1e-9
"""Scale of a row whose tolerances are all 0. It is far below any output, and no power of two:
changes of weights that are 0 often are, and none may be a multiple of the period."""
_LONGEST_SPAN = 16.0
"""Octaves; tolerances that are further below the largest count as that."""


@dataclass(frozen=True, eq=False)
class LinearCodes:
    """Outputs, tolerances and rounding of one linear as a file keeps them.

    Attributes:
      outputs: ``uint8 [bytes, rows, N]``, lowest byte first.
      levels: ``uint8 [N]``: of the tolerance, plus 16 times that of the rounding.
      scales: ``float32 [2, rows + 1]``, of the tolerance and of the rounding: of each row, and the
        span in octaves. 0 where there is no rounding.
    """

    outputs: NDArray[np.uint8]
    levels: NDArray[np.uint8]
    scales: NDArray[np.float32]

    @property
    def period(self) -> float:
        """Tolerances by a multiple of which an output may differ from what it is decoded to."""
        return float(256 ** len(self.outputs) / _STEPS)


def encode(
    outputs: NDArray[np.float32],
    tolerance: NDArray[np.float32],
    rounding: NDArray[np.float32] | None,
    *,
    width: Literal[1, 2] = 2,
) -> LinearCodes:
    """Encode finite outputs, tolerances and, where there is one, rounding, all ``[rows, N]``.

    Args:
      outputs: of the linear.
      tolerance: of each.
      rounding: further deviation of each; None for none.
      width: bytes of an output; 2 where rounding needs it.
    """
    levels, scales = _encode_bounds(tolerance)
    scales_of_rounding = np.zeros_like(scales)
    if rounding is not None:
        levels_of_rounding, scales_of_rounding = _encode_bounds(rounding)
        if rounding.sum() > _NARROW * tolerance.sum():
            width = 2
        levels |= levels_of_rounding << 4
    step = _decode_bounds(levels & 15, scales).astype(np.float64) / _STEPS
    steps = np.rint(outputs / step).astype(np.int64)
    planes = [(steps >> 8 * place & 255).astype(np.uint8) for place in range(width)]
    return LinearCodes(np.stack(planes), levels, np.stack([scales, scales_of_rounding]))


def decode(
    codes: LinearCodes,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
    """Outputs up to a multiple of the period, tolerances and rounding, as :func:`encode` takes."""
    tolerance = _decode_bounds(codes.levels & 15, codes.scales[0])
    rounding = _decode_bounds(codes.levels >> 4, codes.scales[1]) if codes.scales[1].any() else None
    weights = 256.0 ** np.arange(len(codes.outputs))
    steps = np.tensordot(weights, codes.outputs.astype(np.float64), axes=1)
    return (steps * tolerance / _STEPS).astype(np.float32), tolerance, rounding


def _encode_bounds(bounds: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Levels ``[N]``, and scales ``[rows + 1]``, the span being the last of them."""
    scales = np.maximum(bounds.max(axis=1), _SMALLEST)
    shares = (bounds.astype(np.float64) / scales[:, None]).max(axis=0)
    octaves = -np.log2(np.maximum(shares, 2.0**-_LONGEST_SPAN))
    span = octaves.max()
    levels = np.floor(octaves * (_LEVELS / span)) if span else np.zeros_like(octaves)
    return levels.clip(0, _LEVELS).astype(np.uint8), np.append(scales, span).astype(np.float32)


def _decode_bounds(
    levels: NDArray[np.integer[Any]], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    shares = np.exp2(levels * (-float(scales[-1]) / _LEVELS))
    bounds: NDArray[np.float32] = (scales[:-1, None] * shares).astype(np.float32)
    return bounds
