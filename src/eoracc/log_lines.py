"""Log records as lines for people or for programs, which no text inside can forge.

A record may have ``fields``, a mapping, in place of a message::

    logger.info("request", extra={"fields": {"id": "b81c", "status": 200}})

Whatever a client, a file name or an exception puts into a value, a record stays one line of JSON,
or one line of text and indented ones below it, without control characters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from typing_extensions import override

from eoracc.printable import escape_controls

__all__ = ["JsonLines", "LogFormat", "TextLines", "log_lines"]

LogFormat: TypeAlias = Literal["text", "json"]
"""``text`` for people, ``json`` for programs."""


class JsonLines(logging.Formatter):
    """One JSON object a record: ``time``, ``level``, and its fields or its ``message``.

    A record with an exception has its trace as ``error``.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower()}
        content |= _fields(record) or {"message": record.getMessage()}
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class TextLines(logging.Formatter):
    """Time, level, and the fields as ``name=value`` or the message; a trace follows, indented."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        text = " ".join(f"{name}={_value(value)}" for name, value in fields.items())
        line = f"{_time(record)} {record.levelname} {text or escape_controls(record.getMessage())}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"    {escape_controls(part)}" for part in trace)])


def log_lines(form: LogFormat) -> logging.Formatter:
    """The formatter of a form."""
    return JsonLines() if form == "json" else TextLines()


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _value(value: object) -> str:
    """A value of a field, in quotes where it could be read as something else."""
    if isinstance(value, str):
        plain = value.isprintable() and value and not set(value) & set(' "=\\')
        return value if plain else json.dumps(value)
    return json.dumps(value, default=str, separators=(",", ":"))
