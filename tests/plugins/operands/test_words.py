from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.plugins.operands.words import pack_words, unpack_words, word_count


def words_by_integers(codes: NDArray[np.uint8], *, bits: int) -> list[list[int]]:
    """Each row as one long integer, code i shifted by i * bits, and cut into words."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(stream >> (32 * j)) & 0xFFFFFFFF for j in range(count)])
    return rows


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 96, 352])
@pytest.mark.parametrize("axis", [0, 1])
def test_words_are_one_stream_of_bits_along_an_axis(bits: int, count: int, axis: int) -> None:
    rng = np.random.default_rng(bits * 1000 + count)
    rows = rng.integers(0, 2**bits, (5, count)).astype(np.uint8)
    codes = rows if axis == 1 else np.ascontiguousarray(rows.T)

    words = pack_words(codes, bits=bits, axis=axis)

    assert words.dtype == np.int32
    assert words.shape[axis] == word_count(count, bits=bits)
    along = words if axis == 1 else words.T
    assert np.asarray(along.view(np.uint32)).tolist() == words_by_integers(rows, bits=bits)
    again = unpack_words(words, bits=bits, count=count, axis=axis)
    assert again.dtype == np.uint8
    assert again.flags.c_contiguous
    np.testing.assert_array_equal(again, codes)


def test_words_may_be_unsigned_strided_and_longer_than_needed() -> None:
    codes = np.random.default_rng(0).integers(0, 8, (40, 6)).astype(np.uint8)
    words = pack_words(codes, bits=3, axis=0)
    longer = np.concatenate([words, np.full((2, 6), -1, np.int32)]).view(np.uint32)
    strided = np.asfortranarray(longer)

    np.testing.assert_array_equal(unpack_words(strided, bits=3, count=40, axis=0), codes)


def test_every_code_of_a_full_row_of_ones_is_the_largest() -> None:
    words = np.full((1, 3), -1, np.int32)
    np.testing.assert_array_equal(
        unpack_words(words, bits=3, count=32, axis=1), np.full((1, 32), 7, np.uint8)
    )


@pytest.mark.parametrize(("rows", "count"), [(0, 8), (3, 0)])
def test_no_codes_take_no_words(rows: int, count: int) -> None:
    codes = np.zeros((rows, count), np.uint8)
    words = pack_words(codes, bits=4, axis=1)
    assert words.shape == (rows, word_count(count, bits=4))
    assert unpack_words(words, bits=4, count=count, axis=1).shape == codes.shape
