from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.kept_rows import KeptRows


@dataclass(frozen=True)
class Figure:
    name: str
    value: float


def test_rows_are_there_again_for_whoever_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = KeptRows(path, Figure)
    assert list(rows) == []
    rows.add(Figure("one", 1.5))
    # Kept at once, not in the end.
    assert list(KeptRows(path, Figure)) == [Figure("one", 1.5)]
    again = KeptRows(path, Figure)
    again.add(Figure("two", 2.0))
    assert list(KeptRows(path, Figure)) == list(again) == [Figure("one", 1.5), Figure("two", 2.0)]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_without_a_file_rows_are_in_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = KeptRows(None, Figure)
    rows.add(Figure("one", 1.5))
    assert list(rows) == [Figure("one", 1.5)]
    assert list(tmp_path.iterdir()) == []
