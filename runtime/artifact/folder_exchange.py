"""Put a finished folder in its place, where an older one may be, so that one of them is there.

A folder that is there is exchanged with the new one in a single step (``renameat2``). Where the
kernel or the file system cannot do that, two renames do: the folder ``.NAME.partial-upcoming``
holds the new one, then takes the old one, and gives the new one. If the process ends in between,
the next reader or writer does the second rename.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_lock import lock_folder
from eoracc.runtime.artifact.sync import sync_path

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["finish_exchange", "put_in_place", "staging_path", "upcoming_path"]

_log = logging.getLogger("eoracc.artifact")

_UPCOMING = "upcoming"
_REPLACED = "replaced"

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
# EPERM is also the answer of a container that does not know the call.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def staging_path(target: Path, suffix: str) -> Path:
    """The folder beside ``target`` in which it is written under its own name."""
    return target.with_name(f".{target.name}.partial-{suffix}")


def upcoming_path(target: Path) -> Path:
    """The name of that folder between the two renames of an exchange."""
    return staging_path(target, _UPCOMING)


def put_in_place(folder: Path, target: Path) -> None:
    """Move a folder to its place; one that is there takes the place of the first.

    At every moment one of the two is there, whole, for whoever opens ``target`` by
    :func:`eoracc.runtime.artifact.folder_change.reading`.

    Args:
      folder: from :func:`eoracc.runtime.artifact.staged_folder.staged_folder`, complete and
        flushed to disk.
      target: its place. A folder that is there is locked by
        :func:`eoracc.runtime.artifact.folder_change.changing`.

    Raises:
      OSError: it cannot be moved: the target is a mount point, or has appeared meanwhile. What was
        there is there still.
    """
    if not target.is_dir():
        folder.rename(target)
    elif not _exchange(folder, target):
        _exchange_by_renames(folder, target)
    sync_path(target.parent)


def finish_exchange(target: Path) -> bool:
    """Put the folder in its place of which an interrupted exchange left the place empty.

    Returns:
      Whether there was an exchange: of a process that has ended, or of one that is waited for.

    Raises:
      ArtifactError: the parent cannot be written to, or a living process takes too long.
    """
    if os.path.lexists(target):
        return False
    upcoming = upcoming_path(target)
    new = upcoming / target.name
    if not new.is_dir():
        return False
    try:
        with lock_folder(upcoming, exclusive=True):
            if not os.path.lexists(target) and new.is_dir():
                new.rename(target)
                sync_path(target.parent)
                _log.warning("%s: finished a replacement that had been interrupted", target)
    except FileNotFoundError:
        pass  # its owner lives and has just finished it
    except OSError as error:
        raise ArtifactError(
            f"{target}: its replacement was interrupted and cannot be finished: "
            f"{error.strerror}: check that {target.parent} is writable, and try again"
        ) from error
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library that is older than the call
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _exchange_by_renames(folder: Path, target: Path) -> None:
    upcoming = upcoming_path(target)
    # Of a process that ended right after an exchange or right before: the place is taken.
    shutil.rmtree(upcoming, ignore_errors=True)
    folder.parent.rename(upcoming)
    sync_path(target.parent)
    target.rename(upcoming / _REPLACED)
    try:
        (upcoming / folder.name).rename(target)
    except BaseException:
        (upcoming / _REPLACED).rename(target)
        raise
