"""A work folder that one run at a time may use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eoracc.compiler.kept.files import make_folder
from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_lock import lock_holders

__all__ = ["claimed"]


@contextmanager
def claimed(path: Path, run: str, *, otherwise: str = "choose another 'output'") -> Iterator[None]:
    """Create and lock a work folder; remove it at the end if it is empty.

    The lock is on the folder itself: it leaves no file and ends with its process.

    Args:
      path: the folder.
      run: what works there, for errors: ``build``.
      otherwise: the way out for whoever cannot wait.

    Raises:
      ArtifactError: it cannot be created or written to, or another run has locked it.
    """
    descriptor = _lock(path, run, otherwise)
    try:
        yield
    finally:
        with suppress(OSError):
            # Once it is removed, the next run may have made and locked another one.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                path.rmdir()
        os.close(descriptor)


def _lock(path: Path, run: str, otherwise: str) -> int:
    while True:
        try:
            make_folder(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _unusable(path, error.strerror, otherwise) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ArtifactError(
                f"{path}: another {run} is running there ({lock_holders(path)}): "
                f"wait for it to end, or {otherwise}"
            ) from None
        except OSError:
            pass  # a file system without locks
        # The last holder may have removed the empty folder meanwhile.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                if os.access(path, os.W_OK | os.X_OK):
                    return descriptor
                os.close(descriptor)
                raise _unusable(path, "it is read-only", otherwise)
        os.close(descriptor)


def _unusable(path: Path, why: str | None, otherwise: str) -> ArtifactError:
    return ArtifactError(f"{path}: finished work cannot be kept there: {why}: {otherwise}")
