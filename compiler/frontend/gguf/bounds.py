"""Bounds of a GGUF file's header: every count fits into the file.

The library gguf believes the counts: an array that announces 2**40 items would be read for hours,
each item from beyond the end of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from eoracc.documents import Reader

__all__ = ["check_bounds"]

_SCALARS: Mapping[int, int] = {
    **dict.fromkeys((0, 1, 7), 1),  # uint8, int8, bool
    **dict.fromkeys((2, 3), 2),  # uint16, int16
    **dict.fromkeys((4, 5, 6), 4),  # uint32, int32, float32
    **dict.fromkeys((10, 11, 12), 8),  # uint64, int64, float64
}
"""Bytes of a value by GGUF's number of its type."""

_INCOMPLETE = "is not a complete GGUF file"
_STRING, _ARRAY = 8, 9
_COUNT = 8
_MAX_DIMENSIONS = 4


def check_bounds(path: Path, reader: Reader) -> None:
    """Walk over the keys and the descriptions of the tensors.

    Args:
      path: a file of version 2 or 3, little-endian.
      reader: whose errors are about GGUF files.

    Raises:
      EoraccError: of the reader's class: something reaches beyond the end of the file, has an
        unknown type, or is an array of arrays.
    """
    with reader.opened(path) as (file, size):
        walk = _Walk(path, file, size, reader)
        walk.skip(8)  # magic and version
        tensors, keys = walk.integer(_COUNT), walk.integer(_COUNT)
        # The shortest key has a length, a type and one byte.
        walk.bound(keys, _COUNT + 4 + 1)
        for _ in range(keys):
            walk.skip(walk.integer(_COUNT))
            walk.skip_value(walk.integer(4))
        walk.bound(tensors, _COUNT + 4 + 4 + _COUNT)
        for _ in range(tensors):
            walk.skip(walk.integer(_COUNT))
            dimensions = walk.integer(4)
            if dimensions > _MAX_DIMENSIONS:
                reader.refuse(path, f"has a tensor of {dimensions:,} dimensions")
            walk.skip(dimensions * _COUNT + 4 + _COUNT)


class _Walk:
    """A position in the file that never leaves it."""

    def __init__(self, path: Path, file: BinaryIO, size: int, reader: Reader) -> None:
        self._path, self._file, self._left, self._reader = path, file, size, reader

    def bound(self, count: int, least: int) -> None:
        """Refuse more than fits: ``count`` items of ``least`` bytes or more."""
        if count * least > self._left:
            self._reader.refuse(self._path, f"{_INCOMPLETE} (it announces more than it holds)")

    def skip(self, length: int) -> None:
        self.bound(length, 1)
        self._left -= length
        self._file.seek(length, 1)

    def integer(self, length: int) -> int:
        self.bound(length, 1)
        self._left -= length
        return int.from_bytes(self._file.read(length), "little")

    def skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.integer(_COUNT))
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self._reader.refuse(self._path, f"its header has a value of the unknown type {kind}")

    def _skip_array(self) -> None:
        kind, count = self.integer(4), self.integer(_COUNT)
        if kind in _SCALARS:
            self.skip(count * _SCALARS[kind])
        elif kind == _STRING:
            self.bound(count, _COUNT)
            for _ in range(count):
                self.skip(self.integer(_COUNT))
        else:
            self._reader.refuse(self._path, "its header has an array of something that is no value")
