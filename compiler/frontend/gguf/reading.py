"""A GGUF file, and which of its keys and tensors have been read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from eoracc.compiler.frontend.gguf.bounds import check_bounds
from eoracc.documents import Reader
from eoracc.errors import ModelError
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gguf.gguf_reader import ReaderTensor

__all__ = ["READER", "WAY_OUT", "GgufFile", "open_gguf"]

WAY_OUT = "use the model's safetensors folder instead"
READER = Reader(ModelError, "it is truncated or damaged, fetch it again")
"""Its errors are about GGUF files."""

_VERSIONS = (2, 3)
_MAGIC = b"GGUF"


class GgufFile:
    """The metadata and tensors of one file. Whatever a caller reads counts as consumed.

    Keys of the architecture are named without its prefix: ``attention.head_count`` is
    ``llama.attention.head_count`` in a Llama.

    Attributes:
      path: the file.
      architecture: ``general.architecture``.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata of ``path``; tensors are mapped.

        Raises:
          ModelError: the file is missing, truncated, no GGUF, or of an unknown version.
        """
        if not path.exists():
            raise ModelError(f"GGUF file {path} does not exist")
        self.path = path
        reader = open_gguf(path)
        with READER.refusing(path, "is not a complete GGUF file"):
            self._values = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("GGUF.")
            }
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        self._read_keys: set[str] = set()
        self._read_tensors: set[str] = set()
        architecture = self.text("general.architecture")
        if architecture is None:
            raise ModelError(f"{path} has no key general.architecture: fetch it again")
        self.architecture = architecture

    def own(self, key: str) -> str:
        """The full name of a key of the architecture."""
        return f"{self.architecture}.{key}"

    def integer(self, key: str) -> int | None:
        """A whole number; None where the file has no such key.

        Raises:
          ModelError: the key holds something else. So do the other readers.
        """
        value = self._take(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong_type(key, value, "a whole number")

    def real(self, key: str) -> float | None:
        """A finite number."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise self._wrong_type(key, value, "a finite number")

    def flag(self, key: str) -> bool | None:
        """True or false."""
        value = self._take(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong_type(key, value, "true or false")

    def text(self, key: str) -> str | None:
        """A string."""
        value = self._take(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(key, value, "a string")

    def items(self, key: str, kind: type) -> list[Any] | None:
        """An array whose elements are all of ``kind``: int, float, bool or str."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, list) and all(type(item) is kind for item in value):
            return value
        raise self._wrong_type(key, value, f"a list of {kind.__name__}")

    def is_list(self, key: str) -> bool:
        """Whether the key holds an array; does not count as reading it."""
        return isinstance(self._values.get(key), list)

    def consume(self, keys: Iterable[str]) -> None:
        """Count keys as read whose value was looked at elsewhere, or need not be."""
        self._read_keys.update(keys)

    def consume_tensors(self, names: Iterable[str]) -> None:
        """Count tensors as read."""
        self._read_tensors.update(names)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, rows first, None where there is none; not a reading of it."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))

    def vector(self, name: str, length: int) -> np.ndarray | None:
        """A tensor of one dimension in float32.

        Args:
          name: of the tensor.
          length: that it must have.

        Raises:
          ModelError: its length is another one, or it holds NaN or Inf.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        self._read_tensors.add(name)
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(-1)
        if values.size != length:
            raise self.refusal(f"tensor {name} has {values.size} values where {length} belong")
        if not np.isfinite(values).all():
            raise self.refusal(f"tensor {name} holds NaN or Inf")
        return values

    @property
    def keys(self) -> list[str]:
        """The names of all keys."""
        return list(self._values)

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    def unread_keys(self) -> dict[str, Any]:
        """Keys that nobody has read, with their values."""
        return {key: self._values[key] for key in self._values if key not in self._read_keys}

    def unread_tensors(self) -> list[str]:
        """Tensors that nobody has read."""
        return [name for name in self._tensors if name not in self._read_tensors]

    def refusal(self, problem: str, way_out: str = WAY_OUT) -> ModelError:
        """An error about this file."""
        return ModelError(f"{self.path}: {problem}: {way_out}")

    def _take(self, key: str) -> Any:  # noqa: ANN401 - a value of the file, checked by the callers
        self._read_keys.add(key)
        return self._values.get(key)

    def _wrong_type(self, key: str, value: object, expected: str) -> ModelError:
        given = f"a list of {len(value)}" if isinstance(value, list) else quoted(value, 40)
        return self.refusal(f"key {key} is {given}, not {expected}")


def open_gguf(path: Path) -> GGUFReader:
    """The library's view of a file, after its version and its counts have been checked.

    Raises:
      ModelError: the file is missing, truncated, no GGUF, or of an unknown version.
    """
    _check_version(path)
    with READER.refusing(path, "is not a complete GGUF file"):
        return GGUFReader(path)


def _check_version(path: Path) -> None:
    with READER.opened(path) as (stream, _):
        head = stream.read(8)
    if head[:4] != _MAGIC:
        READER.refuse(path, "is not a complete GGUF file (its first bytes are others)")
    version = int.from_bytes(head[4:8], "little")
    if version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise ModelError(
            f"{path} is GGUF of version {version}, or written for a big-endian machine; versions "
            f"{known} in little-endian order are read: convert the model again, or {WAY_OUT}"
        )
    check_bounds(path, READER)
