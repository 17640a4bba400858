"""Codes in words of 32 bits, as the checkpoints of other packages hold them.

The codes of a row (or column) are one little-endian bit stream: code ``i`` has the bits
``[i * bits, (i + 1) * bits)`` of the stream, and word ``j`` is its bits ``[32 * j, 32 * (j + 1))``.
A code of 3, 5, 6 or 7 bits may thus straddle two words. GPTQ packs its codes so along K and its
zero points along N, compressed-tensors its codes along K and its zero points along N.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.codes import pack_codes, unpack_codes

__all__ = ["pack_words", "unpack_words", "word_count"]

_WORD_BITS = 32
_RUN = 32
"""Codes that fill whole words at every width."""


def word_count(count: int, *, bits: int) -> int:
    """Words that hold ``count`` codes.

    >>> word_count(352, bits=3), word_count(352, bits=4)
    (33, 44)
    """
    return -(-count * bits // _WORD_BITS)


def pack_words(codes: NDArray[np.uint8], *, bits: int, axis: int) -> NDArray[np.int32]:
    """Pack codes into words along an axis; the last word is padded with zero bits.

    Args:
      codes: of two dimensions, each below ``2**bits``.
      bits: from 2 to 8.
      axis: that becomes shorter, 0 or 1.

    Returns:
      The words, ``int32``, with :func:`word_count` places along ``axis``.

    >>> pack_words(np.arange(8, dtype=np.uint8)[None], bits=4, axis=1)
    array([[1985229328]], dtype=int32)
    """
    rows = np.moveaxis(codes, axis, 1)
    count = rows.shape[1]
    # A group of all codes of a row: its bytes are the stream.
    width = max(-(-count // _RUN), 1) * _RUN
    padded = np.zeros((len(rows), width), np.uint8)
    padded[:, :count] = rows
    stream = pack_codes(padded, bits=bits, group_size=width).reshape(len(rows), width * bits // 8)
    words = stream.view("<i4")[:, : word_count(count, bits=bits)]
    return np.ascontiguousarray(np.moveaxis(words, 1, axis))


def unpack_words(
    words: NDArray[np.int32] | NDArray[np.uint32], *, bits: int, count: int, axis: int
) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_words`.

    Args:
      words: ``int32`` or ``uint32`` of two dimensions.
      bits: of a code, from 2 to 8.
      count: of codes along ``axis``, whose words are all there.
      axis: along which the codes are packed, 0 or 1.

    Returns:
      The codes, ``uint8``, with ``count`` places along ``axis``.

    >>> unpack_words(np.array([[1985229328]], np.int32), bits=4, count=8, axis=1).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows = np.moveaxis(words, axis, 1)
    length = max(-(-count // _RUN), 1) * bits
    padded = np.zeros((len(rows), length), "<i4")
    needed = word_count(count, bits=bits)
    padded[:, :needed] = rows[:, :needed].view(np.int32)
    stream = padded.view(np.uint8)[:, None]
    codes = unpack_codes(stream, bits=bits, in_features=count)
    return np.ascontiguousarray(np.moveaxis(codes, 1, axis))
