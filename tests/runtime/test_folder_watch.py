"""A loaded model lives on what it loaded, and a change of its folder is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eoracc.runtime import RequestError, load
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, read_manifest
from eoracc.runtime.folder_watch import FolderWatch
from tests.runtime.folder_changes import (
    CHANGES,
    add,
    build_again,
    build_again_and_remove,
    copy_over,
)

ASKS: tuple[dict[str, Any], ...] = (
    {"adapter": {"math": 0.7}},
    {"adapter": {"math": 0.5, "prose": -1.5}},
    {"adapter": "math"},
    {"adapter": None},
    {"adapter": None, "chat": True},
)


@pytest.fixture
def folder(adapted_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapted_artifact, tmp_path / "artifact")


@pytest.fixture(scope="module")
def wanted(adapted_artifact: Path) -> list[tuple[int, ...]]:
    """Answers of a model whose folder does not change."""
    model = load(adapted_artifact, threads=1, own_memory=True)
    answers = [model.generate("b c", 12, ignore_end=True, **ask).tokens for ask in ASKS]
    assert len(set(answers)) == len(ASKS)
    return answers


@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_answers_after_a_change_are_those_of_what_was_loaded(
    folder: Path, wanted: list[tuple[int, ...]], change: Callable[[Path], None], text: str
) -> None:
    model = load(folder, threads=1, own_memory=True)
    assert model.folder_watch.check() is None
    change(folder)
    assert [model.generate("b c", 12, ignore_end=True, **ask).tokens for ask in ASKS] == wanted
    found = model.folder_watch.check()
    assert found is not None
    assert found.text.startswith(text)


def test_mapped_weights_outlive_another_build(folder: Path, wanted: list[tuple[int, ...]]) -> None:
    model = load(folder, threads=1)
    build_again_and_remove(folder)
    assert [model.generate("b c", 12, ignore_end=True, **ask).tokens for ask in ASKS] == wanted


@pytest.mark.parametrize("change", [build_again, copy_over, add])
def test_an_adapter_that_only_the_changed_folder_has(
    folder: Path, change: Callable[[Path], None]
) -> None:
    model = load(folder, threads=1, own_memory=True)
    with pytest.raises(RequestError, match="the artifact has no such adapter"):
        model.generate("b", 1, adapter="poetry")
    change(folder)
    for adapter in ("poetry", {"math": 0.5, "poetry": 0.5}):
        with pytest.raises(RequestError, match=r"folder, which has changed.*restart"):
            model.generate("b", 1, adapter=adapter)
    with pytest.raises(RequestError, match="which has changed"):
        model.score("b c", adapter="poetry")
    with pytest.raises(RequestError, match="the artifact has no such adapter"):
        model.generate("b", 1, adapter="verse")


def test_the_same_content_is_no_change(folder: Path) -> None:
    watch = FolderWatch(folder, read_manifest(folder))
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert watch.check() is None
    (folder / "report.json").write_text("{}")  # no model reads it
    assert watch.check() is None


def test_a_change_that_is_taken_back(folder: Path) -> None:
    watch = FolderWatch(folder, read_manifest(folder))
    manifest = folder / MANIFEST_FILE
    content = manifest.read_bytes()
    manifest.write_bytes(b"{")
    found = watch.check()
    assert found is not None
    assert found.text.startswith("holds no artifact any more")
    manifest.write_bytes(content)
    assert watch.check() is None


def test_a_look_reads_no_file_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = FolderWatch(folder, read_manifest(folder))
    add(folder)
    assert watch.check() is not None

    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("eoracc.runtime.folder_watch.read_manifest", read)
    monkeypatch.setattr("eoracc.runtime.folder_watch.describe_file", read)
    assert watch.check() is not None
