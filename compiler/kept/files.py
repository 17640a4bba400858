"""Files that must survive a power loss: written, flushed, described, checked and removed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.sync import sync_path

__all__ = [
    "DamagedError",
    "check_file",
    "describe_file",
    "keeping",
    "make_folder",
    "read_file",
    "remove",
    "replace_file",
    "write_with",
]

_PARTIAL = ".partial"


class DamagedError(Exception):
    """A kept file is not as it was written; the text is the problem: ``is missing``."""


@contextmanager
def keeping(path: Path) -> Iterator[None]:
    """Report a full or failing disk in one sentence.

    Args:
      path: the file or folder that is written or removed inside the context.

    Raises:
      ArtifactError: the operating system refused.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path}: the state of the build cannot be kept there: {_problem(error)}: free some "
            "space, or check that the folder is writable, and run the same command again, which "
            "resumes from what was kept before"
        ) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents, so that a power loss does not take them away again.

    Raises:
      OSError: the operating system refused.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_path(folder.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a power loss leaves either the old content or the new one.

    Raises:
      ArtifactError: the operating system refused; the old file is as it was.
    """
    write_with(path, lambda partial: _write(partial, content))
    with keeping(path):
        sync_path(path.parent)


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Replace a file by one that ``write`` makes under a temporary name; nothing is flushed.

    Args:
      path: of the file; a folder that is there is removed.
      write: given the temporary path.

    Raises:
      ArtifactError: the operating system refused; the old file is as it was.
    """
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    with keeping(path):
        remove(partial)
        try:
            write(partial)
            if path.is_dir() and not path.is_symlink():
                remove(path)
            partial.replace(path)
        except BaseException:
            remove(partial)
            raise


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
      DamagedError: it is missing, no regular file, or cannot be read.
    """
    with _reading(path):
        return path.read_bytes()


def describe_file(path: Path) -> dict[str, Any]:
    """``{"size": bytes, "sha256": hexadecimal}`` of a file, for :func:`check_file`.

    SHA-256 is the fastest digest of hashlib where the processor has instructions for it.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Compare a file with what :func:`describe_file` returned when it was written.

    Raises:
      DamagedError: it differs, or cannot be read.
    """
    with _reading(path):
        size = path.stat().st_size
        if size != entry["size"]:
            raise DamagedError(f"has {size:,} bytes in place of {entry['size']:,}")
        if describe_file(path)["sha256"] != entry["sha256"]:
            raise DamagedError("has another content than was kept")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; nothing may be there.

    Raises:
      ArtifactError: the operating system refused.
    """
    with keeping(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedError("is not a file")
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError("is missing") from None
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from None


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _problem(error: OSError | SafetensorError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # A SafetensorError has no errno; its text ends in "(os error 28)".
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else str(error)
