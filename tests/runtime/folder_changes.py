"""Ways in which an artifact's folder changes under a process that has loaded it."""

from __future__ import annotations

import shutil
from pathlib import Path

from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter, remove_adapter
from eoracc.runtime.artifact.manifest import (
    MANIFEST_FILE,
    Manifest,
    describe_folder,
    read_manifest,
)
from tests.tiny_artifact import tiny_factors, tiny_slots

__all__ = ["CHANGES", "another_build"]


def another_build(folder: Path, target: Path) -> Path:
    """An artifact like that in ``folder``, with other weights, other factors and a new adapter."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "adapters")
    weights = target / "model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    template = target / "chat_template.jinja"
    template.write_text("{{ messages[0].content | upper }}")
    old = read_manifest(target)
    new = Manifest.of(
        describe_folder(target),
        source=old.source,
        config=old.config,
        packages=old.packages,
        parity=old.parity,
    )
    (target / MANIFEST_FILE).write_text(new.to_json())
    slots = tiny_slots(target)
    for seed, name in enumerate(("math", "prose", "poetry"), start=7):
        add_adapter(
            target, Adapter(name, tiny_factors(slots, rank=4, seed=seed, size=1.0), new.digest)
        )
    return target


def build_again(folder: Path) -> None:
    """As ``eoracc build --force`` does: another folder takes the place of this one."""
    new = another_build(folder, folder.with_name("new"))
    folder.rename(folder.with_name("old"))
    new.rename(folder)


def build_again_and_remove(folder: Path) -> None:
    build_again(folder)
    shutil.rmtree(folder.with_name("old"))


def copy_over(folder: Path) -> None:
    """As ``cp -r new/. folder`` does: every file is truncated and written again."""
    new = another_build(folder, folder.with_name("new"))
    shutil.copytree(new, folder, dirs_exist_ok=True)


def add(folder: Path) -> None:
    slots, digest = tiny_slots(folder), read_manifest(folder).digest
    add_adapter(folder, Adapter("poetry", tiny_factors(slots, rank=4, seed=9), digest))


def replace(folder: Path) -> None:
    slots, digest = tiny_slots(folder), read_manifest(folder).digest
    add_adapter(folder, Adapter("math", tiny_factors(slots, rank=8, seed=9), digest), force=True)


def remove(folder: Path) -> None:
    remove_adapter(folder, "math")


def overwrite_factors(folder: Path) -> None:
    for path in (folder / "adapters").glob("*.onnx_adapter"):
        path.write_bytes(bytes(path.stat().st_size))


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


CHANGES = (
    (build_again, "holds the backbone"),
    (build_again_and_remove, "holds the backbone"),
    (copy_over, "holds the backbone"),
    (add, "differs in adapters/poetry.json, adapters/poetry.onnx_adapter"),
    (replace, "differs in adapters/math.json, adapters/math.onnx_adapter"),
    (remove, "differs in adapters/math.json, adapters/math.onnx_adapter"),
    (overwrite_factors, "differs in adapters/math.onnx_adapter, adapters/prose.onnx_adapter"),
    (delete, "is gone"),
)
"""Each change with the beginning of what tells it."""
