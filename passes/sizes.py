"""Sizes of a folder in model.yaml: ``90MB``, ``1.2GB``, ``64MiB``, or a number of bytes."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from eoracc.printable import quoted

__all__ = ["Size", "parse_size"]

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]i?B|B|)", re.ASCII)


def parse_size(value: object) -> int:
    """The bytes of a size, rounded down.

    Args:
      value: a number of bytes, or a text with a unit.

    Raises:
      ValueError: it is neither, or below one byte; the message is one sentence.

    >>> parse_size("88.2MB"), parse_size("1.5 GiB"), parse_size(4096)
    (88200000, 1610612736, 4096)
    """
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if match is not None and match[2] in _UNITS:
        whole, _, fraction = match[1].partition(".")
        # In integers: 88.2 is no binary fraction.
        scale = 10 ** len(fraction)
        nbytes: int = int(whole + fraction) * _UNITS[match[2]] // scale
        if nbytes >= 1:
            return nbytes
    raise ValueError(
        f"{quoted(value)} is no size: give a number with a unit, 90MB, 1.2GB or 64MiB, or a number "
        "of bytes"
    )


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]
"""Bytes in model.yaml, in the form of :func:`parse_size`."""
