from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from eoracc.compiler.commands.observing import observing
from eoracc.compiler.kept.folder import KeptFolder
from eoracc.errors import ArtifactError
from tests.damage import DAMAGES


@pytest.fixture
def kept(tmp_path: Path) -> KeptFolder:
    """Two records, ``a`` and ``b``, that name a file each."""
    kept = KeptFolder(tmp_path / "some" / "work", "key")
    for place, name in enumerate(("a", "b")):
        arrays = {"values": np.arange(300) + place}
        kept.put(f"deep/{name}.safetensors", partial(save_file, arrays))
        kept.write(f"{name}.json", kept.seal([f"deep/{name}.safetensors"]))
    return kept


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_sound_work_is_used_without_a_word(
    kept: KeptFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        files = kept.read(f"{name}.json")
        assert files is not None
        assert kept.holds(files)
    assert kept.read("c.json") is None
    assert lines(caplog) == []


def test_a_record_reaches_nothing_outside_its_folder(kept: KeptFolder) -> None:
    outside = kept.path.parent / "text.txt"
    outside.write_text("mine")
    for name in ("../text.txt", str(outside), "deep/../../text.txt", ".", ""):
        assert not kept.holds([{"name": name, "size": 0, "sha256": ""}])
    assert outside.read_text() == "mine"
    assert kept.holds(kept.read("a.json") or [])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["a.json", "deep/a.safetensors"])
def test_damaged_work_is_discarded_with_one_line(
    kept: KeptFolder, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    path = kept.path / name
    DAMAGES[damage](path)
    files = kept.read("a.json")
    assert files is None or not kept.holds(files)
    assert not path.is_symlink()
    assert not path.exists()
    deleted_record = name == "a.json" and damage == "deleted"
    assert len(lines(caplog)) == (0 if deleted_record else 1)
    for line in lines(caplog):
        assert line.startswith(f"{path} ")
        assert line.endswith(": it is discarded, and computed again")
    # The rest is as it was.
    others = kept.read("b.json")
    assert others is not None
    assert kept.holds(others)


def test_work_of_another_key_is_discarded_with_one_line(
    kept: KeptFolder, caplog: pytest.LogCaptureFixture
) -> None:
    other = KeptFolder(kept.path, "another key")
    assert other.read("a.json") is other.read("b.json") is None
    (line,) = lines(caplog)
    assert line == (
        f"{kept.path} was kept for another model, model.yaml, text or version of eoracc: "
        "it is discarded, and computed again"
    )
    assert not kept.path.exists()


def test_work_of_an_earlier_version_is_discarded_with_one_line(
    kept: KeptFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.json", "b.json"):
        (kept.path / name).write_text('{"key": "key", "operands": []}')
    assert kept.read("a.json") is kept.read("b.json") is None
    assert lines(caplog) == [
        f"{kept.path} was kept by another version of eoracc: it is discarded, and computed again"
    ]
    assert not kept.path.exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "work"
    path.touch()
    kept = KeptFolder(path, "key")
    assert kept.read("a.json") is None
    assert lines(caplog) == [f"{path} is not a folder: it is discarded, and computed again"]
    kept.write("a.json", 1)
    assert kept.read("a.json") == 1


def test_a_parent_that_is_a_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = KeptFolder(tmp_path / "file" / "work", "key")
    assert kept.read("a.json") is None
    with pytest.raises(ArtifactError, match="cannot be kept there: Not a directory: free"):
        kept.write("a.json", 1)


def test_a_folder_that_cannot_be_looked_into_is_refused_in_one_sentence(
    kept: KeptFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ArtifactError, match=rf"^{kept.path}: .* Permission denied: free"):
        kept.read("a.json")


def test_files_that_no_record_names_are_removed(kept: KeptFolder) -> None:
    (kept.path / "a.json.partial").touch()
    kept.keep_only({"a.json", "deep"})
    assert sorted(path.name for path in kept.path.iterdir()) == ["a.json", "deep"]


def test_files_are_on_disk_before_the_record_that_names_them(
    kept: KeptFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def record(path: Path) -> None:
        flushed.append(path.name)

    monkeypatch.setattr("eoracc.compiler.kept.folder.sync_path", record)
    kept.seal(["deep/a.safetensors", "deep/b.safetensors"])
    assert flushed == ["a.safetensors", "b.safetensors", "deep"]


def test_commands_print_the_line(kept: KeptFolder, capsys: pytest.CaptureFixture[str]) -> None:
    path = kept.path / "a.json"
    for log_format in ("text", "json"):
        path.write_bytes(b"")
        with observing(None, log_format, quiet=True):
            kept.read("a.json")
    text, discarded, _ = capsys.readouterr().err.splitlines()
    assert text == f"{path} is empty: it is discarded, and computed again"
    fields = json.loads(discarded)
    assert fields["message"] == text
    assert (fields["event"], fields["path"], fields["problem"]) == (
        "discarded",
        str(path),
        "is empty",
    )
