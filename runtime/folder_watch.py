"""Notice that an artifact's folder is no longer what was loaded from it.

A loaded model lives on what it has read. Its folder may meanwhile be built again, get other
adapters, be overwritten or be removed: a process that runs for weeks should tell.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from eoracc.errors import ArtifactError
from eoracc.printable import printable
from eoracc.runtime.adapters.files import listed_adapters
from eoracc.runtime.artifact.manifest import (
    BUILDER_LOG,
    MANIFEST_FILE,
    REPORT_FILE,
    describe_file,
    read_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from eoracc.runtime.artifact.manifest import Manifest

__all__ = ["FolderChange", "FolderWatch"]

_State: TypeAlias = tuple[int, ...] | None
"""What tells that a file has been written or replaced; None if there is no file."""

_MOST_NAMES = 5
"""Names that a text lists."""

_NAME_CHARS = 64

_RECORDS = frozenset({REPORT_FILE, BUILDER_LOG})
"""Files that no loaded model has read."""


@dataclass(frozen=True)
class FolderChange:
    """How a folder differs from what was loaded.

    Attributes:
      text: says so, as the end of a sentence that begins with the folder.
    """

    text: str


class FolderWatch:
    """Compares an artifact's folder with what was loaded from it. Threads may share it.

    A look costs one ``stat`` for each file. Files whose ``stat`` differs are read once.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin with a folder that holds what ``manifest`` says.

        Args:
          folder: the artifact.
          manifest: of the artifact, verified.
        """
        self._folder = folder.absolute()
        self._manifest = manifest
        self._adapters = frozenset(listed_adapters(manifest))
        self._lock = threading.Lock()
        self._loaded = self._states()
        self._seen = self._loaded
        self._change: FolderChange | None = None
        self._newer: tuple[_State, frozenset[str]] = (self._loaded[MANIFEST_FILE], frozenset())

    def check(self) -> FolderChange | None:
        """Look at the folder; None while it holds what was loaded."""
        with self._lock:
            states = self._states()
            if states != self._seen:
                touched = [name for name in states if states[name] != self._loaded[name]]
                text = self._difference(touched)
                self._change = None if text is None else FolderChange(text)
                self._seen = states
            return self._change

    def explain_missing(self, adapter: str) -> str | None:
        """A sentence about an adapter that only the changed folder has; None for any other name.

        Looks at the manifest alone and never waits for :meth:`check`.
        """
        state = _state(self._folder / MANIFEST_FILE)
        known, names = self._newer
        if state != known:
            try:
                names = frozenset(listed_adapters(read_manifest(self._folder))) - self._adapters
            except ArtifactError:
                names = frozenset()
            self._newer = (state, names)
        if adapter not in names:
            return None
        return (
            f"adapter '{printable(adapter)}': is in the artifact's folder, which has changed, and "
            "not in what was loaded from it: restart to use it"
        )

    def _states(self) -> dict[str, _State]:
        names = (MANIFEST_FILE, *(name for name in self._manifest.files if name not in _RECORDS))
        return {name: _state(self._folder / name) for name in names}

    def _difference(self, touched: Collection[str]) -> str | None:
        """How the folder differs; a file with the loaded content counts as unchanged."""
        if not self._folder.is_dir():
            return "is gone"
        try:
            found = read_manifest(self._folder)
        except ArtifactError as error:
            return f"holds no artifact any more ({error})"
        if found.digest != self._manifest.digest:
            return f"holds the backbone {found.digest[:12]} instead of {self._manifest.digest[:12]}"
        loaded, listed = self._manifest.files, found.files
        changed = {
            name
            for name in (loaded.keys() | listed.keys()) - _RECORDS
            if loaded.get(name) != listed.get(name)
        }
        # A file may have been written without its manifest.
        changed |= {
            name for name in touched if name in loaded and self._is_other(name, found)
        } - _RECORDS
        if not changed:
            return None
        return f"differs in {_listing(changed)}"

    def _is_other(self, name: str, found: Manifest) -> bool:
        listed = found.files.get(name)
        try:
            return listed is None or describe_file(self._folder / name) != listed
        except ArtifactError:
            return True


def _state(path: Path) -> _State:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _listing(names: Collection[str]) -> str:
    """Some of ``names``."""
    shown = [printable(name, _NAME_CHARS) for name in sorted(names)[:_MOST_NAMES]]
    left = len(names) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")
