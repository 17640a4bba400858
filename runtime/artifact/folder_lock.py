"""Lock a folder for readers or for one writer, and say who is waited for.

The lock is ``flock`` on the folder itself: it leaves no file, ends with its process however that
ends, and needs no permission to write, so that an artifact on a read-only mount can be read.
Readers share it and a writer excludes them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError
from eoracc.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["WAIT_S", "lock_folder", "lock_holders", "try_lock", "waiting_at_most"]

WAIT_S = 300.0
"""Seconds that a lock is waited for. Hashing an artifact, the longest use, takes a minute per
10 to 100 GB; and whoever waits may have worked for hours."""

_NOTICE_S = 1.0
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.2
_SHOWN_WORDS = 3

_log = logging.getLogger("eoracc.artifact")
_wait_s: ContextVar[float] = ContextVar("wait_s", default=WAIT_S)


@contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Wait at most ``seconds`` for each lock inside; 0 does not wait."""
    token = _wait_s.set(seconds)
    try:
        yield
    finally:
        _wait_s.reset(token)


@contextmanager
def lock_folder(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock on ``folder``.

    After a second of waiting one line on the log says for whom. On a file system without locks a
    reader goes on without one, and a line says so.

    Args:
      folder: an existing folder. If it is replaced while its lock is waited for, the lock on the
        new one is taken.
      exclusive: exclude readers, too. The lock of one process excludes a second one in the same
        process.

    Raises:
      FileNotFoundError: there is no such folder, or it goes while its lock is waited for.
      ArtifactError: it cannot be read, is locked for longer than :func:`waiting_at_most` allows, or
        a writer finds a file system without locks.
    """
    deadline_s = time.monotonic() + _wait_s.get()
    while True:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ArtifactError(f"{folder}: cannot be read: {error.strerror}") from None
        try:
            _wait(descriptor, folder, deadline_s, exclusive=exclusive)
            if _is_at(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)


def try_lock(folder: Path) -> int | None:
    """Lock ``folder`` against readers and writers if nobody has locked it.

    Returns:
      The descriptor that holds the lock until it is closed; None where another process holds the
      lock, or the folder is gone.

    Raises:
      OSError: the folder cannot be opened, is a link, or its file system has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, folder):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether the opened folder is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except OSError:
        return False


def _wait(descriptor: int, folder: Path, deadline_s: float, *, exclusive: bool) -> None:
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    begun_s, pause_s, noticed = time.monotonic(), _FIRST_PAUSE_S, False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:
            if exclusive:
                raise ArtifactError(
                    f"{folder}: cannot be locked for a change: {error.strerror}: change a copy on "
                    "a local disk"
                ) from None
            _log.warning(
                "%s: is read without a lock, which its file system does not have: do not change "
                "the folder meanwhile",
                folder,
            )
            return
        else:
            return
        now_s = time.monotonic()
        if now_s >= deadline_s:
            raise ArtifactError(
                f"{folder}: is locked by {_holders_and_uses(folder)}: wait for that to end, or "
                f"wait longer than {_wait_s.get():g} s with 'eoracc --wait SECONDS ...'"
            )
        if not noticed and now_s - begun_s >= _NOTICE_S:
            noticed = True
            _log.warning(
                "%s: waiting for at most %g s for %s",
                folder,
                _wait_s.get(),
                _holders_and_uses(folder),
            )
        time.sleep(min(pause_s, deadline_s - now_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


# --- who holds a lock -----------------------------------------------------------------------------


def lock_holders(folder: Path) -> str:
    """The processes that have locked ``folder``, as far as the kernel tells; for a sentence."""
    return ", ".join(_process(pid) for pid, _ in _held(folder)) or "another process"


def _holders_and_uses(folder: Path) -> str:
    """The processes, each with what it does."""
    uses = (
        f"{_process(pid)}, which {'changes' if writes else 'reads'} it"
        for pid, writes in _held(folder)
    )
    return ", ".join(uses) or "another process"


def _held(folder: Path) -> list[tuple[int, bool]]:
    """Each process with a lock on ``folder``, and whether the lock is a writer's."""
    try:
        status = folder.stat()
        # 7: FLOCK  ADVISORY  WRITE 4711 fd:01:262145 0 EOF
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    held = {
        (int(row[4]), row[3] == "WRITE") for row in rows if row[1] == "FLOCK" and row[5] == place
    }
    return sorted(held)


def _process(pid: int) -> str:
    if pid == os.getpid():
        return "this process"
    if pid <= 0:
        return "a process of another container"
    command = _command(pid)
    return f"process {pid}{command and f' ({command})'}"


def _command(pid: int) -> str:
    """Program and subcommand of a process; not its options, which may hold keys."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    if Path(words[0]).name.startswith("python") and len(words) > 1:
        words = words[2:] if words[1] == "-m" else words[1:]
    shown: list[str] = []
    for word in words[:_SHOWN_WORDS]:
        if not word or word.startswith("-"):
            break
        shown.append(word if shown else Path(word).name)
    return printable(" ".join(shown))
