"""Write a folder under a temporary name beside its place.

``.NAME.partial-XXXXXXXX`` holds the new folder while it is written. Its owner holds a lock on it,
which ends with the process however that ends. So whoever stages a folder for the same place next
can tell what dead owners have left and removes it: nothing of living ones, and nothing of other
places.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from eoracc.runtime.artifact.folder_exchange import finish_exchange, staging_path, upcoming_path
from eoracc.runtime.artifact.folder_lock import try_lock

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["is_staging_name", "remove_dead", "staged_folder", "staging_name_bytes"]

_log = logging.getLogger("eoracc.artifact")

_SUFFIX = "[a-z0-9_]{8}"
"""What ``mkdtemp`` appends; the name during an exchange has this form, too."""


def is_staging_name(name: str) -> bool:
    """Whether a folder of this name may be taken for what a dead process has left."""
    return re.fullmatch(rf"\..+\.partial-{_SUFFIX}", name) is not None


def staging_name_bytes(target: Path) -> int:
    """Length of the longest name beside ``target`` that staging makes."""
    return len(os.fsencode(upcoming_path(target).name))


@contextmanager
def staged_folder(target: Path, *, kept: type[BaseException] | None = None) -> Iterator[Path]:
    """An empty folder that can become ``target``.

    It has its name, is on the same file system, and is moved to its place by
    :func:`eoracc.runtime.artifact.folder_exchange.put_in_place`. What is left of it at the end is
    removed: nothing, or the folder that was replaced.

    Args:
      target: a path whose parent exists.
      kept: an error that keeps the folder, because its text names a file in it. The next staging
        for the same place removes it.

    Raises:
      ArtifactError: an exchange that was interrupted cannot be finished.
      OSError: the folder cannot be made.
    """
    if target.name in ("", ".."):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    finish_exchange(target)
    remove_dead(target)
    staging, descriptor = _make(target)
    made = staging.stat()
    keeps = False
    try:
        folder = staging / target.name
        folder.mkdir()
        yield folder
    except BaseException as error:
        keeps = kept is not None and isinstance(error, kept)
        raise
    finally:
        if not keeps:
            for path in (staging, upcoming_path(target)):
                with suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), made):
                        shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _make(target: Path) -> tuple[Path, int | None]:
    """A new folder for staging, and the lock on it; None on a file system without locks."""
    while True:
        prefix = staging_path(target, "").name
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            descriptor = try_lock(staging)
        except OSError:
            return staging, None
        if descriptor is not None:
            return staging, descriptor
        # Another process has found it before it was locked, and removes it.


def remove_dead(target: Path) -> None:
    """Remove what dead owners have left of folders for ``target``, whose parent exists."""
    name = re.compile(rf"{re.escape(staging_path(target, '').name)}{_SUFFIX}")
    with os.scandir(target.parent) as entries:
        found = [entry for entry in entries if name.fullmatch(entry.name)]
    for entry in found:
        # A file system without locks cannot tell whether the owner lives.
        with suppress(OSError):
            path = Path(entry.path)
            # In a shared folder such as /tmp there are those of other users, too.
            if entry.is_symlink() or entry.stat().st_uid != os.geteuid():
                continue
            descriptor = try_lock(path)
            if descriptor is None:
                continue
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
            _log.warning("%s: removed, the process that wrote it has ended", path)
