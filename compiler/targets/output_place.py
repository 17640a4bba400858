"""Check the place of an artifact before any work is done for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from safetensors import SafetensorError

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_change import PENDING, STAGED, changing
from eoracc.runtime.artifact.folder_exchange import finish_exchange
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, read_manifest
from eoracc.runtime.artifact.signature import SIGNATURE_FILE
from eoracc.runtime.artifact.staged_folder import (
    is_staging_name,
    remove_dead,
    staging_name_bytes,
)

__all__ = ["check_output", "refuse_full_disk", "refuse_strangers"]

_FULL = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk is full: free some space",
    errno.EFBIG: "a file would be larger than this disk or process may have: raise the limit",
}
_OTHER = "choose another 'output'"


def check_output(output: Path, *, force: bool = False) -> None:
    """Check an output folder before any work is done for it.

    Args:
      output: the artifact's folder.
      force: let an existing artifact be replaced; anything else is refused all the same.

    Raises:
      ArtifactError: it exists, or its place cannot be written to.
    """
    _check_name(output)
    try:
        finish_exchange(output)
        exists = os.path.lexists(output)
        parent = _nearest(output.parent)
    except OSError as error:
        raise ArtifactError(f"{output}: {error.strerror}: {_OTHER}") from error
    if not parent.is_dir():
        raise ArtifactError(f"{output}: {parent} is no folder: {_OTHER}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"{output}: {parent} cannot be written to: {_OTHER}")
    longest = os.pathconf(parent, "PC_NAME_MAX")
    if staging_name_bytes(output) > longest:
        raise ArtifactError(
            f"{output}: {os.strerror(errno.ENAMETOOLONG)}: {_OTHER} with a shorter name"
        )
    if parent == output.parent:
        remove_dead(output)
    if exists and not force:
        raise ArtifactError(f"{output}: exists: {_OTHER}, or replace it with --force")
    if exists:
        _check_replaced(output)


def _check_name(output: Path) -> None:
    if output.name in ("", ".."):
        raise ArtifactError(f"{output}: has no name that a folder could be made under: {_OTHER}")
    if is_staging_name(output.name):
        raise ArtifactError(
            f"{output}: is a name of unfinished artifacts, which builds remove: {_OTHER}"
        )
    if not output.is_absolute():
        try:
            Path.cwd()
        except FileNotFoundError:
            raise ArtifactError(
                f"{output}: the current folder has been removed: change to another folder"
            ) from None


def _check_replaced(output: Path) -> None:
    """Check that what is there is an artifact that can be replaced as a whole."""
    if output.is_symlink():
        raise ArtifactError(
            f"{output}: is a link, so --force does not replace it: give the folder that it leads "
            f"to, or {_OTHER}"
        )
    refuse_strangers(output, listing=False)
    if os.path.ismount(output):
        raise ArtifactError(f"{output}: is a mount point: choose a folder in it as 'output'")
    if not os.access(output, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"{output}: may not be written to, so --force does not replace it: {_OTHER}"
        )
    # The lock is tried now, not after hours of work. Inside, what a kill has left is cleared away.
    with changing(output):
        refuse_strangers(output)


def refuse_strangers(output: Path, *, listing: bool = True) -> None:
    """Refuse to replace a folder with anything in it that no build or command has put there.

    Args:
      output: an existing folder or file.
      listing: compare the files that are there with the manifest.

    Raises:
      ArtifactError: it is no artifact, or holds a file that its manifest does not list.
    """
    try:
        listed = {MANIFEST_FILE, SIGNATURE_FILE, *read_manifest(output).files}
    except ArtifactError as error:
        raise ArtifactError(
            f"{output}: exists and is no eoracc artifact, so --force does not replace it: "
            f"remove it or {_OTHER}"
        ) from error
    for parent, _, files in os.walk(output) if listing else ():
        folder = Path(parent).relative_to(output)
        if folder.parts[:1] in ((PENDING,), (STAGED,)):
            continue
        for name in sorted(files):
            if (folder / name).as_posix() not in listed:
                raise ArtifactError(
                    f"{output / folder / name}: is no part of the artifact, so --force does not "
                    f"replace {output}: move the file elsewhere, or {_OTHER}"
                )


def refuse_full_disk(output: Path, error: BaseException) -> None:
    """Raise an error of one sentence if ``error`` came from a full disk at ``output``.

    Args:
      output: the artifact's folder.
      error: of any kind; it is followed to those that it came from.

    Raises:
      ArtifactError: the disk was full, or a file longer than it may be.
    """
    origin: BaseException | None = error
    while origin is not None:
        for number, problem in _FULL.items():
            if _has_number(origin, number):
                raise ArtifactError(f"{output}: {problem} or {_OTHER}") from error
        origin = origin.__cause__ or origin.__context__


def _nearest(path: Path) -> Path:
    """The nearest ancestor of ``path`` that exists, itself included."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _has_number(error: BaseException, number: int) -> bool:
    if isinstance(error, SafetensorError):  # has no errno, only its text
        return f"(os error {number})" in str(error)
    return isinstance(error, OSError) and error.errno == number
