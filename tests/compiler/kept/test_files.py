from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from eoracc.compiler.kept.files import (
    DamagedError,
    check_file,
    describe_file,
    keeping,
    make_folder,
    read_file,
    remove,
    replace_file,
    write_with,
)
from eoracc.errors import ArtifactError
from tests.damage import DAMAGES

PROBLEMS = {
    "emptied": r"has 0 bytes in place of [\d,]+",
    "cut in half": r"has [\d,]+ bytes in place of [\d,]+",
    "deleted": "is missing",
    "a folder": "is not a file",
    "a pipe": "is not a file",
    "unreadable": r"cannot be read \(Too many levels of symbolic links\)",
}


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "another file's content"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(500, dtype=np.float32)}, path)
    entry = describe_file(path)
    check_file(path, entry)
    DAMAGES[damage](path)
    problem = PROBLEMS.get(damage, "has another content than was kept")
    with pytest.raises(DamagedError, match=f"^{problem}$"):
        check_file(path, entry)
    remove(path)
    assert list(tmp_path.iterdir()) == []


def test_new_folders_are_flushed_into_their_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("eoracc.compiler.kept.files.sync_path", flushed.append)
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path / "a", tmp_path]
    make_folder(tmp_path / "a" / "b")
    assert len(flushed) == 2


def test_what_is_below_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DamagedError, match=r"^is missing$"):
        read_file(tmp_path / "file" / "below")


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, bool]] = []
    path = tmp_path / "a"
    fsync = os.fsync

    def record(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        done.append((name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    replace_file(path, b"content")
    assert done == [("a.partial", False), (tmp_path.name, True)]
    assert read_file(path) == b"content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "a"
    replace_file(path, b"old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArtifactError, match=rf"^{path}: .* {os.strerror(number)}: free some space"):
        replace_file(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_a_failure_of_safetensors_is_said_in_the_words_of_the_system(tmp_path: Path) -> None:
    for text, problem in (
        ("I/O error: No space left on device (os error 28)", "No space left on device"),
        ("something else", "something else"),
    ):
        with (
            pytest.raises(ArtifactError, match=rf"kept there: {problem}: free some space"),
            keeping(tmp_path),
        ):
            raise SafetensorError(text)


def test_an_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "a", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_by_a_file_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a.partial" / "b").mkdir(parents=True)
    (tmp_path / "target").write_text("stays")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("a", "link"):
        replace_file(tmp_path / name, b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "link", "target"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "target").read_text() == "stays"
