from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from eoracc.log_lines import JsonLines, LogFormat, TextLines, log_lines

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\n2026-01-01T00:00:00.000+00:00 INFO all is well",
    '\r\n{"status": 200}',
    "a\u2028b\u202ec\x85d\u200be\ud800f",
    'quote " and \\ and = and [bold]red[/]',
    "",
]


def record(message: str, fields: dict[str, Any] | None = None) -> logging.LogRecord:
    made = logging.LogRecord("test", logging.WARNING, __file__, 1, message, (), None)
    made.created = 1764000000.5
    if fields is not None:
        made.fields = fields
    return made


def failed(message: str) -> logging.LogRecord:
    made = record("request failed")
    try:
        raise ValueError(message)
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def is_one_line(text: str) -> bool:
    return text.isprintable() and len(text.splitlines()) == 1


@pytest.mark.parametrize("hostile", HOSTILE)
def test_json_stays_one_line_with_the_values(hostile: str) -> None:
    form = JsonLines()
    for made in (record(hostile), record("", {"name": hostile, hostile or "x": 1})):
        text = form.format(made)
        assert is_one_line(text)
        assert text.isascii()
        assert hostile in json.loads(text).values()
    text = form.format(failed(hostile))
    assert is_one_line(text)
    assert hostile in json.loads(text)["error"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_cannot_be_forged(hostile: str) -> None:
    form = TextLines()
    start = "2025-11-24T16:00:00.500+00:00 WARNING "
    for made in (record(hostile), record("", {"name": hostile, "status": 200})):
        text = form.format(made)
        assert is_one_line(text)
        assert text.startswith(start)
    first, *trace = form.format(failed(hostile)).split("\n")
    assert first == f"{start}request failed"
    assert all(line.startswith("    ") and line.isprintable() for line in trace)


def test_fields_of_text() -> None:
    fields = {"id": "a-1", "name": "b c", "status": 200, "code": None, "adapter": {"math": 0.5}}
    line = TextLines().format(record("request", fields))
    assert line.endswith('WARNING id=a-1 name="b c" status=200 code=null adapter={"math":0.5}')


@pytest.mark.parametrize(("form", "kind"), [("text", TextLines), ("json", JsonLines)])
def test_forms(form: LogFormat, kind: type[logging.Formatter]) -> None:
    assert type(log_lines(form)) is kind
