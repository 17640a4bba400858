"""Change several files of a folder atomically.

The new files are first written in full into a staging folder, which is then renamed: this commits
the change. Then the files move to their places. If the process ends before they have all moved,
the next reader or writer finishes the change. A full disk or a crash therefore leaves either the
old files or the new ones, never a mixture.

Readers share a lock and a writer excludes them (:mod:`eoracc.runtime.artifact.folder_lock`). The
lock is for as long as the files of a folder are opened, not for as long as they are used: what is
mapped or read already stays as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_exchange import finish_exchange
from eoracc.runtime.artifact.folder_lock import lock_folder
from eoracc.runtime.artifact.sync import sync_path

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["PENDING", "STAGED", "change_files", "changing", "reading"]

STAGED = ".change.partial"
"""Folder of a change that is being written, ignored until it is renamed."""

PENDING = ".change"
"""Folder of a committed change, whose files are moving to their places."""

_log = logging.getLogger("eoracc.artifact")

_FILES = "files"
_REMOVED = "removed.json"
_READER = Reader(ArtifactError, "the change was interrupted and cannot be finished")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against changes; a missing folder is not locked.

    An interrupted change is finished first, or removed if it had not been committed. Several
    readers may be inside, of one process too, but not :func:`changing`.

    Raises:
      ArtifactError: the folder is locked for too long, or an interrupted change cannot be finished.
    """
    repaired = False
    while _is_there(folder):
        with _locked(folder, exclusive=False):
            begun = os.path.lexists(folder / STAGED) and not repaired
            if not (begun or (folder / PENDING).exists()):
                yield
                return
        with _locked(folder, exclusive=True):
            _repair(folder)
            repaired = True
    yield


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other readers and writers.

    :func:`change_files` may be called inside, but not :func:`reading`, which would wait in vain.

    Raises:
      ArtifactError: the folder is missing or cannot be locked, or an interrupted change cannot be
        finished.
    """
    with _locked(folder, exclusive=True):
        _repair(folder)
        yield


@contextmanager
def _locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Lock the folder that is in the place, also while another one is put there."""
    with ExitStack() as stack:
        while _is_there(folder):
            with suppress(FileNotFoundError):
                stack.enter_context(lock_folder(folder, exclusive=exclusive))
                break
        else:
            raise ArtifactError(f"{folder}: there is no such folder")
        yield


def _is_there(folder: Path) -> bool:
    """Whether there is a folder, after an exchange that is under way."""
    while not folder.is_dir():
        if not finish_exchange(folder) and not folder.is_dir():
            return False
    return True


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


def _repair(folder: Path) -> None:
    """Finish a change that was committed, remove one that was not; a line says so."""
    if (folder / PENDING).exists():
        _finish(folder)
        _log.warning("%s: finished a change that had been interrupted", folder)
    if os.path.lexists(folder / STAGED):
        _remove(folder / STAGED)
        _log.warning("%s: removed the beginnings of a change that had been interrupted", folder)


def _finish(folder: Path) -> None:
    """Move the files of a committed change to their places; may be repeated."""
    pending = folder / PENDING
    if not pending.exists():
        return
    _refuse_links(pending)
    files = pending / _FILES
    touched: set[Path] = {folder}
    try:
        removed = [str(name) for name in _READER.read_json(pending / _REMOVED)]
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
        _remove(folder / STAGED)
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


def _remove(path: Path) -> None:
    """Remove a folder, or a link in its place, as far as permissions allow."""
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)
