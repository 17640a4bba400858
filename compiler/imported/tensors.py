"""The tensors of a compressed checkpoint, each read when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.errors import ModelError
from eoracc.printable import printable
from eoracc.tensor_files import read_tensor_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.tensor_files import TensorEntry

__all__ = ["StoredTensors"]

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class StoredTensors:
    """Tensors by name, over all files of a checkpoint.

    Attributes:
      folder: of the checkpoint, for messages.
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        """Read the headers of ``files``; a later file replaces a name."""
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._entries: dict[str, TensorEntry] = {}
        for path in files:
            entries = read_tensor_header(path, CHECKPOINT).tensors
            self._entries |= entries
            self._files |= dict.fromkeys(entries, path)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor ``name``."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``name``.

        Raises:
          ModelError: there is no such tensor.
        """
        return self._entry(name).shape

    def integers(self, name: str, shape: Sequence[int]) -> NDArray[Any]:
        """The integers of ``name``, which has ``shape``.

        Raises:
          ModelError: there is no such tensor, or it holds something else.
        """
        return np.asarray(self._read(name, shape, _INTEGERS, "integers").numpy())

    def floats(self, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """The numbers of ``name``, which has ``shape``, in float32.

        Raises:
          ModelError: there is no such tensor, it holds something else, or not all is finite.
        """
        values: NDArray[np.float32] = self._read(name, shape, _FLOATS, "floats").float().numpy()
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self._files[name]}: tensor {printable(name)} holds NaN or Inf: the checkpoint "
                "is damaged, fetch it again"
            )
        return values

    def one_of(self, names: Iterable[str]) -> str | None:
        """The first of ``names`` that there is."""
        return next((name for name in names if name in self._entries), None)

    def _entry(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(
                f"{self.folder}: the compressed checkpoint has no tensor {printable(name)}: fetch "
                "it again"
            )
        return entry

    def _read(self, name: str, shape: Sequence[int], types: frozenset[str], kind: str) -> Any:  # noqa: ANN401 - a tensor
        entry, path = self._entry(name), self._files.get(name)
        assert path is not None  # noqa: S101 - every entry has its file
        if entry.dtype not in types or entry.shape != tuple(shape):
            raise ModelError(
                f"{path}: tensor {printable(name)} is {printable(entry.dtype)} "
                f"{list(entry.shape)}, and {kind} of {list(shape)} are wanted: the checkpoint is "
                "of another model, or packed in another way"
            )
        with CHECKPOINT.refusing(path, "cannot be read"), safe_open(path, "pt") as opened:
            return opened.get_tensor(name)
