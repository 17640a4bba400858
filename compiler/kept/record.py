"""JSON files of kept work, each with a digest of itself.

The form is ``{"sha256": DIGEST, "kept": {"name": …, "key": …, "content": …}}``. The digest covers
the bytes of the value of ``kept`` and is compared before they are parsed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eoracc.compiler.kept.files import DamagedError, read_file, replace_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ForeignError", "Record", "read_record", "write_record"]

_OPENING = b'{"sha256": "'
_BEFORE = b'", "kept": '
_CLOSING = b"}\n"
_DIGITS = 64


class ForeignError(Exception):
    """A file that another version of eoracc has written."""


@dataclass(frozen=True)
class Record:
    """The content of a record.

    Attributes:
      key: digest of everything that the content depends on.
      content: what JSON can hold.
    """

    key: str
    content: Any


def write_record(path: Path, record: Record) -> None:
    """Replace a record, so that a power loss leaves the old one or the new one.

    Raises:
      ArtifactError: the disk is full, fails or is read-only; the old record is as it was.
    """
    body = json.dumps({"name": path.name, "key": record.key, "content": record.content}).encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    replace_file(path, _OPENING + digest + _BEFORE + body + _CLOSING)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
      DamagedError: it is missing, unreadable, not as it was written, or a copy of another file's.
      ForeignError: it is JSON of another form.
    """
    data = read_file(path)
    digest_end = len(_OPENING) + _DIGITS
    body_begin = digest_end + len(_BEFORE)
    # One flipped bit leaves one of the two in place.
    has_form = data.startswith(_OPENING) or data[digest_end:body_begin] == _BEFORE
    if data.startswith(b"{") and not has_form:
        raise ForeignError
    if not data:
        raise DamagedError("is empty")
    body = data[body_begin : -len(_CLOSING)]
    digest = hashlib.sha256(body).hexdigest().encode()
    if data != _OPENING + digest + _BEFORE + body + _CLOSING:
        raise DamagedError("has another content than was kept")
    kept = json.loads(body)
    if kept["name"] != path.name:
        raise DamagedError(f"has the content of {kept['name']}")
    return Record(kept["key"], kept["content"])
