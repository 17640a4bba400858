"""Types of an engine's tensors in NumPy, which has no bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_engine", "storage_type", "to_engine"]

_BFLOAT16 = "bfloat16"


def storage_type(dtype: str) -> np.dtype[Any]:
    """NumPy's type for values of ``dtype``; for bfloat16 it is ``uint16``, the bits."""
    return np.dtype(np.uint16 if dtype == _BFLOAT16 else dtype)


def to_engine(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Finite ``float32`` values in the type of an engine, rounded to nearest, ties to even.

    >>> [hex(bits) for bits in to_engine(np.array([1.0, -2.5], np.float32), "bfloat16")]
    ['0x3f80', '0xc020']
    """
    if dtype != _BFLOAT16:
        with np.errstate(over="ignore"):  # values beyond float16 become infinite
            return array.astype(dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # The lower half rounds up if it is above one half, or equal to it and the last bit is odd.
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def from_engine(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The values of an array in the type of an engine, as ``float32``, exactly.

    >>> from_engine(np.array([0x3F80, 0xC020], np.uint16), "bfloat16").tolist()
    [1.0, -2.5]
    """
    if dtype != _BFLOAT16:
        return array.astype(np.float32, copy=False)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
