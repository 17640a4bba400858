from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.documents import MAX_DEPTH, Reader
from eoracc.errors import ArtifactError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

READER = Reader(ArtifactError, "build it again")


class PanicException(BaseException):
    """As the Rust libraries raise it: not an ``Exception``."""


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def refused(path: Path, reader: Reader = READER, **options: int) -> str:
    """The problem that the error names, between the path and the way out."""
    with pytest.raises(ArtifactError) as caught:
        reader.read_json(path, **options)
    found = re.fullmatch(f"{re.escape(str(path))}: (.*): build it again", str(caught.value))
    assert found is not None, caught.value
    return found[1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a":\n1,', "line 2: is not valid JSON (Expecting property name"),
        (b'{"a": 1} x', "is not valid JSON (Extra data)"),
        (b'{"a":\n"\xff"}', "line 2: is not UTF-8 text (byte 7)"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b'["\\ud800"]', "holds half a surrogate pair, in '\\ud800'"),
        (b'"\\udfff"', "holds half a surrogate pair, in '\\udfff'"),
        (b'{"\\udfff": 1}', "holds half a surrogate pair, in '\\udfff'"),
        (b"[NaN]", "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b"[1e999]", "holds 1e999, which is too large"),
        (b"9" * 5000, "holds a number of 5,000 digits"),
        (nested(MAX_DEPTH + 1).encode(), "is nested more than 100 levels deep"),
        (nested(100_000).encode(), "is nested more than 100 levels deep"),
        (b'{"a":' * 50_000, "is nested more than 100 levels deep"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_each_mistake_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    assert refused(path).startswith(problem)


def test_what_is_no_mistake_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    texts = {"pair": "\U0001f600", "model_max_length": 10**30, "small": 1e-320, "deep": [[]]}
    path.write_text(json.dumps(texts))
    assert READER.read_object(path) == texts
    path.write_text(nested(MAX_DEPTH))
    assert READER.read_json(path) == json.loads(nested(MAX_DEPTH))
    path.write_text('{"a": 1, "a": 2}')
    assert READER.read_object(path) == {"a": 2}


def test_constants_are_read_where_they_are_allowed() -> None:
    reader = Reader(ArtifactError, "build it again", constants=True)
    assert reader.parse("[Infinity, -1e999]", "config.json") == [float("inf"), float("-inf")]
    with pytest.raises(ArtifactError, match="5,000 digits"):
        reader.parse("9" * 5000, "config.json")
    reader = Reader(ArtifactError, "build it again", half_pairs=True)
    assert reader.parse('["\\ud800"]', "t.jsonl:1") == ["\ud800"]


def test_the_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(b"1" * 11)
    assert refused(path, limit=10) == "has more than 10 bytes, the limit for such a file"
    assert READER.read_bytes(path, limit=11) == b"1" * 11


def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent") == "is missing"
    assert refused(tmp_path) == "is a folder"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refused(pipe) == "is no regular file"
    with pytest.raises(ArtifactError, match="is no path"):
        READER.read_json(tmp_path / "a\0b")


def test_another_kind_of_value_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for text, kind in (("[]", "a list"), ('"a"', "a text"), ("null", "null"), ("1", "a number")):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=f"is {kind} where a JSON object is expected"):
            READER.read_object(path)


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes("a\r\nb\rcä\n".encode())
    assert READER.read_text(path) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [ValueError("bad\nthing"), PanicException("bad thing")])
def test_what_a_library_raises_names_its_file(error: BaseException) -> None:
    with (
        pytest.raises(ArtifactError) as caught,
        READER.refusing("t.json", "is no tokenizer"),
    ):
        raise error
    assert str(caught.value) == "t.json: is no tokenizer (bad thing): build it again"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RequestError("busy")])
def test_other_ends_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)), READER.refusing("t.json", "is no tokenizer"):
        raise error


def test_fields_of_another_form_name_their_file() -> None:
    values: list[Any] = [{}, [], None, {"a": {}}, {"a": "x"}, {"a": 10**400}]
    for value in values:
        with (
            pytest.raises(ArtifactError, match=r"^t\.json: has no a: build it again$"),
            READER.refusing_form("t.json", "has no a"),
        ):
            float(value["a"])
