"""The layout: every folder imports what docs/architecture.md says, and no import points upward."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("plugins", "runtime", "passes", "compiler")
ROOT_FOLDER = "src/eoracc"

# What a package must not import, at any depth of its code.
FORBIDDEN = {
    "plugins": {"eoracc.compiler", "eoracc.passes", "eoracc.runtime", "torch", "transformers"},
    "runtime": {"eoracc.compiler", "eoracc.passes", "torch", "transformers"},
    "passes": {"eoracc.compiler", "eoracc.runtime", "torch", "transformers"},
}

# The files of plugins/csrc/cpu differ by instruction set and stay side by side.
FILES_IN_A_FOLDER = 16
WIDE = {"plugins/csrc/cpu"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    named = {}
    for path in (ROOT / "src" / "eoracc").glob("*.py"):
        named[f"eoracc.{path.stem}".removesuffix(".__init__")] = path
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = ("eoracc", *path.relative_to(ROOT).with_suffix("").parts)
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


def folder_of(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


@cache
def imports(module: str) -> frozenset[str]:
    """What ``module`` imports anywhere: late, and for type checkers only, too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import module` imports the module, any other name its home.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules() else node.module)
    return frozenset(found - {module})


@cache
def imported_folders(folder: str) -> frozenset[str]:
    """Folders of the product that the modules of ``folder`` import, without itself."""
    found = {
        folder_of(modules()[name])
        for module, path in modules().items()
        if folder_of(path) == folder
        for name in imports(module)
        if name in modules()
    }
    return frozenset(found - {folder})


@cache
def table() -> dict[str, frozenset[str]]:
    """The table of docs/architecture.md: what each folder may import."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("| `") and len(cells) in (2, 3):
            names = cells[2].split(",") if len(cells) == 3 else []
            rows[cells[0].strip("`")] = frozenset(name.strip(" `") for name in names)
    # Other tables of the page have other things in backticks.
    return {name: allowed for name, allowed in rows.items() if (ROOT / name).is_dir()}


def folders() -> list[str]:
    return sorted({folder_of(path) for path in modules().values()})


def test_the_table_has_every_folder() -> None:
    assert sorted(table()) == folders()


@pytest.mark.parametrize("folder", folders())
def test_a_folder_imports_what_the_table_says(folder: str) -> None:
    used = imported_folders(folder)
    cell = ", ".join(f"`{name}`" for name in sorted(used))
    assert used == table()[folder], f"docs/architecture.md, row `{folder}`, should end: {cell}"


def test_there_is_no_circle_of_files() -> None:
    graph = {
        module: {name for name in imports(module) if name in modules()} for module in modules()
    }
    # A package's own __init__ is run first by whoever imports from it, and imports its modules.
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these modules import one another: {' -> '.join(error.args[1])}")
    assert len(order) >= len(modules())


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    ours = [name for name in modules() if name.startswith(f"eoracc.{package}")]
    assert ours
    for module in ours:
        for name in imports(module):
            for forbidden in FORBIDDEN[package]:
                assert name != forbidden, f"{module} imports {name}"
                assert not name.startswith(f"{forbidden}."), f"{module} imports {name}"


def sources() -> Iterator[Path]:
    """Files of the product that git keeps, or would."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in {".py", ".cc", ".h", ".inl"}:
                yield path


def test_folders_are_small() -> None:
    sizes: dict[str, int] = {}
    for path in sources():
        if path.name != "__init__.py":
            sizes[folder_of(path)] = sizes.get(folder_of(path), 0) + 1
    wide = {name: size for name, size in sizes.items() if size > FILES_IN_A_FOLDER}
    assert set(wide) <= WIDE, f"too many files side by side: {wide}"


@pytest.mark.parametrize("package", ["plugins", "runtime"])
def test_running_an_artifact_loads_no_torch(package: str) -> None:
    names = sorted(name for name in modules() if name.startswith(f"eoracc.{package}"))
    program = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "heavy = ('torch', 'transformers', 'eoracc.compiler', 'eoracc.passes')\n"
        "print(*sorted(m for m in sys.modules if m in heavy))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
