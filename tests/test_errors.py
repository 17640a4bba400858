"""The exception tree of the docstring is that of the classes."""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING

from eoracc import errors
from eoracc.errors import EoraccError
from tests.modules import modules
from tests.optional import require

if TYPE_CHECKING:
    from collections.abc import Iterator

# A class, its parent's, and the exit code of a command that it ends.
Entry = tuple[str, str, int]

LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>\w+Error) +(?P<text>.+)$", re.MULTILINE)


def drawn() -> list[Entry]:
    """The tree of the docstring; a class without an exit code has its parent's."""
    entries: list[Entry] = []
    parents: list[tuple[str, int]] = []
    for line in LINE.finditer(errors.__doc__ or ""):
        depth = len(line["branch"]) // 4
        parent, inherited = parents[depth - 1] if depth else ("Exception", 0)
        stated = re.match(r"exit code (\d+):", line["text"])
        code = int(stated[1]) if stated else inherited
        entries.append((line["name"], parent, code))
        parents[depth:] = [(line["name"], code)]
    return entries


def defined(kind: type[EoraccError], parent: str) -> Iterator[Entry]:
    """``kind`` and its subclasses in the package."""
    yield kind.__name__, parent, kind.exit_code
    for child in kind.__subclasses__():
        if child.__module__.partition(".")[0] == "eoracc":
            yield from defined(child, kind.__name__)


def test_tree_is_that_of_the_classes() -> None:
    require("triton")
    for name in modules():
        if name.partition(".")[0] == "eoracc":
            importlib.import_module(name)
    assert sorted(drawn()) == sorted(defined(EoraccError, "Exception"))


def test_drawing_is_read() -> None:
    assert len(drawn()) > 10
    assert {code for _, _, code in drawn()} == {1, 2}
