"""A folder of kept work: records, and the files that they name.

Every file is compared with its digest before it is used. What is damaged is discarded with one line
in the log, and the caller computes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eoracc.compiler.kept.files import (
    DamagedError,
    check_file,
    describe_file,
    keeping,
    make_folder,
    remove,
    write_with,
)
from eoracc.compiler.kept.record import ForeignError, Record, read_record, write_record
from eoracc.printable import escape_controls
from eoracc.runtime.artifact.sync import sync_path
from eoracc.runtime.artifact.versioned_json import is_inside

__all__ = ["Entry", "KeptFolder"]

_log = logging.getLogger("eoracc.build.kept")

Entry = Mapping[str, Any]
"""A file as a record names it: ``name``, ``size`` in bytes, ``sha256`` hexadecimal."""


@dataclass(frozen=True)
class KeptFolder:
    """A folder of kept work.

    Attributes:
      path: the folder; created by the first write.
      key: digest of everything that the work depends on; the work of another key is discarded.
    """

    path: Path
    key: str

    def read(self, name: str) -> Any | None:  # noqa: ANN401 - JSON
        """The content of a record; None where there is none that can be used.

        Raises:
          ArtifactError: what cannot be used cannot be removed either.
        """
        path = self.path / name
        with keeping(self.path):
            if not self.path.is_dir():
                if self.path.is_symlink() or self.path.exists():
                    self._discard(self.path, "is not a folder")
                return None
            if not path.is_symlink() and not path.exists():
                return None
        try:
            record = read_record(path)
        except ForeignError:
            self._discard(self.path, "was kept by another version of eoracc")
            return None
        except DamagedError as error:
            self._discard(path, str(error))
            return None
        if record.key != self.key:
            self._discard(
                self.path, "was kept for another model, model.yaml, text or version of eoracc"
            )
            return None
        return record.content

    def write(self, name: str, content: Any) -> None:  # noqa: ANN401 - JSON
        """Replace a record at once; the files that it names must be sealed.

        Raises:
          ArtifactError: the disk is full, fails or is read-only; the old record is as it was.
        """
        self._create(self.path)
        write_record(self.path / name, Record(self.key, content))

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file that :meth:`seal` will flush.

        Args:
          name: path in the folder, with forward slashes.
          write: writes it to the given path.

        Raises:
          ArtifactError: the disk is full, fails or is read-only.
        """
        path = self.path / name
        self._create(path.parent)
        write_with(path, write)

    def seal(self, names: Iterable[str]) -> list[Entry]:
        """Flush files to disk, and describe them for a record.

        They are flushed together, after all have been read: the disk writes while the processor
        computes digests.

        Args:
          names: paths in the folder, with forward slashes.

        Raises:
          ArtifactError: the disk is full or fails.
        """
        names = list(names)
        with keeping(self.path):
            entries: list[Entry] = [
                {"name": name, **describe_file(self.path / name)} for name in names
            ]
            for name in names:
                sync_path(self.path / name)
            for folder in {(self.path / name).parent for name in names}:
                sync_path(folder)
        return entries

    def holds(self, entries: Iterable[Entry]) -> bool:
        """Whether files are as they were sealed; the first that is not is discarded.

        Raises:
          ArtifactError: it cannot be removed.
        """
        for entry in entries:
            path = self.path / entry["name"]
            if not is_inside(entry["name"]):
                _warn(path, "is outside the folder", "it is left alone, and computed again")
                return False
            try:
                check_file(path, entry)
            except DamagedError as error:
                self._discard(path, str(error))
                return False
        return True

    def keep_only(self, names: Collection[str]) -> None:
        """Remove everything in the folder but what has one of ``names``.

        Raises:
          ArtifactError: something cannot be removed.
        """
        for path in self.path.iterdir():
            if path.name not in names:
                remove(path)

    def clear(self) -> None:
        """Remove the folder.

        Raises:
          ArtifactError: it cannot be removed.
        """
        remove(self.path)

    def _create(self, folder: Path) -> None:
        with keeping(folder):
            make_folder(folder)

    def _discard(self, path: Path, problem: str) -> None:
        _warn(path, problem, "it is discarded, and computed again")
        remove(path)


def _warn(path: Path, problem: str, end: str) -> None:
    message = f"{path} {problem}: {end}"
    fields = {"event": "discarded", "path": str(path), "problem": problem, "message": message}
    _log.warning("%s", escape_controls(message), extra={"fields": fields})
