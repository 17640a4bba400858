from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_change import PENDING, STAGED, change_files, changing, reading

if TYPE_CHECKING:
    from collections.abc import Callable

OLD = {"kept": b"kept", "changed": b"old", "sub/gone": b"gone", "sub/changed": b"old"}
WRITTEN = {"changed": b"new", "sub/changed": b"new", "fresh/made": b"made"}
NEW = {"kept": b"kept", **WRITTEN}
REMOVED = ["sub/gone"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in OLD.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(folder: Path) -> None:
    with changing(folder):
        change_files(folder, WRITTEN, REMOVED)


def test_files_are_written_and_removed(folder: Path) -> None:
    change(folder)
    assert contents(folder) == NEW
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "fresh", "kept", "sub"]


def test_folder_that_becomes_empty_goes(folder: Path) -> None:
    with changing(folder):
        change_files(folder, {}, ["sub/gone", "sub/changed", "never/there"])
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "kept"]


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """From the ``step``-th system call on, every one fails; gives how many there were."""
    count = 0

    def wrap(owner: Any, name: str) -> None:  # noqa: ANN401 - a class or a module
        real = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir"):
        wrap(Path, name)
    wrap(os, "fsync")
    wrap(shutil, "rmtree")
    return lambda: count


def test_killed_at_any_step_it_leaves_all_or_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patches:
        steps = kill_at(patches, 10**9)
        change(Path(shutil.copytree(folder, tmp_path / "measured")))
    assert steps() > 20
    seen = []
    for step in range(steps()):
        copy = Path(shutil.copytree(folder, tmp_path / f"killed{step}"))
        with pytest.MonkeyPatch.context() as patches, contextlib.suppress(Killed):
            kill_at(patches, step)
            change(copy)
        with reading(copy):
            left = contents(copy)
            assert {path.name for path in copy.iterdir()}.isdisjoint({STAGED, PENDING})
        assert left in (OLD, NEW), step
        seen.append(left == NEW)
        change(copy)
        assert contents(copy) == NEW
    # Once committed, a change stays; the commit is at some step in between.
    assert seen == sorted(seen)
    assert 0 < sum(seen) < len(seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disk_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match=f"folder: cannot be changed: {os.strerror(number)}: f"):
        change(folder)
    assert contents(folder) == OLD
    assert not (folder / STAGED).exists()


def test_change_that_cannot_be_finished_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patches:
        patches.setattr(Path, "replace", fail)
        problem = "is a change that was interrupted and cannot be finished: Read-only file system"
        with pytest.raises(ArtifactError, match=problem):
            change(folder)
        with pytest.raises(ArtifactError, match=problem), reading(folder):
            pass
    with reading(folder):
        assert contents(folder) == NEW


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b/c", "", "link/outside"])
def test_pending_change_cannot_leave_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"precious")
    (folder / "link").symlink_to(tmp_path)
    (folder / PENDING / "files").mkdir(parents=True)
    (folder / PENDING / "removed.json").write_text(f'["{name}"]')
    with pytest.raises(ArtifactError, match="leaves the folder: do not trust"), reading(folder):
        pass
    assert (tmp_path / "outside").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/b/c", "", "link/outside"])
def test_new_change_cannot_leave_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "link").symlink_to(tmp_path)
    for written, removed in (({name: b""}, ()), ({}, (name,))):
        with pytest.raises(ArtifactError, match="leaves the folder"), changing(folder):
            change_files(folder, written, removed)
    assert contents(folder) == OLD


@pytest.mark.parametrize("link", [PENDING, f"{PENDING}/files", f"{PENDING}/files/inner"])
def test_pending_change_takes_nothing_from_elsewhere(
    folder: Path, tmp_path: Path, link: str
) -> None:
    (tmp_path / "home" / "files").mkdir(parents=True)
    (tmp_path / "home" / "removed.json").write_text("[]")
    (tmp_path / "home" / "files" / "secret").write_bytes(b"precious")
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / link).symlink_to(tmp_path / "home")
    with pytest.raises(ArtifactError, match="is a link: do not trust"), reading(folder):
        pass
    assert (tmp_path / "home" / "files" / "secret").read_bytes() == b"precious"


def test_change_is_not_staged_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (folder / STAGED).symlink_to(tmp_path / "home")
    change(folder)
    assert contents(folder) == NEW
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("text", ["", "{", "7", "null"])
def test_damaged_list_of_what_is_removed(folder: Path, text: str) -> None:
    (folder / PENDING / "files").mkdir(parents=True)
    (folder / PENDING / "removed.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be finished"), reading(folder):
        pass


def test_reader_waits_for_a_writer(folder: Path) -> None:
    seen: list[dict[str, bytes]] = []

    def read() -> None:
        with reading(folder):
            seen.append(contents(folder))

    reader = threading.Thread(target=read)
    with changing(folder):
        reader.start()
        change_files(folder, WRITTEN, REMOVED)
        assert not seen
    reader.join(10)
    assert seen == [NEW]


def test_reader_says_what_it_repairs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / PENDING / "files").mkdir(parents=True)
    (folder / PENDING / "files" / "changed").write_bytes(b"new")
    (folder / PENDING / "removed.json").write_text("[]")
    with reading(folder):
        assert contents(folder) == OLD | {"changed": b"new"}
    (folder / STAGED / "files").mkdir(parents=True)
    with reading(folder):
        assert not (folder / STAGED).exists()
    assert caplog.messages == [
        f"{folder}: finished a change that had been interrupted",
        f"{folder}: removed the beginnings of a change that had been interrupted",
    ]


def test_reader_without_permission_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        pass  # what rmtree does with ignore_errors

    (folder / STAGED).mkdir()
    monkeypatch.setattr(shutil, "rmtree", fail)
    with reading(folder):
        assert contents(folder) == OLD


def test_readers_do_not_wait_for_each_other(folder: Path) -> None:
    with reading(folder), reading(folder):
        pass


def test_lock_is_on_what_is_in_the_place_now(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, holds, done = threading.Event(), threading.Event(), threading.Event()
    lock = fcntl.flock

    def announce(descriptor: int, kind: int) -> None:
        if threading.current_thread() is late:
            waits.set()
        lock(descriptor, kind)

    def hold() -> None:
        with changing(folder):
            holds.set()
            done.wait(10)

    monkeypatch.setattr(fcntl, "flock", announce)
    late = threading.Thread(target=hold)
    with changing(folder):
        late.start()
        assert waits.wait(10)
        folder.rename(tmp_path / "before")
        shutil.copytree(tmp_path / "before", folder)
    assert holds.wait(10)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
        done.set()
        late.join(10)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with reading(tmp_path / "nowhere"):
        pass
    with pytest.raises(ArtifactError, match="there is no such folder"), changing(tmp_path / "no"):
        pass
