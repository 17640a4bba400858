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


# What reads a document without bounds, and the modules that may: each says why.
UNBOUNDED = {
    ("json", "load"),
    ("json", "loads"),
    ("yaml", "load"),
    ("yaml", "safe_load"),
    ("yaml", "SafeLoader"),
    ("safetensors", "safe_open"),
    ("safetensors", "deserialize"),
    ("safetensors.numpy", "load"),
    ("safetensors.numpy", "load_file"),
    ("safetensors.torch", "load"),
    ("safetensors.torch", "load_file"),
    ("onnx", "load"),
    ("onnx_ir", "load"),
    ("gguf", "GGUFReader"),
    ("tokenizers", "Tokenizer.from_file"),
}
READERS = {
    "eoracc.tensor_files": "checks the header first",
    "eoracc.compiler.config.yaml_tree": "bounds depth and aliases",
    "eoracc.compiler.frontend.gguf.reading": "checks every count first",
    "eoracc.compiler.frontend.weights": "its callers have checked the headers",
    "eoracc.compiler.targets.tensorrt.engines.build": "messages of its own process",
    "eoracc.compiler.targets.tensorrt.engines.bundle": "its own text",
    "eoracc.compiler.targets.tensorrt.engines.task": "messages of its own process",
    "eoracc.compiler.eager.output_gradients": "work of its own, compared with digests",
    "eoracc.compiler.imported.tensors": "checks the headers when it is made",
    "eoracc.compiler.kept.record": "work of its own, compared with digests",
    "eoracc.compiler.sweep.activation_store": "work of its own, compared with digests",
    "eoracc.compiler.sweep.resume": "work of its own, compared with digests",
    "eoracc.passes.plan.calibrate_outputs": "work of its own, compared with digests",
    "eoracc.plugins.tensorrt.plugin": "is copied into bundles and imports nothing of eoracc",
    "eoracc.runtime.artifact.graph_file": "bounds the size first",
    "eoracc.runtime.server.api.body": "bodies have a reader of their own, which answers 400",
}


def unbounded_reads(tree: ast.AST) -> set[tuple[str, str]]:
    """The functions of ``UNBOUNDED`` that a module names, however it imports them."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            origins |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    spelled = {f"{module}.{name}": (module, name) for module, name in UNBOUNDED}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            head, dot, rest = ast.unparse(node).partition(".")
            full = f"{origins.get(head, head)}{dot}{rest}"
            if full in spelled:
                found.add(spelled[full])
    return found


@pytest.mark.parametrize(
    "program",
    [
        "import json\njson.loads(x)",
        "from json import loads as parse\nparse(x)",
        "import json as j\nmap(j.load, x)",
        "from safetensors.numpy import load_file\nload_file(x)",
        "import onnx_ir as ir\nir.load(x)",
        "import tokenizers\ntokenizers.Tokenizer.from_file(x)",
        "from tokenizers import Tokenizer\nTokenizer.from_file(x)",
    ],
)
def test_unbounded_reads_are_found(program: str) -> None:
    assert len(unbounded_reads(ast.parse(program))) == 1


def test_documents_are_read_within_bounds() -> None:
    reading = {
        module: found
        for module, path in modules().items()
        if (found := unbounded_reads(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert set(reading) <= set(READERS), f"use eoracc.documents or eoracc.tensor_files: {reading}"
    assert set(READERS) <= set(reading), "these no longer read by themselves: remove them"


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
