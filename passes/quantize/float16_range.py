"""Bring a weight into the range of float16 scales, by a power of two, and back.

Scales are float16, which ends at 6e-8 and 65,504. A linear whose weights are of the order of 1e-7
as a whole would be rounded to a few multiples of 6e-8, or to nothing. It is multiplied by a power
of two before it is solved, and its scales, then float32, are divided by it after. Both are exact:
codes and relative errors are those of the larger weight.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["range_shift", "shift_scales", "shifted"]

_SMALLEST, _LARGEST = 2.0**-17, 2.0**15
"""Bounds of a linear's largest scale. Float16 still has 7 bits of precision at the lower one, and
both leave every weight that is known from practice as it is."""


def range_shift(weight: NDArray[np.float32], *, bits: int) -> int:
    """The power of two by which to multiply ``weight`` before it is quantized.

    Args:
      weight: of any shape, finite.
      bits: width of a code.

    Returns:
      ``k`` of ``2**k``; 0 for a weight whose scales float16 holds, and for zeros.

    >>> range_shift(np.float32([0.5, -0.01]), bits=4), range_shift(np.float32([3e-7]), bits=4)
    (0, 25)
    """
    scale = float(np.abs(weight).max(initial=0)) / (2**bits - 1)
    if scale == 0 or _SMALLEST <= scale <= _LARGEST:
        return 0
    _, exponent = np.frexp(scale)
    return -int(exponent)


def shifted(weight: NDArray[np.float32], shift: int) -> NDArray[np.float32]:
    """``weight`` times ``2**shift``; ``weight`` itself for 0."""
    return weight if shift == 0 else np.ldexp(weight, shift)


def shift_scales(weight: NBitsWeight, shift: int) -> NBitsWeight:
    """``weight`` times ``2**shift``, with scales in float32; ``weight`` itself for 0.

    >>> import numpy as np
    >>> codes, scales = np.uint8([[9, 8]]), np.float16([[0.5]])
    >>> weight = NBitsWeight.from_codes(codes, scales, None, bits=4, group_size=8)
    >>> shift_scales(weight, -1).dequantize()
    array([[0.25, 0.  ]], dtype=float32)
    """
    if shift == 0:
        return weight
    return replace(weight, scales=np.ldexp(weight.scales.astype(np.float32), shift))
