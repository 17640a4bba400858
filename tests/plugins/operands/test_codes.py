from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eoracc.plugins.operands.codes import (
    BITS,
    CHUNK,
    pack_codes,
    tile_codes,
    tile_rows,
    unpack_codes,
    untile_codes,
    untile_rows,
)


def pack_bit_by_bit(codes: NDArray[np.uint8], *, bits: int, group_size: int) -> NDArray[np.uint8]:
    """The layout as its docstring words it: code i of a group takes bits [i*bits, (i+1)*bits)."""
    rows, columns = codes.shape
    groups = -(-columns // group_size)
    packed = np.zeros((rows, groups, group_size * bits // 8), np.uint8)
    for row in range(rows):
        for column in range(columns):
            group, i = divmod(column, group_size)
            for bit in range(bits):
                value = (int(codes[row, column]) >> bit) & 1
                byte, place = divmod(i * bits + bit, 8)
                packed[row, group, byte] |= value << place
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 64])
def test_pack_matches_bit_by_bit(bits: int, group_size: int) -> None:
    rng = np.random.default_rng(0)
    for columns in (1, 8, 23, 64, 65):
        codes = rng.integers(0, 2**bits, (3, columns), np.uint8)
        packed = pack_codes(codes, bits=bits, group_size=group_size)
        expected = pack_bit_by_bit(codes, bits=bits, group_size=group_size)
        np.testing.assert_array_equal(packed, expected)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    runs=st.integers(1, 32),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack(bits: int, runs: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    packed = pack_codes(codes, bits=bits, group_size=8 * runs)
    np.testing.assert_array_equal(unpack_codes(packed, bits=bits, in_features=columns), codes)


def code_in_tiles(tiled: NDArray[np.uint8], row: int, column: int, bits: int) -> int:
    """The code of one element, read as the layout is worded: tile, chunk, quad, byte, bits."""
    quad, i = divmod(column % CHUNK[bits], 4)
    vectors = tiled[row // 16, column // CHUNK[bits]].reshape(-1, 64)
    byte = 4 * (row % 16) + i
    if bits == 3:
        low = int(vectors[quad // 4, byte]) >> 2 * (quad % 4) & 3
        return low | (int(vectors[2, byte]) >> quad & 1) << 2
    if bits == 6:
        low = int(vectors[quad // 2, byte]) >> 4 * (quad % 2) & 15
        return low | (int(vectors[2, byte]) >> 2 * quad & 3) << 4
    mask: int = 2**bits - 1
    return int(vectors[0, byte]) >> bits * quad & mask


@pytest.mark.parametrize(("bits", "chunk_bytes"), [(2, 64), (3, 192), (4, 64), (6, 192), (8, 64)])
def test_tiles_element_by_element(bits: int, chunk_bytes: int) -> None:
    rng = np.random.default_rng(3)
    for rows, columns in ((1, 1), (16, 32), (17, 33), (35, 70)):
        codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
        tiled = tile_codes(codes, bits=bits, padding=1)
        assert tiled.shape == (-(-rows // 16), -(-columns // CHUNK[bits]), chunk_bytes)
        height, width = 16 * tiled.shape[0], CHUNK[bits] * tiled.shape[1]
        expected = np.ones((height, width), np.uint8)
        expected[:rows, :columns] = codes
        actual = [[code_in_tiles(tiled, r, c, bits) for c in range(width)] for r in range(height)]
        np.testing.assert_array_equal(actual, expected)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 40),
    columns=st.integers(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_untile_inverts_tile(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    tiled = tile_codes(codes, bits=bits)
    back = untile_codes(tiled, bits=bits, out_features=rows, in_features=columns)
    np.testing.assert_array_equal(back, codes)
    tiles = tile_rows(codes)
    assert tiles.shape == (-(-rows // 16), columns, 16)
    assert tiles.sum(dtype=np.int64) == codes.sum(dtype=np.int64)
    np.testing.assert_array_equal(untile_rows(tiles, rows), codes)
    for row, column in ((0, 0), (rows - 1, columns - 1)):
        if codes.size:
            assert tiles[row // 16, column, row % 16] == codes[row, column]
