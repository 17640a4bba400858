from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_lock import (
    lock_folder,
    lock_holders,
    try_lock,
    waiting_at_most,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX if sys.argv[2] == "changes" else fcntl.LOCK_SH)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, how: str) -> Iterator[int]:
    """Another process holds the lock; gives its id."""
    script = folder.parent / "holder"
    script.write_text(_HOLD)
    with subprocess.Popen(
        [sys.executable, str(script), str(folder), how, "--key", "secret"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    path.mkdir()
    return path


@pytest.mark.parametrize(("how", "exclusive"), [("reads", True), ("changes", False)])
def test_holder_is_named(
    folder: Path, how: str, exclusive: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with held_elsewhere(folder, how) as pid:
        begun = time.monotonic()
        with (
            waiting_at_most(1.3),
            pytest.raises(ArtifactError) as caught,
            lock_folder(folder, exclusive=exclusive),
        ):
            pass
        assert 1.3 <= time.monotonic() - begun < 5
    who = f"process {pid} (holder {folder} {how}), which {how} it"
    assert str(caught.value) == (
        f"{folder}: is locked by {who}: wait for that to end, or wait longer than 1.3 s with "
        "'eoracc --wait SECONDS ...'"
    )
    assert caplog.messages == [f"{folder}: waiting for at most 1.3 s for {who}"]


def test_options_of_the_holder_stay_private(folder: Path) -> None:
    with held_elsewhere(folder, "reads"):
        assert "secret" not in lock_holders(folder)


def test_holder_that_the_kernel_does_not_name(folder: Path) -> None:
    assert lock_holders(folder) == "another process"
    assert lock_holders(folder / "gone") == "another process"
    with lock_folder(folder, exclusive=True):
        assert lock_holders(folder) == "this process"


def test_short_wait_is_silent(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entered = threading.Event()

    def late() -> None:
        with lock_folder(folder, exclusive=False):
            entered.set()

    thread = threading.Thread(target=late)
    with lock_folder(folder, exclusive=True):
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join(5)
    assert caplog.messages == []


def test_without_waiting(folder: Path) -> None:
    with lock_folder(folder, exclusive=False), waiting_at_most(0):
        with lock_folder(folder, exclusive=False):
            pass
        with (
            pytest.raises(ArtifactError, match="is locked by this process, which reads it: wait"),
            lock_folder(folder, exclusive=True),
        ):
            pass


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_file_system_without_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_locks(monkeypatch)
    with lock_folder(folder, exclusive=False):
        pass
    (line,) = caplog.messages
    assert line.startswith(f"{folder}: is read without a lock, which its file system does not have")
    problem = "artifact: cannot be locked for a change: No locks available: change a copy on a loca"
    with pytest.raises(ArtifactError, match=problem), lock_folder(folder, exclusive=True):
        pass
    with pytest.raises(OSError, match="No locks"):
        try_lock(folder)


def test_folder_that_is_gone(folder: Path) -> None:
    gone = folder / "gone"
    with pytest.raises(FileNotFoundError), lock_folder(gone, exclusive=False):
        pass
    assert try_lock(gone) is None


def test_lock_of_the_owner_is_not_taken(folder: Path) -> None:
    owned = try_lock(folder)
    assert owned is not None
    assert try_lock(folder) is None
    os.close(owned)
    again = try_lock(folder)
    assert again is not None
    os.close(again)


def test_link_is_not_locked(folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    with pytest.raises(OSError, match="Not a directory"):
        try_lock(folder / "link")
