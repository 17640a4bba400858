"""Change several files of a folder atomically.

The new files are first written in full into a staging folder, which is then renamed: this commits
the change. Then the files move to their places. If the process ends before they have all moved,
the next reader or writer finishes the change. A full disk or a crash therefore leaves either the
old files or the new ones, never a mixture.

Readers share a lock and a writer excludes them. The lock is on the folder itself: it leaves no
file, ends with its process, and needs no permission to write.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["PENDING", "STAGED", "change_files", "changing", "reading", "sync_path"]

STAGED = ".change.partial"
"""Folder of a change that is being written, ignored until it is renamed."""

PENDING = ".change"
"""Folder of a committed change, whose files are moving to their places."""

_FILES = "files"
_REMOVED = "removed.json"


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against changes; a missing folder is not locked.

    Raises:
      ArtifactError: an interrupted change cannot be finished.
    """
    if not folder.is_dir():
        yield
        return
    with _locked(folder, fcntl.LOCK_SH) as descriptor:
        if (folder / PENDING).exists():
            _lock(descriptor, fcntl.LOCK_EX)
            _finish(folder)
        yield


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other readers and writers.

    :func:`change_files` may be called inside, but not :func:`reading`, which would wait forever.

    Raises:
      ArtifactError: the folder is missing or cannot be locked, or an interrupted change cannot be
        finished.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no such folder")
    with _locked(folder, fcntl.LOCK_EX):
        _finish(folder)
        yield


def change_files(folder: Path, written: Mapping[str, bytes], removed: Collection[str] = ()) -> None:
    """Write some files of ``folder`` and remove others, all or nothing.

    Args:
      folder: locked by :func:`changing`.
      written: content by path in the folder, with forward slashes.
      removed: paths likewise; they may be missing.

    Raises:
      ArtifactError: a path leaves the folder, the disk is full, or the folder cannot be written
        to. Nothing has changed then, unless the text says that the change is committed.
    """
    for name in (*written, *removed):
        _inside(folder, name)
    staged = folder / STAGED
    try:
        if staged.is_symlink():
            staged.unlink()
        shutil.rmtree(staged, ignore_errors=True)
        for name, content in written.items():
            _write(staged / _FILES / name, content)
        _write(staged / _REMOVED, json.dumps(sorted(removed)).encode())
        for path in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
            sync_path(path)
        staged.rename(folder / PENDING)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError):
            raise ArtifactError(
                f"{folder}: cannot be changed: {error.strerror}: free some space, or "
                "check that it is writable"
            ) from error
        raise
    sync_path(folder)
    _finish(folder)


def _finish(folder: Path) -> None:
    """Move the files of a committed change to their places; may be repeated."""
    pending = folder / PENDING
    if not pending.exists():
        return
    _refuse_links(pending)
    files = pending / _FILES
    touched: set[Path] = {folder}
    try:
        removed = [str(name) for name in json.loads((pending / _REMOVED).read_bytes())]
        # Deepest paths first: an artifact's manifest moves after the files that it lists.
        paths = [path for path in files.rglob("*") if not path.is_dir()]
        for path in sorted(paths, key=lambda path: (-len(path.parts), path)):
            target = _inside(folder, path.relative_to(files).as_posix())
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
            touched.add(target.parent)
        for name in removed:
            _inside(folder, name).unlink(missing_ok=True)
            touched.add(_inside(folder, name).parent)
        for parent in filter(Path.is_dir, touched - {folder}):
            sync_path(parent)
            if not any(parent.iterdir()):
                parent.rmdir()
        # The list of removed files goes last: without it the change would look damaged.
        shutil.rmtree(files, ignore_errors=True)
        shutil.rmtree(folder / STAGED, ignore_errors=True)
        pending.rename(folder / STAGED)
        shutil.rmtree(folder / STAGED, ignore_errors=True)
        sync_path(folder)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise ArtifactError(
            f"{pending}: is a change that was interrupted and cannot be finished: {reason}: "
            "check that the folder is writable and has space, and try again"
        ) from error


def _refuse_links(pending: Path) -> None:
    """Reject links, through which files from elsewhere would move into the folder."""
    for parent, folders, files in os.walk(pending):
        for path in (Path(parent), *(Path(parent) / name for name in (*folders, *files))):
            if path.is_symlink():
                raise ArtifactError(f"{path}: is a link: do not trust this artifact")


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    allowed = not path.is_absolute() and ".." not in path.parts and len(path.parts) in (1, 2)
    if not allowed or (path.parent.name and (folder / path.parent).is_symlink()):
        raise ArtifactError(f"{folder / name}: leaves the folder: do not trust this artifact")
    return folder / path


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[int]:
    """Hold a lock on ``folder``; yields the descriptor of the lock."""
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be read: {error.strerror}") from None
        try:
            _lock(descriptor, kind)
            # The folder may have been replaced by another one meanwhile.
            moved = not folder.is_dir() or not os.path.samestat(os.fstat(descriptor), folder.stat())
            if not moved:
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if kind == fcntl.LOCK_EX:
            raise ArtifactError(f"the folder cannot be locked: {error.strerror}") from None
        # A file system without locks: every file is compared with its digest anyway.
