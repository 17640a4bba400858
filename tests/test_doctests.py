"""The examples in docstrings are run, every one of them."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

from tests.modules import modules

PARSER = doctest.DocTestParser()
WITH_EXAMPLES = {
    name: path for name, path in modules().items() if ">>> " in path.read_text(encoding="utf-8")
}


def count_examples(path: Path) -> int:
    """Examples in the docstrings of the module, its classes and its functions."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return sum(
        len(PARSER.get_examples(ast.get_docstring(node) or ""))
        for node in ast.walk(tree)
        if isinstance(node, documented)
    )


def test_docstrings_have_examples() -> None:
    assert sum(map(count_examples, WITH_EXAMPLES.values())) > 80


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_of_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    # doctest passes over what a decorator hides from it.
    assert result.attempted == count_examples(WITH_EXAMPLES[name])
