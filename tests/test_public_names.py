"""Every module lists its public names in ``__all__``; ruff keeps the lists sorted."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

from tests.modules import modules

ALL = modules()
PACKAGE = {name: path for name, path in ALL.items() if name.partition(".")[0] == "eoracc"}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def listed(path: Path) -> frozenset[str]:
    """The names in ``__all__``, none where the module has no such list."""
    for node in parse(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def defined(path: Path) -> set[str]:
    """Names of the classes and functions at the top level."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in parse(path).body if isinstance(node, kinds)}


def bound(path: Path) -> set[str]:
    """Names that the module defines at the top level, or imports there."""
    names = defined(path)
    for node in parse(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return names


@cache
def imported() -> dict[str, set[str]]:
    """What the modules import from each other, by the module that it is imported from."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for path in ALL.values():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.module in PACKAGE:
                names[node.module] |= {
                    alias.name for alias in node.names if f"{node.module}.{alias.name}" not in ALL
                }
    return names


def test_public_classes_and_functions_are_listed() -> None:
    missing = {
        name: {public for public in defined(path) if not public.startswith("_")} - listed(path)
        for name, path in PACKAGE.items()
    }
    assert not {name: names for name, names in missing.items() if names}


def test_listed_names_exist_and_are_public() -> None:
    unknown = {name: listed(path) - bound(path) for name, path in PACKAGE.items()}
    assert not {name: names for name, names in unknown.items() if names}
    private = {name for path in PACKAGE.values() for name in listed(path) if name.startswith("_")}
    assert private == {"__version__"}


def test_names_that_other_modules_import_are_listed() -> None:
    """Constants and types that another module uses are public, and no private name is used."""
    missing = {name: imported()[name] - listed(path) for name, path in PACKAGE.items()}
    assert not {name: names for name, names in missing.items() if names}


def test_names_are_read() -> None:
    path = PACKAGE["eoracc.errors"]
    assert {"EoraccError", "reason"} <= listed(path) & defined(path) & imported()["eoracc.errors"]
    assert {"re", "_NO_HEADERS"} <= bound(path)
