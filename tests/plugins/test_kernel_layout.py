"""The C functions between the plain and the tiled layout."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from eoracc.plugins.library import library_path
from eoracc.plugins.operands.codes import BITS
from tests.plugins import native
from tests.plugins.fused_op import random_weight

CHUNK_COLUMNS = {8: 4, 6: 16, 4: 8, 2: 16, 3: 32}


def _code(tile: np.ndarray, bits: int, row: int, column: int) -> int:
    """A code of a tile, by the words of the header."""
    chunk, within = divmod(column, CHUNK_COLUMNS[bits])
    quad, i = divmod(within, 4)
    vectors = tile.reshape(-1, 3 if bits in (3, 6) else 1, 64)[chunk].astype(int)[:, 4 * row + i]
    if bits == 3:
        low = vectors[quad // 4] >> 2 * (quad % 4) & 3
        return int(low | (vectors[2] >> quad & 1) << 2)
    if bits == 6:
        low = vectors[quad // 2] >> 4 * (quad % 2) & 15
        return int(low | (vectors[2] >> 2 * quad & 3) << 4)
    return int(vectors[0] >> bits * quad & (2**bits - 1))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (37, 299)])
def test_codes_lie_where_the_header_says(bits: int, shape: tuple[int, int]) -> None:
    weight = random_weight(
        np.random.default_rng(0), shape, bits=bits, group_size=24, zero_points=False
    )
    tiles = native.tile_codes(weight)
    chunks = -(-shape[1] // CHUNK_COLUMNS[bits])
    assert tiles.shape == (-(-shape[0] // 16), chunks * (192 if bits in (3, 6) else 64))
    codes = weight.codes()
    for row in range(16 * len(tiles)):
        for column in range(chunks * CHUNK_COLUMNS[bits]):
            inside = row < shape[0] and column < shape[1]
            expected = codes[row, column] if inside else 0
            assert _code(tiles[row // 16], bits, row % 16, column) == expected


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits: int) -> None:
    weight = random_weight(
        np.random.default_rng(1), (37, 299), bits=bits, group_size=40, zero_points=False
    )
    tiled = native.tile_codes(weight)
    plain = np.full_like(weight.packed, 255)
    ctypes.CDLL(str(library_path())).eoracc_untile_codes(
        ctypes.c_void_p(tiled.ctypes.data),
        ctypes.c_int64(37),
        ctypes.c_int64(299),
        bits,
        ctypes.c_int64(40),
        ctypes.c_void_p(plain.ctypes.data),
    )
    np.testing.assert_array_equal(plain, weight.packed)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_elements(dtype: type[np.generic]) -> None:
    plain = np.random.default_rng(2).integers(1, 255, (19, 7)).astype(dtype)
    tiled = native.tile_elements(plain)
    assert tiled.shape == (2, 7, 16)
    rows = tiled.transpose(0, 2, 1).reshape(32, 7)
    np.testing.assert_array_equal(rows[:19], plain)
    assert not rows[19:].any()
    back = np.empty_like(plain)
    ctypes.CDLL(str(library_path())).eoracc_untile_elements(
        ctypes.c_void_p(tiled.ctypes.data),
        ctypes.c_int64(19),
        ctypes.c_int64(7),
        ctypes.c_size_t(plain.itemsize),
        ctypes.c_void_p(back.ctypes.data),
    )
    np.testing.assert_array_equal(back, plain)


@pytest.mark.parametrize("shape", [(19, 7), (16, 4), (0, 8), (5, 0)])
def test_int8(shape: tuple[int, int]) -> None:
    plain = np.random.default_rng(3).integers(-128, 128, shape, np.int8)
    tiled = native.tile_int8(plain)
    tiles, quads = -(-shape[0] // 16), -(-shape[1] // 4)
    assert tiled.shape == (tiles, quads, 64)
    rows = tiled.reshape(tiles, quads, 16, 4).transpose(0, 2, 1, 3).reshape(16 * tiles, 4 * quads)
    values = rows.astype(int) - 128
    np.testing.assert_array_equal(values[: shape[0], : shape[1]], plain)
    assert not values[shape[0] :].any()
    assert not values[:, shape[1] :].any()
    back = np.zeros_like(plain)
    ctypes.CDLL(str(library_path())).eoracc_untile_int8(
        ctypes.c_void_p(tiled.ctypes.data),
        ctypes.c_int64(shape[0]),
        ctypes.c_int64(shape[1]),
        ctypes.c_void_p(back.ctypes.data),
    )
    np.testing.assert_array_equal(back, plain)
