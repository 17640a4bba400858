"""Rows of a long benchmark, saved one by one so that an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["KeptRows"]

RowT = TypeVar("RowT", bound="DataclassInstance")


class KeptRows(Generic[RowT]):
    """The rows of a JSON file ``{"rows": [...]}``, rewritten with every new row."""

    def __init__(self, path: Path | None, row_type: type[RowT]) -> None:
        """Read the rows of an earlier run.

        Args:
          path: the file, which need not exist yet; None keeps rows in memory only.
          row_type: a dataclass whose fields JSON can hold.
        """
        self._path = path
        self._rows: list[RowT] = []
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self._rows = [row_type(**row) for row in content["rows"]]

    def __iter__(self) -> Iterator[RowT]:
        return iter(self._rows)

    def add(self, row: RowT) -> None:
        """Append a row and replace the file atomically."""
        self._rows.append(row)
        if self._path is not None:
            content = {"rows": [asdict(row) for row in self._rows]}
            partial = self._path.with_name(f"{self._path.name}.partial")
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(self._path)
