from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.kept.files import DamagedError
from eoracc.compiler.kept.record import ForeignError, Record, read_record, write_record

if TYPE_CHECKING:
    from pathlib import Path

RECORD = Record("key", {"errors": [0.1, 1e-300], "name": "ö", "none": None})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    write_record(path, RECORD)
    return path


def test_a_record_comes_back_and_is_json(path: Path) -> None:
    assert read_record(path) == RECORD
    assert json.loads(path.read_bytes())["kept"]["content"] == RECORD.content


def test_every_flipped_bit_and_every_cut_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        for data in (damaged, content[:place]):
            path.write_bytes(data)
            # A short piece of the beginning looks like the file of another version.
            with pytest.raises((DamagedError, ForeignError) if len(data) < 12 else DamagedError):
                read_record(path)


def test_the_record_of_another_file_is_noticed(path: Path) -> None:
    other = path.with_name("b.json")
    other.write_bytes(path.read_bytes())
    with pytest.raises(DamagedError, match=r"^has the content of a\.json$"):
        read_record(other)


@pytest.mark.parametrize("content", ['{"key": "key", "found": {}}', "{}"])
def test_json_of_another_form_is_foreign(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(ForeignError):
        read_record(path)


def test_nothing_is_parsed_before_it_is_compared(path: Path) -> None:
    """A damaged file may hold what takes a parser forever, or its whole stack."""
    content = path.read_bytes()
    path.write_bytes(content[:90] + b"[" * 100_000)
    with pytest.raises(DamagedError, match="another content"):
        read_record(path)
