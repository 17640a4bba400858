"""YAML within bounds, with the line of every key and list item.

PyYAML's safe loader makes plain values only. What it leaves open is bounded here: the depth, and
the size that a text has once its aliases are expanded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from eoracc.errors import ConfigError, reason
from eoracc.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["KeyPath", "dotted", "read_yaml"]

KeyPath = tuple[str | int, ...]
"""The path of a value: ``("passes", 2, "eora", "rank")``."""

_MAX_DEPTH = 50
_MAX_NODES = 50_000
"""Most keys and values, aliases expanded; a model.yaml has some hundreds."""


def dotted(path: Iterable[str | int]) -> str:
    """``passes.2.eora.rank``, as ``--set`` takes it."""
    return ".".join(printable(part, _KEY_CHARS) for part in path)


_KEY_CHARS = 80


def read_yaml(text: str, place: object) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a YAML text, and the line, counted from 1, of every key and list item.

    Args:
      text: one document.
      place: file or option that it comes from, for errors.

    Raises:
      ConfigError: it is not valid YAML, too deep or too large, or has a key twice.
    """
    lines: dict[KeyPath, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, lines
            _Walk(place, loader, lines).visit(node, (), ())
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        at = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = printable(error.problem)
    except yaml.reader.ReaderError as error:
        at = f":{text.count(chr(10), 0, error.position) + 1}"
        problem = f"the character U+{error.character:04X} is not allowed"
    except RecursionError:
        at, problem = "", "it is nested too deeply"
    # Escapes of no character, and values such as dates that do not exist.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        at, problem = "", reason(error)
    raise ConfigError(f"{place}{at}: is not valid YAML: {problem}")


class _Walk:
    """Notes the lines of a tree of nodes, and refuses what goes beyond the bounds."""

    def __init__(self, place: object, loader: yaml.SafeLoader, lines: dict[KeyPath, int]) -> None:
        self._place, self._loader, self._lines = place, loader, lines
        self._nodes = 0

    def visit(self, node: yaml.Node, path: KeyPath, parents: tuple[int, ...]) -> None:
        """Visit ``node`` and everything under it.

        Args:
          node: of the tree.
          path: of ``node``.
          parents: identities of the nodes around it.
        """
        line = node.start_mark.line + 1
        self._nodes += 1
        if id(node) in parents:
            self._refuse(line, "an alias that contains itself")
        if len(parents) >= _MAX_DEPTH:
            self._refuse(line, f"is nested more than {_MAX_DEPTH} levels deep")
        if self._nodes > _MAX_NODES:
            self._refuse(line, f"has more than {_MAX_NODES:,} values, those of aliases included")
        inside = (*parents, id(node))
        if isinstance(node, yaml.MappingNode):
            self._visit_mapping(node, path, inside)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines[(*path, index)] = item.start_mark.line + 1
                self.visit(item, (*path, index), inside)
        else:
            self._check_scalar(node, path)

    def _visit_mapping(
        self, node: yaml.MappingNode, path: KeyPath, inside: tuple[int, ...]
    ) -> None:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(line, "a key must be a single word")
            key = key_node.value
            if key in seen:
                self._refuse(
                    line,
                    f"{dotted((*path, key))}: occurs twice, first in line {seen[key]}: keep one",
                )
            seen[key] = self._lines[(*path, key)] = line
            self._check_scalar(key_node, (*path, key))
            self.visit(value_node, (*path, key), inside)

    def _check_scalar(self, node: yaml.Node, path: KeyPath) -> None:
        line = node.start_mark.line + 1
        try:
            value = self._loader.construct_object(node)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            self._refuse(line, f"{dotted(path)}: is no value: {reason(error)}")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            self._refuse(line, f"{dotted(path)}: holds half a surrogate pair, which is no text")

    def _refuse(self, line: int, problem: str) -> NoReturn:
        raise ConfigError(f"{self._place}:{line}: {problem}")
