"""A model.yaml with its assignments, so that an error can name the place of a mistake."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eoracc.compiler.config.yaml_tree import KeyPath, dotted, read_yaml
from eoracc.documents import Reader
from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Document", "suggest"]

_READER = Reader(ConfigError, "give the model.yaml of a build")
_MAX_BYTES = 1 << 20
_WORD_CHARS = 80


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` if a known word is similar, else the list of known words.

    >>> suggest("smaples", ["samples", "seed"])
    "did you mean 'samples'?"
    >>> suggest("foo", ["samples", "seed"])
    'known here: samples, seed'
    """
    known = list(known)
    near = difflib.get_close_matches(word[:_WORD_CHARS], known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known) or 'nothing'}"


@dataclass
class Document:
    """A YAML file as plain data.

    Attributes:
      path: the file, for messages.
      data: the top-level mapping.
      lines: the line, counted from 1, of every key and list item.
      overrides: assignments of ``--set`` as on the command line, by the path that they changed.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read ``path``.

        Raises:
          ConfigError: it cannot be read, is no YAML mapping, or has a key twice.
        """
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file: give a model.yaml")
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder: give the model.yaml in it")
        data, lines = read_yaml(_READER.read_text(path, limit=_MAX_BYTES), path)
        if data is None:
            raise ConfigError(f"{path}: is empty: give at least model, passes and output")
        if not isinstance(data, dict):
            raise ConfigError(f"{path}:1: must be a mapping of keys to values")
        return cls(path, data, lines)

    def where(self, path: KeyPath) -> str:
        """``model.yaml:12``, or ``--set x=y`` for a value from the command line."""
        noted = self._noted(path)
        if noted in self.overrides:
            return f"--set {self.overrides[noted]}"
        return f"{self.path}:{self.lines[noted]}" if noted else str(self.path)

    def line(self, path: KeyPath) -> int:
        """The line of ``path``; 0 for the command line and for the file as a whole."""
        return self.lines.get(self._noted(path), 0)

    def _noted(self, path: KeyPath) -> KeyPath:
        """The longest prefix of ``path`` whose place is known."""
        ends = range(len(path), 0, -1)
        known = (path[:end] for end in ends)
        return next((p for p in known if p in self.overrides or p in self.lines), ())

    def override(self, assignment: str) -> None:
        """Apply one ``path=value``; the value is YAML.

        A list item is named by its position, or by its key if it is a mapping of one key, as passes
        are: ``passes.2.eora.rank`` or ``passes.eora.rank``.

        Raises:
          ConfigError: the text is no assignment, or its path does not exist.
        """
        target, equals, text = assignment.partition("=")
        parts = [part.strip() for part in target.split(".")]
        if not equals or not all(parts):
            raise ConfigError(f"--set {assignment}: give it as path=value, calibration.samples=16")
        try:
            value, _ = read_yaml(text, "the value")
        except ConfigError:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from None
        parent: Any = self.data
        path: KeyPath = ()
        while True:
            key: str | int = parts.pop(0)
            if isinstance(parent, list):
                index, named = self._item(assignment, parent, str(key), path)
                if named:  # go to the item first, then into it by its key
                    parts.insert(0, str(key))
                if parts and isinstance(parent[index], str):
                    parent[index] = {parent[index]: None}
                key = index
            elif not isinstance(parent, dict):
                raise ConfigError(
                    f"--set {assignment}: '{dotted(path)}' is a single value and has no '{key}'"
                )
            path = (*path, key)
            if not parts:
                break
            if isinstance(parent, dict) and parent.get(key) is None:
                parent[key] = {}
            parent = parent[key]
        parent[key] = value
        self.overrides[path] = assignment

    @staticmethod
    def _item(assignment: str, items: Sequence[Any], part: str, path: KeyPath) -> tuple[int, bool]:
        """Position of the item that ``part`` names, and whether ``part`` is its key."""
        if part.isdigit():
            if int(part) < len(items):
                return int(part), False
            raise ConfigError(
                f"--set {assignment}: '{dotted(path)}' has {len(items)} items, counted from 0"
            )
        names = [next(iter(item), "") if isinstance(item, dict) else str(item) for item in items]
        matches = [index for index, name in enumerate(names) if name == part]
        if not matches:
            raise ConfigError(
                f"--set {assignment}: '{dotted(path)}' has no '{part}': {suggest(part, names)}"
            )
        if len(matches) > 1:
            places = " or ".join(dotted((*path, index, part)) for index in matches)
            raise ConfigError(f"--set {assignment}: '{part}' occurs there twice: give {places}")
        return matches[0], True
