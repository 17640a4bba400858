from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.eager.run_files import RunFiles
from eoracc.compiler.kept.interval import SaveInterval

if TYPE_CHECKING:
    from pathlib import Path


def _values(path: Path) -> None:
    path.write_bytes(b"values")


def started(folder: Path) -> RunFiles:
    """A run whose forward pass has written two files."""
    files = RunFiles(folder, "key")
    files.resume()
    assert files.left is None
    for name in ("hidden-0", "hidden-1"):
        files.put(name, _values)
    return files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_that_the_saved_state_names_stay_until_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = started(tmp_path)
    monkeypatch.setattr(SaveInterval, "is_due", True)
    files.finish(2, ())
    monkeypatch.setattr(SaveInterval, "is_due", False)
    for name in ("gradient-1", "gradient-0"):
        files.put(name, _values)
    files.finish(1, {"hidden-1", "gradient-1"})
    assert names(tmp_path) == ["gradient-0", "hidden-0", "hidden-1", "state.json"]
    again = RunFiles(tmp_path, "key")
    again.resume()
    assert (again.left, again.is_left(1), again.is_left(2)) == (2, True, False)
    files.finish(0, {"hidden-0"})
    assert names(tmp_path) == ["gradient-0", "state.json"]
    again.resume()
    assert again.left == 0


@pytest.mark.parametrize("key", ["key", "another"])
def test_damage_or_another_key_begins_anew(tmp_path: Path, key: str) -> None:
    started(tmp_path / "run").finish(0, {"hidden-1"})
    if key == "key":
        (tmp_path / "run" / "hidden-0").write_bytes(b"valueZ")
    again = RunFiles(tmp_path / "run", key)
    again.resume()
    assert again.left is None
    assert not (tmp_path / "run").exists()
