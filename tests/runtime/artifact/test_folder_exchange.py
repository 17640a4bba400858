from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact import folder_exchange
from eoracc.runtime.artifact.folder_change import changing, reading
from eoracc.runtime.artifact.folder_exchange import finish_exchange, put_in_place, upcoming_path
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.artifact.staged_folder import staged_folder

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to exchange; the second one is that of other file systems."""
    if request.param == "renames":
        monkeypatch.setattr(folder_exchange, "_exchange", lambda *_: False)
    return str(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.mkdir()
    (path / "content").write_text("old")
    return path


def replace(target: Path) -> None:
    with staged_folder(target) as folder:
        (folder / "content").write_text("new")
        with changing(target):
            put_in_place(folder, target)


def content(target: Path) -> str:
    with reading(target):
        return (target / "content").read_text()


@pytest.mark.usefixtures("way")
def test_folder_is_replaced_and_nothing_else_is_left(target: Path) -> None:
    replace(target)
    assert content(target) == "new"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_new_folder(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "target") as folder:
        (folder / "content").write_text("new")
        put_in_place(folder, tmp_path / "target")
    assert content(tmp_path / "target") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_system_exchanges_in_one_step(target: Path, tmp_path: Path) -> None:
    # ext4, xfs, btrfs and tmpfs do; a failure here says that the tests run on another one.
    (tmp_path / "other").mkdir()
    assert folder_exchange._exchange(tmp_path / "other", target)
    assert (tmp_path / "other" / "content").read_text() == "old"
    assert not any(target.iterdir())


def test_refusal_of_the_system_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        folder_exchange._exchange(tmp_path / "none", tmp_path / "neither")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_system_that_cannot_exchange(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(ctypes, "get_errno", lambda: number)
    monkeypatch.setattr(folder_exchange, "_RENAME_EXCHANGE", 1 << 31)  # no system knows it
    replace(target)
    assert content(target) == "new"


def test_library_without_the_call(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    replace(target)
    assert content(target) == "new"


def rename_but(number: int, act: Callable[[], None]) -> Callable[[Path, Path], Path]:
    """``Path.rename`` that acts in place of its ``number``-th call."""
    rename, count = Path.rename, 0

    def call(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            act()
        return rename(self, target)

    return call


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_failed_rename_keeps_the_old_folder(
    target: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(folder_exchange, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename_but(number, fail))
    with pytest.raises(OSError, match="Input/output error"):
        replace(target)
    assert content(target) == "old"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.fixture
def interrupted(target: Path) -> Path:
    """The place is empty, both folders are in the one for the exchange."""
    upcoming = upcoming_path(target)
    (upcoming / "target").mkdir(parents=True)
    (upcoming / "target" / "content").write_text("new")
    target.rename(upcoming / "replaced")
    return target


@pytest.mark.parametrize("use", [reading, changing, staged_folder, read_manifest])
def test_next_user_finishes_the_exchange(
    interrupted: Path, use: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    if use is read_manifest:
        with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
            read_manifest(interrupted)
    else:
        with use(interrupted):  # type: ignore[attr-defined]
            pass
    assert caplog.messages[0] == f"{interrupted}: finished a replacement that had been interrupted"
    assert content(interrupted) == "new"
    with staged_folder(interrupted):
        pass
    assert [path.name for path in interrupted.parent.iterdir()] == ["target"]


def test_place_that_is_taken_again_is_left_alone(interrupted: Path) -> None:
    interrupted.write_text("a file")
    assert not finish_exchange(interrupted)
    assert interrupted.read_text() == "a file"


def test_exchange_that_cannot_be_finished(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", rename_but(1, fail))
    problem = "replacement was interrupted and cannot be finished: Input/output error: check that"
    with pytest.raises(ArtifactError, match=problem):
        finish_exchange(interrupted)
    assert finish_exchange(interrupted)
    assert content(interrupted) == "new"


def test_reader_waits_for_a_living_owner(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    between, done = threading.Event(), threading.Event()
    seen: list[str] = []

    def pause() -> None:
        if threading.current_thread() is not threading.main_thread():
            between.set()
            done.wait(10)

    monkeypatch.setattr(folder_exchange, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", rename_but(3, pause))
    writer = threading.Thread(target=replace, args=(target,))
    reader = threading.Thread(target=lambda: seen.append(content(target)))
    writer.start()
    assert between.wait(10)
    assert not target.exists()
    reader.start()
    reader.join(0.1)
    assert seen == []
    done.set()
    writer.join(10)
    reader.join(10)
    assert seen == ["new"]


def test_no_reader_finds_the_place_empty(target: Path, way: str) -> None:
    """Readers and writers in turn; by one step, even a reader that takes no lock finds a folder."""
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(content(target))
            if way == "exchange":
                assert target.is_dir()

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        replace(target)
    stop.set()
    for reader in readers:
        reader.join(10)
    assert seen <= {"old", "new"}
    assert content(target) == "new"
