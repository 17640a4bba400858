"""The modules of the repository, by the name under which they are imported."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROOT", "modules"]

ROOT = Path(__file__).parents[1]

# Where the modules of a package are.
FOLDERS = {
    "eoracc": "src/eoracc",  # its links to the folders below are not followed
    "eoracc.compiler": "compiler",
    "eoracc.passes": "passes",
    "eoracc.plugins": "plugins",
    "eoracc.runtime": "runtime",
    "benchmarks": "benchmarks",
}


def modules(*packages: str) -> dict[str, Path]:
    """Files of ``packages`` (of every one by default) by the name of the module."""
    found = {}
    for package in packages or FOLDERS:
        folder = ROOT / FOLDERS[package]
        for path in sorted(folder.rglob("*.py")):
            name = ".".join((package, *path.relative_to(folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found
