"""JSON files that say what they are: a format, and a schema that only some versions read."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from eoracc.errors import ArtifactError

__all__ = ["check_versioned", "is_file_name", "read_versioned"]


def read_versioned(
    path: Path, *, file_format: str, schema: int, missing: str, foreign: str
) -> dict[str, Any]:
    """Read a file, and see that it is of ``file_format`` and ``schema``.

    Args:
      path: of the file.
      file_format: what it must say that it is.
      schema: the one that is read.
      missing: the whole message where there is no file.
      foreign: what is wrong with a file of another format, for behind its path.

    Raises:
      ArtifactError: it is missing, no JSON, of another format or schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(missing) from None
    except (OSError, ValueError):
        raise ArtifactError(f"{path}: cannot be read as JSON: build the artifact again") from None
    return check_versioned(content, path, file_format=file_format, schema=schema, foreign=foreign)


def check_versioned(
    content: object, path: Path, *, file_format: str, schema: int, foreign: str
) -> dict[str, Any]:
    """See that what was read at ``path`` is of ``file_format`` and ``schema``.

    Raises:
      ArtifactError: it is not.
    """
    if not isinstance(content, dict) or content.get("format") != file_format:
        raise ArtifactError(f"{path}: {foreign}")
    if content.get("schema") != schema:
        raise ArtifactError(
            f"{path}: has schema {content.get('schema')}, this eoracc reads {schema}: use the "
            "eoracc that built it, or build again"
        )
    return content


def is_file_name(name: str) -> bool:
    """Whether ``name`` is that of a file in the folder it is read in, and leads nowhere else."""
    return PurePosixPath(name).name == name and "\\" not in name and name not in ("", "..")
