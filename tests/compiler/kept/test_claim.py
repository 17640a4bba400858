from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eoracc.compiler.kept.claim import claimed
from eoracc.errors import ArtifactError

HOLDER = """
import sys
from pathlib import Path
from eoracc.compiler.kept.claim import claimed
with claimed(Path(sys.argv[1]), "build"):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "some" / "work"


def test_an_empty_folder_is_removed_at_the_end(work: Path) -> None:
    with claimed(work, "build"):
        assert work.is_dir()
    assert not work.exists()
    with claimed(work, "build"):
        (work / "file").touch()
    assert work.exists()


def test_one_run_at_a_time(work: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with (
            pytest.raises(
                ArtifactError,
                match=rf"^{work}: another build is running there \(process {other.pid}\): "
                "wait for it to end, or go away$",
            ),
            claimed(work, "build", otherwise="go away"),
        ):
            pass
        assert work.exists()
        other.communicate("")
    with claimed(work, "build"):
        pass


def test_a_folder_that_was_removed_meanwhile_is_made_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    calls = []

    def slow(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        if path == work:
            calls.append(path)
            if len(calls) == 1:
                work.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", slow)
    with claimed(work, "build"):
        assert len(calls) == 2
        assert work.is_dir()


def test_the_folder_of_the_next_run_is_not_removed(work: Path) -> None:
    with claimed(work, "build"):
        # This run has succeeded and removes its folder; the next one makes its own.
        work.rmdir()
        work.mkdir()
    assert work.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "work", Path("/proc/work")):
        with (
            pytest.raises(
                ArtifactError, match=rf"^{path}: finished work cannot be kept there: .*: choose"
            ),
            claimed(path, "build"),
        ):
            pass


def test_a_folder_that_is_read_only(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with (
        pytest.raises(ArtifactError, match="it is read-only: choose another"),
        claimed(work, "build"),
    ):
        pass
