from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eoracc.compiler.compare.folder import WorkFolder
from eoracc.errors import ArtifactError

HOLDER = """
import sys
from pathlib import Path
from eoracc.compiler.compare.folder import WorkFolder
with WorkFolder(Path(sys.argv[1])).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    return WorkFolder(tmp_path / "some" / "work")


def test_figures_are_kept_by_key(work: WorkFolder) -> None:
    with work.claimed():
        (work.sweeps("a") / "0").mkdir(parents=True)
        (work.sweeps("b") / "0").mkdir(parents=True)
        work.keep("a", {"kl": 0.1})
        # The sweeps of a row that is finished have served.
        assert not work.sweeps("a").exists()
        assert work.sweeps("b").exists()
    assert work.figures("a", {"kl"}) == {"kl": 0.1}
    assert work.figures("b", {"kl"}) is None
    assert work.figures("a", {"kl", "bytes"}) is None  # of a version with other figures


@pytest.mark.parametrize("content", ["", '{"kl": 0.', "[]", '"kl"'])
def test_a_row_that_was_cut_off_is_not_there(work: WorkFolder, content: str) -> None:
    with work.claimed():
        work.keep("a", {"kl": 0.1})
        (work.path / "rows" / "a.json").write_text(content)
    assert work.figures("a", {"kl"}) is None


def test_a_fresh_start_forgets_everything(work: WorkFolder) -> None:
    with work.claimed():
        work.keep("a", {"kl": 0.1})
        (work.path / "stray").touch()
        (work.path / "link").symlink_to(work.path.parent)
    with work.claimed(fresh=True):
        assert list(work.path.iterdir()) == []
    assert not work.path.exists()
    assert work.path.parent.exists()


def test_one_comparison_at_a_time(work: WorkFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(work.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        for fresh in (False, True):
            with (
                pytest.raises(ArtifactError, match=r"work: another comparison is running there"),
                work.claimed(fresh=fresh),
            ):
                pass
        assert work.path.exists()
        other.communicate("")
    with work.claimed():
        work.keep("a", {})


def test_a_folder_that_was_removed_meanwhile_is_made_again(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    calls = []

    def slow(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        calls.append(path)
        if len(calls) == 1:
            work.path.rmdir()
        return descriptor

    monkeypatch.setattr(os, "open", slow)
    with work.claimed():
        assert len(calls) == 2
        work.keep("a", {})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "work", Path("/proc/work")):
        with (
            pytest.raises(
                ArtifactError, match=rf"^{path}: finished rows cannot be kept there: .*: choose"
            ),
            WorkFolder(path).claimed(),
        ):
            pass


def test_a_folder_that_is_read_only(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ArtifactError, match="it is read-only: choose another"), work.claimed():
        pass
