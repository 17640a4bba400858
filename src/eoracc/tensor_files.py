"""safetensors files from outside: the header is checked before a library maps the file.

The layout is ``u64 header size | JSON header | data``. A reader that maps a truncated file would
notice only when it reads the missing tensor.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from safetensors import safe_open
from safetensors.numpy import load_file

from eoracc.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from eoracc.documents import Reader

__all__ = ["TensorEntry", "TensorHeader", "load_arrays", "open_arrays", "read_tensor_header"]

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the library safetensors."""

_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
      dtype: as safetensors names it: ``F32``, ``BF16``.
      shape: sizes, outermost first.
      begin: first byte in the file.
      end: byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorHeader:
    """The header of a file.

    Attributes:
      metadata: texts by name.
      tensors: by name.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


def read_tensor_header(path: Path, reader: Reader) -> TensorHeader:
    """Read the header, and check that types, shapes and the size of the file agree with it.

    Args:
      path: of the file.
      reader: whose errors say where the file comes from.

    Raises:
      EoraccError: of the reader's class: the file is missing, no regular file, truncated, or its
        header is damaged.
    """
    with reader.opened(path) as (file, size):
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or 8 + length > size:
            reader.refuse(path, "is truncated inside its header")
        if length > _MAX_HEADER:
            reader.refuse(path, f"has a header of more than {_MAX_HEADER:,} bytes")
        content = file.read(length)
    place = f"{path}: header"
    members = reader.as_object(reader.parse(content, place), place)
    metadata = members.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not _all_texts(metadata.values()):
        reader.refuse(place, "has metadata that are no texts")
    data = 8 + length
    tensors = {}
    for name, member in members.items():
        entry = _entry(member, data)
        if entry is None:
            reader.refuse(path, f"tensor {printable(name)}: is not described as safetensors")
        tensors[name] = entry
    _check_extent(path, reader, tensors, data, size)
    return TensorHeader(metadata, tensors)


def load_arrays(path: Path, reader: Reader) -> dict[str, NDArray[np.generic]]:
    """The tensors of a file by name, read into memory.

    Raises:
      EoraccError: of the reader's class: the file is damaged, or has a type that NumPy lacks.
    """
    read_tensor_header(path, reader)
    with reader.refusing(path, "cannot be read as safetensors"):
        arrays: dict[str, NDArray[np.generic]] = load_file(path)
    return arrays


@contextmanager
def open_arrays(path: Path, reader: Reader) -> Iterator[Any]:
    """The mapped file as ``safetensors.safe_open`` gives it; tensors are NumPy arrays.

    Raises:
      EoraccError: of the reader's class: the file is damaged, or something that is read inside is
        not there, or of another type.
    """
    read_tensor_header(path, reader)
    with (
        reader.refusing(path, "does not hold what it should"),
        safe_open(path, framework="numpy") as file,
    ):
        yield file


def _entry(member: object, data: int) -> TensorEntry | None:
    """One entry of the header; None if it is damaged.

    Args:
      member: value of the JSON object.
      data: position of the first byte of data.
    """
    if not isinstance(member, dict):
        return None
    dtype, shape, offsets = (member.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _all_sizes(shape) and _all_sizes(offsets)):
        return None
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return None
    begin, end = offsets
    if dtype in _BITS and math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        return None
    return TensorEntry(dtype, tuple(shape), data + begin, data + end)


def _all_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _all_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_extent(
    path: Path, reader: Reader, tensors: Mapping[str, TensorEntry], data: int, size: int
) -> None:
    """Check that the tensors fill the file: no hole, no overlap, no byte more or less."""
    spans = sorted((entry.begin, entry.end) for entry in tensors.values())
    end = max((span[1] for span in spans), default=data)
    if end > size:
        reader.refuse(path, f"is truncated: its header announces {end} bytes, it has {size}")
    if end < size:
        reader.refuse(path, f"has {size - end} bytes that its header does not know")
    edges = [(data, data), *spans]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        reader.refuse(path, "has tensors that overlap, or a hole between two")
