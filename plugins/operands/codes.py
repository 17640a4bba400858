"""Integer codes as they are stored: packed into bytes, in one of two orders.

The **plain** layout (``layout`` 0) is the one that the compiler works on: rows of W one after
another, the codes of a group one little-endian bit stream, code ``i`` in the bits
``[i*bits, (i+1)*bits)``. For 2, 4 and 8 bits this is ONNX Runtime's MatMulNBits layout; at 3 and 6
bits eight codes take three and six bytes.

The **tiled** layout (``layout`` 1) is the order in which the kernels read. 16 rows of W form a
tile, and a *quad* is 4 consecutive columns of it: 64 codes, one in each byte of a vector of 64
bytes, at ``4 * row + column``. A *chunk* is the least run of quads that fills whole vectors:

====  ======  =======================  ====================================================
bits  quads   vectors                  position of a code in its bytes
====  ======  =======================  ====================================================
8     1       1                        the byte
4     2       1                        quad 0 in the low half, quad 1 in the high half
2     4       1                        quad ``m`` in the bits ``[2m, 2m + 2)``
3     8       3                        the low two bits of quads 0..3 in vector 0 and of quads
                                       4..7 in vector 1, both as at 2 bits; the high bit of
                                       quad ``q`` is bit ``q`` of vector 2
6     4       3                        the low four bits of quads 0..1 in vector 0 and of quads
                                       2..3 in vector 1, both as at 4 bits; the high two bits of
                                       all four in vector 2, as at 2 bits
====  ======  =======================  ====================================================

Other arrays of rows of W (scales, zero points, float factors) are tiled the same way, without
quads: ``[rows, columns]`` becomes ``[ceil(rows / 16), columns, 16]``. :func:`tile_codes` and
:func:`tile_rows` convert, :func:`untile_codes` and :func:`untile_rows` convert back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BITS",
    "CHUNK",
    "FACTOR_BITS",
    "LARGEST",
    "LOW_BITS",
    "QUAD",
    "TILE",
    "VECTOR",
    "pack_codes",
    "tile_bytes",
    "tile_codes",
    "tile_integers",
    "tile_rows",
    "unpack_codes",
    "untile_codes",
    "untile_integers",
    "untile_rows",
]

BITS = (2, 3, 4, 6, 8)
"""Code widths that the op supports."""

TILE = 16
"""Rows of W in a tile."""

CHUNK: Mapping[int, int] = {2: 16, 3: 32, 4: 8, 6: 16, 8: 4}
"""Columns of a chunk by code width."""

LOW_BITS: Mapping[int, int] = {3: 2, 6: 4}
"""Low bits of a code that are stored as codes of this width, by code widths that fill no byte. The
vectors behind them hold the other bits, as codes of *that* width."""

FACTOR_BITS = (8, 4)
"""Code widths of integer factors."""

LARGEST: Mapping[int, int] = {8: 127, 4: 7}
"""Largest magnitude of an integer factor's values by code width. Values are symmetric about 0;
0 is stored as ``2**(bits - 1)``."""

QUAD = 4
"""Consecutive columns of a tile whose codes share a vector."""

VECTOR = TILE * QUAD
"""Bytes of a vector."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


