"""The bytes of files together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["files_bytes", "folder_bytes"]


def files_bytes(paths: Iterable[Path]) -> int:
    """Bytes of those of ``paths`` that are files; folders among them count nothing."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of ``folder``, at any depth."""
    return files_bytes(folder.rglob("*"))
