"""Imports point one way, and what runs an artifact needs neither torch nor the compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a package must not import, at any depth of its code.
FORBIDDEN = {
    "plugins": {"eoracc.compiler", "eoracc.passes", "eoracc.runtime", "torch", "transformers"},
    "runtime": {"eoracc.compiler", "eoracc.passes", "torch", "transformers"},
    "passes": {"torch", "transformers", "eoracc.runtime"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules that ``path`` imports while it runs, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        for name in imported(path):
            for forbidden in FORBIDDEN[package]:
                assert name != forbidden, f"{path} imports {name}"
                assert not name.startswith(f"{forbidden}."), f"{path} imports {name}"


@pytest.mark.parametrize("package", ["plugins", "runtime"])
def test_running_an_artifact_loads_no_torch(package: str) -> None:
    modules = [
        ".".join(("eoracc", package, *path.relative_to(ROOT / package).with_suffix("").parts))
        for path in sources(package)
    ]
    modules = [name.removesuffix(".__init__") for name in modules]
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "heavy = ('torch', 'transformers', 'eoracc.compiler', 'eoracc.passes')\n"
        "print(*sorted(m for m in sys.modules if m in heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