def pack_codes(codes: NDArray[np.uint8], *, bits: int, group_size: int) -> NDArray[np.uint8]:
    """Pack integer codes into the stored layout.

    Args:
      codes: ``[N, K]``, each below ``2**bits``.
      bits: one of :data:`BITS`.
      group_size: codes per group, a multiple of 8; the last group is padded with zero bits.

    Returns:
      ``uint8 [N, ceil(K / group_size), group_size * bits / 8]``.

    >>> pack_codes(np.arange(8, dtype=np.uint8)[None], bits=3, group_size=8).tolist()
    [[[136, 198, 250]]]
    """
    rows, columns = codes.shape
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), np.uint8)
    padded[:, :columns] = codes
    if bits == 8:
        return padded.reshape(rows, groups, group_size)
    # Eight codes always fill `bits` whole bytes, and a word holds a run of eight.
    word = _word(bits)
    runs = padded.reshape(rows, groups * group_size // 8, 8).astype(word)
    words = (runs << np.arange(0, 8 * bits, bits, dtype=word)).sum(axis=-1, dtype=word)
    stream = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(rows, groups, group_size * bits // 8)


def unpack_codes(packed: NDArray[np.uint8], *, bits: int, in_features: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_codes`.

    Returns:
      ``uint8 [N, K]``.

    >>> unpack_codes(np.array([[[136, 198, 250]]], np.uint8), bits=3, in_features=8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows, groups, group_bytes = packed.shape
    if bits == 8:
        return np.ascontiguousarray(packed.reshape(rows, groups * group_bytes)[:, :in_features])
    runs = packed.reshape(rows, groups * group_bytes // bits, bits)
    word = _word(bits)
    words = np.zeros((*runs.shape[:2], word.itemsize), np.uint8)
    words[..., :bits] = runs
    shifts = np.arange(0, 8 * bits, bits, dtype=word)
    codes = (words.view(word) >> shifts) & word.type(2**bits - 1)
    flat = codes.astype(np.uint8).reshape(rows, 8 * runs.shape[1])
    return np.ascontiguousarray(flat[:, :in_features])


def _word(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest word that holds eight codes."""
    return np.dtype("<u4" if bits <= 4 else "<u8")


def tile_codes(codes: NDArray[np.uint8], *, bits: int, padding: int = 0) -> NDArray[np.uint8]:
    """Pack integer codes into the tiled layout.

    Args:
      codes: ``[N, K]``, each below ``2**bits``.
      bits: one of :data:`BITS`.
      padding: code of the rows and columns that pad tiles and chunks.

    Returns:
      ``uint8 [ceil(N / 16), ceil(K / CHUNK[bits]), 64]``, at 3 and 6 bits ``192`` in the
      last place.

    >>> tile_codes(np.arange(16, dtype=np.uint8).reshape(2, 8), bits=4)[0, 0, :9].tolist()
    [64, 81, 98, 115, 200, 217, 234, 251, 0]
    """
    rows, columns = codes.shape
    tiles, chunks = -(-rows // TILE), -(-columns // CHUNK[bits])
    padded = np.full((tiles * TILE, chunks * CHUNK[bits]), padding, np.uint8)
    padded[:rows, :columns] = codes
    # [tile, chunk, quad, byte]: a quad's rows and columns are the bytes of a vector.
    per_chunk = CHUNK[bits] // QUAD
    quads = padded.reshape(tiles, TILE, chunks, per_chunk, QUAD).transpose(0, 2, 3, 1, 4)
    quads = quads.reshape(tiles, chunks, per_chunk, VECTOR)
    if bits not in LOW_BITS:
        return _stack_bits(quads, bits)
    width = LOW_BITS[bits]
    low = quads & np.uint8(2**width - 1)
    low = _stack_bits(low.reshape(tiles, chunks, 2, per_chunk // 2, VECTOR), width)
    high = _stack_bits(quads >> np.uint8(width), bits - width)
    return np.concatenate([low.reshape(tiles, chunks, 2 * VECTOR), high], axis=-1)


def untile_codes(
    tiled: NDArray[np.uint8], *, bits: int, out_features: int, in_features: int
) -> NDArray[np.uint8]:
    """Inverse of :func:`tile_codes`.

    Returns:
      ``uint8 [out_features, in_features]``.
    """
    tiles, chunks = tiled.shape[:2]
    if bits in LOW_BITS:
        width = LOW_BITS[bits]
        low = _split_bits(tiled[..., : 2 * VECTOR].reshape(tiles, chunks, 2, VECTOR), width)
        high = _split_bits(tiled[..., 2 * VECTOR :], bits - width)
        quads = low.reshape(high.shape) | high << np.uint8(width)
    else:
        quads = _split_bits(tiled, bits)
    per_chunk = CHUNK[bits] // QUAD
    rows = quads.reshape(tiles, chunks, per_chunk, TILE, QUAD).transpose(0, 3, 1, 2, 4)
    rows = rows.reshape(tiles * TILE, chunks * CHUNK[bits])
    return np.ascontiguousarray(rows[:out_features, :in_features])


def _stack_bits(parts: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """``[..., m, bytes]`` to ``[..., bytes]``, part ``m`` at bit ``width * m`` of every byte."""
    shifts = np.arange(0, width * parts.shape[-2], width, dtype=np.uint8)[:, None]
    stacked: NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=-2)
    return stacked


def _split_bits(stacked: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Inverse of :func:`_stack_bits`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts: NDArray[np.uint8] = stacked[..., None, :] >> shifts & np.uint8(2**width - 1)
    return parts


def tile_rows(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """Tile ``[rows, columns]`` of rows of W into ``[ceil(rows / 16), columns, 16]``.

    Scales and zero points ``[N, G]`` and float factors ``[R, K]`` and ``[N, R]`` are stored so.
    Padding rows of the last tile are 0.

    >>> tile_rows(np.array([[1, 2], [3, 4]]))[0, :, :3].tolist()
    [[1, 3, 0], [2, 4, 0]]
    """
    rows, columns = array.shape
    tiles = -(-rows // TILE)
    padded = np.zeros((tiles * TILE, columns), array.dtype)
    padded[:rows] = array
    return np.ascontiguousarray(padded.reshape(tiles, TILE, columns).transpose(0, 2, 1))


def tile_bytes(rows: int, columns: int, *, bits: int) -> int:
    """Bytes of an array of rows of W in the tiled layout, padding included.

    Args:
      rows: stored in whole tiles.
      columns: of codes, stored in whole chunks.
      bits: of an element: a code, or 16 or 32 of a float.

    >>> tile_bytes(576, 100, bits=3), tile_bytes(8, 100, bits=4), tile_bytes(8, 100, bits=16)
    (27648, 832, 3200)
    """
    chunk = CHUNK.get(bits, 1)
    return -(-rows // TILE) * -(-columns // chunk) * chunk * bits * TILE // 8


def tile_integers(values: NDArray[np.int8], *, bits: int) -> NDArray[np.uint8]:
    """An integer factor as tiles of ``bits``, the value 0 stored as ``2**(bits - 1)``.

    Args:
      values: ``[rows, columns]``, of magnitudes up to ``LARGEST[bits]``.
      bits: one of :data:`FACTOR_BITS`.

    Returns:
      ``uint8 [ceil(rows / 16), ceil(columns / CHUNK[bits]), 64]``; the padding is the value 0.

    >>> tile_integers(np.array([[-127, 0, 5]], np.int8), bits=8)[0, 0, :5].tolist()
    [1, 128, 133, 128, 128]
    >>> tile_integers(np.array([[-7, 0, 5]], np.int8), bits=4)[0, 0, :5].tolist()
    [129, 136, 141, 136, 136]
    """
    zero = 2 ** (bits - 1)
    codes = (values.astype(np.int16) + zero).astype(np.uint8)
    return tile_codes(codes, bits=bits, padding=zero)


def untile_integers(
    tiled: NDArray[np.uint8], *, bits: int, rows: int, columns: int
) -> NDArray[np.int8]:
    """Inverse of :func:`tile_integers`: ``int8 [rows, columns]``."""
    codes = untile_codes(tiled, bits=bits, out_features=rows, in_features=columns)
    values: NDArray[np.int8] = (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return values


def untile_rows(tiled: NDArray[_Scalar], rows: int) -> NDArray[_Scalar]:
    """Inverse of :func:`tile_rows`: ``[rows, columns]``."""
    tiles, columns, _ = tiled.shape
    plain = tiled.transpose(0, 2, 1).reshape(tiles * TILE, columns)
    return np.ascontiguousarray(plain[:rows])
