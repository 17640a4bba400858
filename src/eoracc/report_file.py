"""The form of report.json: short, and still a line for each linear.

A report has a dozen figures for each of some hundred linears, in a folder that is shipped. Its
numbers are measurements, and seven digits say more than any of them is good for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["encode_report"]

_DIGITS = 7


def encode_report(content: Mapping[str, Any]) -> bytes:
    """The text of report.json; equal content gives equal bytes, and so does content read back.

    Each part of the report begins a line, and so does each entry of a part that is a list.

    Raises:
      ValueError: a number is NaN or infinite.

    >>> print(encode_report({"linears": [{"error": 0.12345678}, {"error": 1e-9}]}).decode(), end="")
    {"linears":[
    {"error":0.1234568},
    {"error":1e-09}]}
    """
    parts = (f"{_text(name)}:{_part(value)}" for name, value in content.items())
    return ("{" + ",\n".join(parts) + "}\n").encode()


def _part(value: object) -> str:
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join(map(_text, value)) + "]"
    return _text(value)


def _text(value: object) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _rounded(value: object) -> object:
    """``value`` with its floats rounded."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value
