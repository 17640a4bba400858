"""Store activations: in memory up to a limit, on disk beyond.

The files serve the process that wrote them and no other: they are neither flushed nor checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from eoracc.compiler.kept.files import keeping, remove

__all__ = ["ActivationStore"]

_IN_MEMORY = 1 << 30

Values = Mapping[str, NDArray[np.generic]]
"""Activations of one batch, by name."""


@dataclass(eq=False)
class ActivationStore:
    """Activations by key, a mapping of arrays for each batch.

    Attributes:
      folder: for those that do not fit in memory; created when needed.
      limit: bytes in memory at most. An array that is stored under several keys counts once.
    """

    folder: Path
    limit: int = _IN_MEMORY
    _kept: dict[str, Sequence[Values] | list[Path]] = field(default_factory=dict, init=False)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def put(self, key: str, batches: Sequence[Values]) -> None:
        """Store ``batches``, whose arrays must not be written to any more.

        Raises:
          ArtifactError: the disk is full or fails.
        """
        self.drop(key)
        if self._bytes_with(batches) <= self.limit:
            self._kept[key] = [dict(values) for values in batches]
            return
        with keeping(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for position, values in enumerate(batches):
            paths.append(self.folder / f"{key}-{position:04d}.safetensors")
            # Not ascontiguousarray, which makes a scalar a vector.
            arrays = {k: np.require(v, requirements="C") for k, v in values.items()}
            with keeping(paths[-1]):
                save_file(arrays, paths[-1])
        self._kept[key] = paths

    def batches(self, key: str) -> Iterator[dict[str, NDArray[np.generic]]]:
        """The stored activations, read batch by batch; KeyError if there are none."""
        for kept in self._kept[key]:
            yield load_file(kept) if isinstance(kept, Path) else dict(kept)

    def drop(self, key: str) -> None:
        """Delete the activations of ``key``, if there are any."""
        for kept in self._kept.pop(key, ()):
            if isinstance(kept, Path):
                kept.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything, and the folder with the files that a killed run left there."""
        self._kept.clear()
        remove(self.folder)

    def _bytes_with(self, batches: Sequence[Values]) -> int:
        held = [values for kept in self._kept.values() for values in kept]
        arrays = {
            id(array): array.nbytes
            for values in (*held, *batches)
            if not isinstance(values, Path)
            for array in values.values()
        }
        return sum(arrays.values())
