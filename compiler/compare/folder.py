"""The folder in which a comparison caches its results, locked for one run at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.kept.files import remove
from eoracc.compiler.kept.folder import KeptFolder

__all__ = ["WorkFolder"]


class WorkFolder:
    """Finished rows by key, saved states of sweeps, and a converted checkpoint.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def claimed(self, *, fresh: bool = False) -> Iterator[None]:
        """Create and lock the folder; delete it at the end if it is empty.

        Args:
          fresh: delete the results of earlier runs.

        Raises:
          ArtifactError: it cannot be created or written to, or another comparison has locked it.
        """
        with claimed(self.path, "comparison"):
            if fresh:
                for path in self.path.iterdir():
                    remove(path)
            yield

    def sweeps(self, key: str) -> Path:
        """The folder for the saved sweeps of a row."""
        return self.path / "sweeps" / key

    @property
    def shared(self) -> Path:
        """The folder for the state of the sweep that rows share."""
        return self.path / "shared"

    @property
    def surveys(self) -> Path:
        """The folder for the surveys of the current method, which its budgets share."""
        return self.path / "surveys"

    def figures(self, key: str, names: Collection[str]) -> dict[str, Any] | None:
        """The cached figures of a row; None if there are none, or not exactly ``names``."""
        figures: object = self._rows.read(f"{key}.json")
        return figures if isinstance(figures, dict) and figures.keys() == set(names) else None

    def keep(self, key: str, figures: Mapping[str, Any]) -> None:
        """Cache the figures of a row and delete its saved sweeps.

        Raises:
          ArtifactError: the disk is full or fails.
        """
        self._rows.write(f"{key}.json", figures)
        remove(self.sweeps(key))

    @property
    def _rows(self) -> KeptFolder:
        # A row's name is a digest of everything that it depends on.
        return KeptFolder(self.path / "rows", "rows")
