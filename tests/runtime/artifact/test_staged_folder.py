from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from eoracc.errors import TargetError
from eoracc.runtime.artifact import staged_folder as module
from eoracc.runtime.artifact.folder_lock import try_lock
from eoracc.runtime.artifact.staged_folder import (
    is_staging_name,
    remove_dead,
    staged_folder,
    staging_name_bytes,
)

_KILLED = """
import os, signal, sys
from pathlib import Path
from eoracc.runtime.artifact.staged_folder import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_left_of_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "out") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_next_owner_removes_what_a_kill_has_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "out")], check=False, timeout=60
    )
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert (left / "out" / "weights").read_text() == "half"
    with staged_folder(tmp_path / "other"):
        assert left.exists()
    with staged_folder(tmp_path / "out"):
        assert not left.exists()
    assert names(tmp_path) == []
    assert caplog.messages == [f"{left}: removed, the process that wrote it has ended"]


def test_living_owners_keep_theirs(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as one, staged_folder(tmp_path / "out") as other:
        remove_dead(tmp_path / "out")
        assert one != other
        assert one.exists()
        assert other.exists()


@pytest.mark.parametrize(
    "name",
    [
        ".out.partial-abcdefg",
        ".out.partial-abcdefghi",
        ".out.partial-ABCDEFGH",
        ".out.partial-abcdefgh.work",
        ".out.partial-abcdefgh.partial-abcdefgh",
        ".out2.partial-abcdefgh",
        "out.partial-abcdefgh",
        "x.out.partial-abcdefgh",
    ],
)
def test_folders_of_other_names_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    remove_dead(tmp_path / "out")
    assert names(tmp_path) == [name]


def test_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".outs.partial-abcdefgh").mkdir()
    remove_dead(tmp_path / "out.")
    remove_dead(tmp_path / "out[a-z]")
    assert names(tmp_path) == [".outs.partial-abcdefgh"]


def test_links_and_files_stay(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "precious").touch()
    (tmp_path / ".out.partial-abcdefgh").symlink_to(tmp_path / "home")
    (tmp_path / ".out.partial-abcdefg_").touch()
    remove_dead(tmp_path / "out")
    assert (tmp_path / "home" / "precious").exists()
    assert len(names(tmp_path)) == 3


def test_folders_of_other_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    remove_dead(tmp_path / "out")
    assert names(tmp_path) == [".out.partial-abcdefgh"]


def test_without_locks_nobody_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    with staged_folder(tmp_path / "out"):
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == [".out.partial-abcdefgh"]


def test_folder_that_is_taken_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stolen: list[Path] = []

    def late(path: Path) -> int | None:
        if not stolen:
            stolen.append(path)
            shutil.rmtree(path)
        return try_lock(path)

    monkeypatch.setattr(module, "try_lock", late)
    with staged_folder(tmp_path / "out") as folder:
        assert folder.parent not in stolen
        assert len(stolen) == 1


def test_many_owners_at_once(tmp_path: Path) -> None:
    """Owners that come and go never remove what another one is writing."""
    lost: list[Path] = []

    def own() -> None:
        for _ in range(30):
            with staged_folder(tmp_path / "out") as folder:
                (folder / "weights").touch()
                if not (folder / "weights").exists():
                    lost.append(folder)

    threads = [threading.Thread(target=own) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lost == []
    assert names(tmp_path) == []


def test_log_that_an_error_names_is_kept_until_the_next_staging(tmp_path: Path) -> None:
    def failing() -> None:
        with staged_folder(tmp_path / "engine", kept=TargetError) as folder:
            (folder / "builder.log").touch()
            raise TargetError(str(folder / "builder.log"))

    with pytest.raises(TargetError) as caught:
        failing()
    assert Path(str(caught.value)).exists()
    with staged_folder(tmp_path / "engine", kept=TargetError):
        pass
    assert names(tmp_path) == []


def test_names(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "é") as folder:
        assert is_staging_name(folder.parent.name)
        assert len(os.fsencode(folder.parent.name)) == staging_name_bytes(tmp_path / "é")
        assert folder.name == "é"
    assert not is_staging_name("out")
    assert not is_staging_name(".partial-abcdefgh")


@pytest.mark.parametrize("path", ["/", ".", "..", "out/.."])
def test_path_without_a_name_of_its_own(path: str) -> None:
    with pytest.raises(FileExistsError), staged_folder(Path(path)):
        pass
