"""Where a comparison keeps what it has finished, for one run at a time."""

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
    """Finished rows by their key, sweeps under way, and a checkpoint where it was converted.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def claimed(self, *, fresh: bool = False) -> Iterator[None]:
        """Make the folder, and keep others from working in it; one that stays empty goes again.

        The lock is on the folder itself: it leaves no file and ends with its process.

        Args:
          fresh: throw away what earlier runs have kept.

        Raises:
          ArtifactError: it cannot be made or written to, or another comparison is at work in it.
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
        """Where the passes of a row keep what they have finished."""
        return self.path / "sweeps" / key

    @property
    def shared(self) -> Path:
        """Where the sweep that rows share keeps how far it has come."""
        return self.path / "shared"

    def figures(self, key: str, names: Collection[str]) -> dict[str, Any] | None:
        """The figures ``names`` of a row; None where no run has finished it, or kept others."""
        try:
            found: object = json.loads(self._row(key).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # not there, or cut off by a crash
            return None
        return found if isinstance(found, dict) and found.keys() == set(names) else None

    def keep(self, key: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a row, whose sweeps are needed no more."""
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
                    f"{self.path}: another comparison is at work there: wait for it to end, or "
                    "choose another 'output'"
                ) from None
            except OSError:
                pass  # a file system without locks
            # Whoever had it before may have removed it, being empty, meanwhile.
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
