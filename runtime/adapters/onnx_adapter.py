"""ONNX Runtime's ``.onnx_adapter``: arrays for a model's inputs, by their names.

ONNX Runtime's own writer (``onnxruntime.AdapterFormat``) writes arrays in the order of a hash
table, which varies from process to process. This one sorts them, so that equal adapters give equal
files, and aligns every array to 64 bytes, so that no vector of a mapped file crosses a cache line.
Files are read from bytes that have been compared with their digest, not from a path whose content
may change meanwhile.

The format is a FlatBuffer with the schema

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8]; }
    table Adapter { format_version: int; adapter_version: int; model_version: int;
                    parameters: [Parameter]; }
    root_type Adapter;  file_identifier "TORT";
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flatbuffers  # type: ignore[import-untyped]
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table  # type: ignore[import-untyped]

from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

__all__ = ["OnnxAdapter", "read_onnx_adapter", "write_onnx_adapter"]

_FORMAT_VERSION = 1
_IDENTIFIER = b"TORT"
_ALIGNMENT = 64
_LARGEST_FILE = 2**31 - 1
"""Offsets in a FlatBuffer are 32 bits wide, and some are signed."""

_TYPES: Mapping[int, type[np.generic]] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    10: np.float16,
}
"""ONNX's number of each type that the inputs of an adapter may have."""


@dataclass(frozen=True, eq=False)
class OnnxAdapter:
    """The content of a file.

    Attributes:
      arrays: by the name of the graph input; read-only views of the file's bytes.
      adapter_version: chosen by the writer.
      model_version: of the model that the adapter belongs to.
    """

    arrays: Mapping[str, NDArray[np.generic]]
    adapter_version: int
    model_version: int


def write_onnx_adapter(
    arrays: Mapping[str, NDArray[np.generic]], *, adapter_version: int, model_version: int
) -> bytes:
    """The content of the file, independent of the order of ``arrays``.

    Args:
      arrays: by graph input, of any of the types float32, float16, uint8, int8, int32 and int64.
      adapter_version: any number of 31 bits.
      model_version: likewise.

    Raises:
      ArtifactError: the file would be too large for the format.
    """
    size = sum(array.nbytes + len(name) + 4 * _ALIGNMENT for name, array in arrays.items())
    if size > _LARGEST_FILE:
        raise ArtifactError(
            f"an .onnx_adapter of {size:,} bytes cannot be written: the format ends at "
            f"{_LARGEST_FILE:,}: use a smaller rank or factor type"
        )
    builder: Any = flatbuffers.Builder(size + 4 * _ALIGNMENT)
    # A FlatBuffer is built from its end to its beginning.
    tables = [_write_parameter(builder, name, arrays[name]) for name in sorted(arrays)]
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    parameters = builder.EndVector()
    builder.StartObject(4)
    for field, value in enumerate((_FORMAT_VERSION, adapter_version, model_version)):
        builder.PrependInt32Slot(field, value, 0)
    builder.PrependUOffsetTRelativeSlot(3, parameters, 0)
    builder.Finish(builder.EndObject(), _IDENTIFIER)
    return bytes(builder.Output())


def _write_parameter(builder: Any, name: str, array: NDArray[np.generic]) -> int:  # noqa: ANN401 - flatbuffers has no types
    data = np.ascontiguousarray(array).tobytes()
    builder.Prep(_ALIGNMENT, len(data))
    raw_data = builder.CreateByteVector(data)
    dims = builder.CreateNumpyVector(np.array(array.shape, np.int64))
    stored_name = builder.CreateString(name)
    number = next(number for number, dtype in _TYPES.items() if array.dtype == dtype)
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, stored_name, 0)
    builder.PrependUOffsetTRelativeSlot(1, dims, 0)
    builder.PrependInt32Slot(2, number, 0)
    builder.PrependUOffsetTRelativeSlot(3, raw_data, 0)
    return int(builder.EndObject())


def read_onnx_adapter(content: bytes, place: str) -> OnnxAdapter:
    """Read a file that this module, ONNX Runtime or Olive wrote.

    Args:
      content: of the file.
      place: path of the file, for errors.

    Raises:
      ArtifactError: the file is damaged or of another format.
    """
    try:
        if content[4:8] != _IDENTIFIER:
            raise ValueError(place)
        root = _Table(content, struct.unpack_from("<I", content)[0])
        arrays: dict[str, NDArray[np.generic]] = {}
        for parameter in root.tables(3):
            name = parameter.data(0).tobytes().decode("utf-8")
            if name in arrays:
                raise ValueError(name)
            arrays[name] = _read_array(parameter)
        versions = (root.integer(1), root.integer(2))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error):
        raise ArtifactError(f"{place}: is no .onnx_adapter file, or is damaged") from None
    return OnnxAdapter(arrays, *versions)


def _read_array(parameter: _Table) -> NDArray[np.generic]:
    shape = [int(size) for size in parameter.data(1, np.int64)]
    dtype = np.dtype(_TYPES[parameter.integer(2)])
    raw = parameter.data(3)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != raw.size:
        raise ValueError(shape)
    return raw.view(dtype).reshape(shape)


class _Table:
    """One table of a FlatBuffer, its fields by number."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content = content
        self._table: Any = Table(content, position)

    def _offset(self, field: int) -> int:
        offset: int = self._table.Offset(4 + 2 * field)
        return offset

    def integer(self, field: int) -> int:
        """An int32; 0 if absent."""
        offset = self._offset(field)
        if not offset:
            return 0
        return int(self._table.Get(number_types.Int32Flags, self._table.Pos + offset))

    def data(self, field: int, dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
        """A vector or string; empty if absent."""
        offset = self._offset(field)
        if not offset:
            return np.empty(0, dtype)
        return np.frombuffer(
            self._content, dtype, self._table.VectorLen(offset), self._table.Vector(offset)
        )

    def tables(self, field: int) -> Iterator[_Table]:
        """A vector of tables."""
        offset = self._offset(field)
        # Reading all offsets first detects a length beyond the file's end.
        offsets = self.data(field, np.uint32)
        start: int = self._table.Vector(offset) if offset else 0
        for index, relative in enumerate(offsets):
            yield _Table(self._content, start + 4 * index + int(relative))
