"""The metadata of an ONNX file, read without ONNX Runtime and without the graph.

An open session has the same in ``session.get_modelmeta().custom_metadata_map``. But opening one
takes half a second and reads the weights; this reads a few bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_metadata"]

_METADATA_PROPS = 14
"""Field of a ``ModelProto``: entries of a key, field 1, and a value, field 2."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def read_metadata(model: bytes) -> dict[str, str]:
    """``metadata_props`` of a serialized ``ModelProto``.

    Raises:
      ValueError: ``model`` is not one.

    >>> read_metadata(bytes([14 << 3 | 2, 6, 1 << 3 | 2, 1, 107, 2 << 3 | 2, 1, 118]))
    {'k': 'v'}
    """
    entries = [dict(_fields(entry)) for field, entry in _fields(model) if field == _METADATA_PROPS]
    return {entry.get(1, b"").decode(): entry.get(2, b"").decode() for entry in entries}


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a protobuf message that holds bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, wire = key >> 3, key & 7
        if wire == _VARINT:
            _, position = _varint(message, position)
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"no protobuf message: wire type {wire}")
        if position + size > len(message):
            raise ValueError("no protobuf message: it ends too early")
        if wire == _BYTES and field in (1, 2, _METADATA_PROPS):
            yield field, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("no protobuf message: a number has no end")
