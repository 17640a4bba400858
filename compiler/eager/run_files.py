"""The files of a backward pass, block by block, from which an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from eoracc.compiler.kept.files import remove
from eoracc.compiler.kept.folder import Entry, KeptFolder
from eoracc.compiler.kept.interval import SaveInterval

__all__ = ["RunFiles"]

_STATE: Final = "state.json"


class RunFiles:
    """The files of one run.

    Attributes:
      folder: of the files.
      left: blocks that still need their backward pass, plus one for the head; None at first.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Read nothing yet.

        Args:
          folder: of the files.
          key: digest of all that the result depends on; the files of another key are discarded.
        """
        self.folder = folder
        self.left: int | None = None
        self._kept = KeptFolder(folder, key)
        self._interval = SaveInterval()
        self._live: set[str] = set()  # what is needed from here on
        self._saved: dict[str, Entry] = {}  # what the last saved state names

    def resume(self) -> None:
        """Resume the earlier run if all of its files are sound; else remove them."""
        state = self._kept.read(_STATE)
        if state is None or not self._kept.holds(state["files"]):
            self._kept.clear()
            return
        self.left = state["left"]
        self._saved = {file["name"]: file for file in state["files"]}
        self._live = {*self._saved}

    def is_left(self, block: int) -> bool:
        """Whether ``block`` still needs its backward pass; the head is the block after the last."""
        return self.left is None or self.left > block

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file.

        Args:
          name: of the file.
          write: writes it to the given path.

        Raises:
          ArtifactError: the disk is full or fails.
        """
        self._kept.put(name, write)
        self._live.add(name)

    def finish(self, left: int, served: Collection[str]) -> None:
        """Note that only ``left`` blocks are left, and remove files that have ``served``.

        The state is saved when that is due, and at the end. The files that the last saved state
        names stay until then.

        Raises:
          ArtifactError: the disk is full or fails; the state saved before is as it was.
        """
        self.left = left
        self._live.difference_update(served)
        if left == 0 or self._interval.is_due:
            self._save()
            return
        for name in {*served} - {*self._saved}:
            remove(self.folder / name)

    def _save(self) -> None:
        with self._interval.saving():
            new = self._kept.seal(sorted(self._live - {*self._saved}))
            files = {**self._saved, **{file["name"]: file for file in new}}
            self._saved = {name: files[name] for name in sorted(self._live)}
            self._kept.write(_STATE, {"left": self.left, "files": [*self._saved.values()]})
            self._kept.keep_only({_STATE, *self._live})
