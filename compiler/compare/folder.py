"""The folder in which a comparison caches its results, locked for one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eoracc.errors import ArtifactError

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

        The lock is on the folder itself: it leaves no file and ends with its process.

        Args:
          fresh: delete the results of earlier runs.

        Raises:
          ArtifactError: it cannot be created or written to, or another comparison has locked it.
        """
        descriptor = self._lock()
        try:
            if fresh:
                self._clear()
            yield
        finally:
            with suppress(OSError):
                self.path.rmdir()
            os.close(descriptor)

    def sweeps(self, key: str) -> Path:
        """The folder for the saved sweeps of a row."""
        return self.path / "sweeps" / key

    @property
    def shared(self) -> Path:
        """The folder for the state of the sweep that rows share."""
        return self.path / "shared"

    def figures(self, key: str, names: Collection[str]) -> dict[str, Any] | None:
        """The cached figures of a row; None if there are none, or not exactly ``names``."""
        try:
            figures: object = json.loads(self._row(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # missing, or truncated by a crash
            return None
        return figures if isinstance(figures, dict) and figures.keys() == set(names) else None

    def keep(self, key: str, figures: Mapping[str, Any]) -> None:
        """Cache the figures of a row and delete its saved sweeps."""
        path = self._row(key)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(figures), encoding="utf-8")
        partial.replace(path)
        shutil.rmtree(self.sweeps(key), ignore_errors=True)

    def _row(self, key: str) -> Path:
        return self.path / "rows" / f"{key}.json"

    def _lock(self) -> int:
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise self._unusable(error.strerror) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ArtifactError(
                    f"{self.path}: another comparison is running there: wait for it to end, or "
                    "choose another 'output'"
                ) from None
            except OSError:
                pass  # a file system without locks
            # The last holder may have deleted the empty folder meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    if os.access(self.path, os.W_OK | os.X_OK):
                        return descriptor
                    os.close(descriptor)
                    raise self._unusable("it is read-only")
            os.close(descriptor)

    def _unusable(self, why: str | None) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: finished rows cannot be kept there: {why}: choose another 'output'"
        )

    def _clear(self) -> None:
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()
