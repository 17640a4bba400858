"""Slots: the places in an artifact's model that take an adapter, listed in the model's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.manifest import Manifest, read_listed, read_manifest
from eoracc.runtime.artifact.model_metadata import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_slots", "parse_slots", "read_slots"]


def read_slots(folder: Path, manifest: Manifest | None = None) -> AdapterSlots:
    """Slots of the artifact's model.

    Args:
      folder: the artifact.
      manifest: of the artifact, if already read.

    Raises:
      ArtifactError: the artifact is damaged or has no slots.
    """
    slots = find_slots(folder, manifest)
    if slots is None:
        raise ArtifactError(
            f"{folder}: takes no adapters: build it again, with onnxruntime.adapter_type int8 or "
            "float16"
        )
    return slots


def find_slots(folder: Path, manifest: Manifest | None = None) -> AdapterSlots | None:
    """Like :func:`read_slots`; None if the artifact has no slots."""
    manifest = read_manifest(folder) if manifest is None else manifest
    path = read_model_files(folder, manifest).model
    name = path.relative_to(folder).as_posix()
    return parse_slots(read_listed(folder, manifest, name), path)


def parse_slots(model: bytes, path: Path) -> AdapterSlots | None:
    """Slots listed in an ONNX file; None if it lists none.

    Args:
      model: content of the file.
      path: of the file, for errors.

    Raises:
      ArtifactError: the file is damaged.
    """
    try:
        metadata = read_metadata(model)
        return AdapterSlots.from_json(metadata[SLOTS_KEY]) if SLOTS_KEY in metadata else None
    except (ValueError, PluginError) as error:
        raise ArtifactError(f"{path}: {error}: build the artifact again") from None
