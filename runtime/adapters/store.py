"""Add adapters to a finished artifact and remove them; the backbone does not change.

Each change is atomic (:mod:`eoracc.runtime.artifact.folder_change`), and several processes change
an artifact one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.report_file import encode_report
from eoracc.runtime.adapters.adapter import check_adapter_name
from eoracc.runtime.adapters.files import (
    adapter_files,
    check_adapter_exists,
    encode_adapter,
    listed_adapters,
)
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.folder_change import changing
from eoracc.runtime.artifact.manifest import REPORT_FILE, read_listed, read_manifest
from eoracc.runtime.artifact.update import change_artifact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from eoracc.runtime.adapters.adapter import Adapter
    from eoracc.runtime.artifact.manifest import Manifest

__all__ = ["add_adapter", "remove_adapter"]

_READER = Reader(ArtifactError, "copy or build the artifact again")
_Report = dict[str, Any]


def add_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    force: bool = False,
    edit_report: Callable[[_Report], None] | None = None,
    authenticity: Authenticity = UNCHECKED,
) -> Manifest:
    """Store ``adapter`` in an artifact.

    Args:
      folder: the artifact.
      adapter: for its backbone.
      force: replace an adapter of the same name and drop its figures from the report.
      edit_report: edits the current content of report.json in place. It must not read adapters or
        verify the artifact, which is locked meanwhile.
      authenticity: what the artifact has to be before the change.

    Returns:
      The artifact's new manifest.

    Raises:
      ArtifactError: the adapter belongs to another backbone, does not fit, or exists already; or
      the
        artifact is damaged or cannot be written to. Nothing has changed then.
    """
    check_adapter_name(adapter.name)
    with changing(folder):
        manifest = read_manifest(folder, authenticity)
        if adapter.backbone != manifest.digest:
            raise ArtifactError(
                f"adapter '{adapter.name}': is for the backbone {adapter.backbone[:12]}, {folder} "
                f"is {manifest.digest[:12]}: make the adapter anew for this artifact"
            )
        if adapter.name in listed_adapters(manifest) and not force:
            raise ArtifactError(
                f"{folder}: has an adapter '{adapter.name}': choose another name, or replace it "
                "with --force"
            )
        written = encode_adapter(adapter, read_slots(folder, manifest))
        written |= _edited_report(folder, manifest, adapter.name, edit_report)
        return change_artifact(folder, manifest, written)


def remove_adapter(folder: Path, name: str, authenticity: Authenticity = UNCHECKED) -> Manifest:
    """Remove an adapter and its figures in the report from an artifact.

    Args:
      folder: the artifact.
      name: of the adapter.
      authenticity: what the artifact has to be before the change.

    Returns:
      The artifact's new manifest.

    Raises:
      ArtifactError: the adapter is unknown, or the artifact cannot be written to.
    """
    with changing(folder):
        manifest = read_manifest(folder, authenticity)
        check_adapter_exists(folder, manifest, name)
        written = _edited_report(folder, manifest, name, None)
        return change_artifact(folder, manifest, written, adapter_files(name))


def _edited_report(
    folder: Path, manifest: Manifest, name: str, edit: Callable[[_Report], None] | None
) -> dict[str, bytes]:
    """report.json if it changes: without the old figures of adapter ``name``, then edited."""
    if REPORT_FILE not in manifest.files:
        return {}
    before = read_listed(folder, manifest, REPORT_FILE)
    path = folder / REPORT_FILE
    report: _Report = _READER.as_object(_READER.parse(before, path), path)
    _forget(report, name)
    if edit is not None:
        edit(report)
    if report == _READER.parse(before, path):
        return {}
    try:
        return {REPORT_FILE: encode_report(report)}
    except ValueError as error:
        raise ArtifactError(f"{path}: cannot be written as JSON: {error}") from None


def _forget(report: _Report, name: str) -> None:
    """Drop the figures of adapter ``name``, and those of every adapter on its text."""
    section = report.get("adapters") or {}
    for figures in section.values():
        figures.pop(name, None)
    for row in section.get("perplexity", {}).values():
        row.pop(name, None)
