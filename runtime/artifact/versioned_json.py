"""JSON files that name their format and schema version."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from eoracc.documents import VOCABULARY_BYTES, Reader
from eoracc.errors import ArtifactError
from eoracc.printable import printable

__all__ = ["check_versioned", "is_file_name", "is_inside", "read_versioned"]

_READER = Reader(ArtifactError, "build the artifact again")


def read_versioned(
    path: Path, *, file_format: str, schema: int, missing: str, foreign: str
) -> dict[str, Any]:
    """Read a file and check its format and schema.

    Args:
      path: of the file.
      file_format: required value of ``format``.
      schema: required value of ``schema``.
      missing: error text for a missing file.
      foreign: error text for a file of another format, without its path.

    Raises:
      ArtifactError: the file is missing, no JSON, or of another format or schema.
    """
    if not path.exists():
        raise ArtifactError(missing)
    content = _READER.read_json(path, limit=VOCABULARY_BYTES)
    return check_versioned(content, path, file_format=file_format, schema=schema, foreign=foreign)


def check_versioned(
    content: object, path: Path, *, file_format: str, schema: int, foreign: str
) -> dict[str, Any]:
    """Check the format and schema of ``content``, read from ``path``.

    Raises:
      ArtifactError: one of them differs.
    """
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise ArtifactError(f"{path}: {foreign}")
    if content.get("schema") != schema:
        raise ArtifactError(
            f"{path}: has schema {printable(content.get('schema'))}, this eoracc reads {schema}: "
            "use the eoracc that built it, or build again"
        )
    return content


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a plain file name, without any folder."""
    return PurePosixPath(name).name == name and "\\" not in name and name not in ("", "..")


def is_inside(name: str) -> bool:
    """Whether ``name`` is a path below its folder, in the one form with forward slashes."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and str(path) == name
    )
